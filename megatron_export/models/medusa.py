"""MedusaModel: Medusa's heads, which guess one token each, from the last hidden state of the model beside them, their base.

A head is a few blocks x + silu(linear(x)), and an output layer of its own. They are written for vLLM, which has them up to release
0.32: under the names of its modules, and in bfloat16, as it copies codes in as numbers. It skips biases unless `medusa_fc_bias` is
true, and takes every key of config.json with "num" and "heads", or with "num" and "layers", for the one that counts them.

In Megatron every rank of the last stage holds the blocks whole, and rows of the output layers. `num_heads` counts heads as other
models count layers, so a head has the canonical name of a layer.
"""

import re
from collections.abc import Collection

from ..common.errors import ExportError
from .architecture import Architecture
from .rules import same, vocab
from .shape import ModelShape

NAME = "MedusaModel"
MOST_BLOCKS = 4  # of a head; ModelOpt makes 1 unless told otherwise
_BLOCK = re.compile(r"(\d+)\.medusa_layers\.(\d+)\.linear\.(weight|bias)")
_COUNTS = ("num_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_MOST = 1 << 24


def _sizes(config: dict) -> ModelShape:
    wrong = [key for key in _COUNTS if type(config.get(key)) is not int or not 0 < config[key] <= _MOST]
    if wrong or config["num_heads"] > 1000 or config["num_hidden_layers"] > MOST_BLOCKS:
        most = f"num_heads up to 1000, num_hidden_layers up to {MOST_BLOCKS}"
        raise ExportError(f"config.json of a {NAME} needs whole numbers above 0: {', '.join(_COUNTS)}; {most}")
    heads, blocks, hidden, tokens = (config[key] for key in _COUNTS)
    return ModelShape(NAME, heads, hidden, hidden, hidden, 1, hidden, tokens, False, base_vocab=tokens, blocks=blocks)


_BLOCKS = {
    f"decoder.layers.{{l}}.medusa_layers.{block}.linear.{leaf}": same(f"blocks.{{l}}.layers.{block}.{leaf}")
    for block in range(MOST_BLOCKS)
    for leaf in ("weight", "bias")
}
ARCHITECTURE = Architecture(
    draft=True,
    formats=("bf16",),
    sizes=_sizes,
    rules=_BLOCKS | {"decoder.layers.{l}.lm_head.weight": vocab("lm_heads.{l}.weight")},
    only={"medusa_fc_bias": (True,), "original_lm_head": (False, None)},
)


def not_medusa(names: Collection[str]) -> str:
    """Why heads with parameters of these names are not exported; "" if they are."""
    found = {match.groups() for name in names if (match := _BLOCK.fullmatch(name))}
    blocks = {int(block) for _, block, _ in found}
    if not found:
        return "they have no blocks as ModelOpt's Megatron models have them, and those of transformers models are not exported"
    if max(blocks) >= MOST_BLOCKS:
        return f"a head has {max(blocks) + 1} blocks, and {MOST_BLOCKS} are the most that are exported"
    whole = {(head, str(block), leaf) for head, _, _ in found for block in blocks for leaf in ("weight", "bias")}
    return (
        ""
        if found == whole
        else "some heads have other blocks than others, or no bias, and engines build them all alike"
    )


def counts_of(names: Collection[str]) -> dict:
    """How many heads and blocks there are, in words of config.json."""
    found = [match.groups() for name in names if (match := _BLOCK.fullmatch(name))]
    heads, blocks = {head for head, _, _ in found}, {block for _, block, _ in found}
    return {"num_heads": len(heads), "num_hidden_layers": len(blocks)}


def medusa_config(base: dict, said: dict) -> dict:
    """The config.json of heads beside a model with config.json `base`, the language model's part of it."""
    return {
        "architectures": [NAME],
        "model_type": "medusa",
        "hidden_size": base["hidden_size"],
        "vocab_size": base["vocab_size"],
        "truncated_vocab_size": base["vocab_size"],
        **said,
        "medusa_fc_bias": True,
        "original_lm_head": False,
        "torch_dtype": "bfloat16",
    }
