"""Which layers of sparse attention (DSA) have an indexer of their own: the others take the choice of the last one that has."""

from ..common.errors import ExportError
from ..common.safe_files import shown

_LETTERS = {"F": "full", "S": "shared"}


def indexed_layers(config: dict) -> tuple[int, ...]:
    """The layers with an indexer, those that predict one more token among them; () for attention that is not sparse.

    As GLM's code reads config.json: `indexer_types`, or a pattern of letters, or one layer of `index_topk_freq` from layer
    `index_skip_topk_offset` - 1 on, and all before.
    """
    if not config.get("index_topk"):
        return ()
    count, pattern = config["num_hidden_layers"], config.get("index_topk_pattern")
    every, skipped = config.get("index_topk_freq") or 1, config.get("index_skip_topk_offset", 2)
    usual = ["shared" if max(layer - skipped + 1, 0) % every else "full" for layer in range(count)]
    spelled = [_LETTERS.get(letter, letter) for letter in pattern] if isinstance(pattern, str) else pattern
    kinds = config.get("indexer_types") or spelled or usual
    if not isinstance(kinds, list) or len(kinds) != count or not {*map(str, kinds)} <= {"full", "shared"}:
        raise ExportError(
            f"config.json: indexer_types is {shown(kinds)}, not 'full' or 'shared' for each of num_hidden_layers {count}. Give the "
            "config.json that belongs to these weights"
        )
    predicting = range(count, count + (config.get("num_nextn_predict_layers") or 0))
    return (*(layer for layer, kind in enumerate(kinds) if kind == "full"), *predicting)
