"""The original of a Megatron checkpoint that comes alone: config.json made of its own settings, a tokenizer from elsewhere."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.file_names import GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from ..common.safe_files import not_read, read_table, shown
from ..models import mtp_prefixes, settings_of, without_mtp
from ..models.derivation import derived
from ..models.drafts import child_of
from ..models.settled_settings import Stated
from .hf_folder import find_tokenizer, of_folder
from .original import Original
from .torch_dist_fsdp import opened
from .torch_dist_keys import TRAINING
from .torch_dist_settings import RUN_CONFIG, run_of, sayings
from .torch_dist_storage import Storage

_EMBEDDING = "embedding.word_embeddings.weight"
_MOST_TOKENIZER, _MOST_ADDED = 64 << 20, 1 << 20  # bytes that are read, and of its special tokens
_TOKENS = ("bos_token", "eos_token", "pad_token")


def derived_original(
    folder: Path,
    *,
    tokenizer: str | Path | None,
    architecture: str | None,
    values: Mapping[str, Any],
    mtp: str,
    fits: Callable[[dict], bool],
) -> Original:
    """The original of one iteration. `fits` says whether the tensors are those of a config.json, where settings fit several.

    `ExportError` where the settings do not say enough, and how the user can.
    """
    storage = opened(folder, TRAINING)
    stated = _stated(storage)
    vocabulary, remarks = _vocabulary(storage, stated, values)
    stated = Stated(stated.where, {**stated.settings, "vocab_size": vocabulary}, stated.provider, stated.hf_model)
    home = find_tokenizer(tokenizer) if tokenizer is not None else None
    ids = dict.fromkeys((f"{one}_id" for one in _TOKENS), None) | (_ids(home) if home else {})
    config = derived(stated, architecture, values, fits)
    config, dropped = ids | config, ()
    _check_tokens(config, home)
    if mtp == "drop":
        dropped, config = mtp_prefixes(config), without_mtp(config)
    settings_of(config)
    said = stated.where.removeprefix(f"{folder}: ")
    remarks = (
        f"config.json is made of what {said} in the checkpoint say: {config['architectures'][0]}",
        *remarks,
        *(() if home else (_without(folder),)),
    )
    files = of_folder(home or folder)
    return Original(home or folder, config, files, (), dropped=dropped, inputs=(folder,), remarks=remarks, derived=True)


def _stated(storage: Storage) -> Stated:
    """What the files of a checkpoint say of its model; `ExportError` if nothing does."""
    run = run_of(storage.folder)
    found = sayings(storage, run, ", or give --hf-model")
    if not found:
        raise ExportError(
            f"{storage.folder} does not say which model it is: it has neither arguments of Megatron-LM nor a {RUN_CONFIG}. Give "
            "--hf-model PATH_OR_ID"
        )
    settings = {name: value for _, said in reversed(found) for name, value in said.items()}
    where = f"{storage.folder}: {' and '.join(where for where, _ in found)}"
    model = run.get("model") if isinstance(run.get("model"), dict) else {}
    beside = model.get("extra_checkpoint_metadata")
    hf_model = model.get("hf_model_id") or (beside.get("hf_model_id") if isinstance(beside, dict) else "")
    target = model.get("_target_")
    return Stated(
        where,
        settings,
        provider=target.rpartition(".")[2] if isinstance(target, str) else "",
        hf_model=hf_model if isinstance(hf_model, str) else "",
    )


def _vocabulary(storage: Storage, stated: Stated, values: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """How many tokens the model knows, and what to say of that: what was said, without the rows that Megatron pads with; or, where
    nothing is said, all rows.
    """
    tables = (one.shape for key, one in storage.tensors.items() if key.endswith(_EMBEDDING) and not child_of(key))
    rows = next((shape[0] for shape in tables if shape), None)
    said = values.get("vocab_size", stated.settings.get("vocab_size"))
    invented = str(stated.settings.get("tokenizer_type")).startswith("Null")  # some versions count one token more
    if rows is None or (said is not None and not (invented and "vocab_size" not in values)):
        if rows is not None and type(said) is int and said > rows:
            raise ExportError(
                f"{storage.folder}: vocab_size is {said:,}, but the embedding has {rows:,} rows. Give the right one with "
                "--config-value vocab_size=VALUE"
            )
        return said, ()
    return rows, (
        f"vocab_size is {rows:,}, as the embedding has rows: nothing says how many of them are padding. If you know, give it with "
        "--config-value vocab_size=VALUE",
    )


def _without(folder: Path) -> str:
    own = folder / "tokenizer"
    way_out = f"--tokenizer {own} is the one beside the weights" if own.is_dir() else "Give it with --tokenizer DIR"
    return f"no tokenizer was given: the checkpoint has none either, and engines want one. {way_out}"


def _ids(folder: Path) -> dict[str, Any]:
    """Numbers of the tokens that begin, end and pad a text, as a tokenizer's files say them: generation_config.json's first."""
    said, generation = _table(folder, TOKENIZER_CONFIG), _table(folder, GENERATION_CONFIG)
    listed = said.get("added_tokens_decoder")
    known = {_content(token): number for number, token in (listed if isinstance(listed, dict) else {}).items()}
    known |= {_content(token): token.get("id") for token in _added(folder) if isinstance(token, dict)}
    known.pop(None, None)  # an entry without a text
    found = {}
    for name in _TOKENS:
        number = generation.get(f"{name}_id", known.get(_content(said.get(name))))
        number = int(number) if isinstance(number, str) and number.isdecimal() and len(number) < 10 else number
        found[f"{name}_id"] = number if _is_number(number) or _are_numbers(number) else None
    return found


def _check_tokens(config: dict, home: Path | None) -> None:
    """Raise `ExportError` for a tokenizer of another model, as far as its special tokens tell."""
    for name in _TOKENS:
        number = config[f"{name}_id"]
        if number is not None and not (_is_number(number) or _are_numbers(number)):
            raise ExportError(
                f"--config-value {name}_id={shown(number)}: give the number of a token, or a list of them"
            )
        most = max(number) if isinstance(number, list) else number
        if most is not None and type(config["vocab_size"]) is int and most >= config["vocab_size"]:
            raise ExportError(
                f"{home or '--config-value'}: {name} is number {most:,}, but the model knows {config['vocab_size']:,} tokens. Give "
                "the tokenizer that it was trained with, or the right --config-value vocab_size=VALUE"
            )


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _added(folder: Path) -> list:
    """The special tokens in tokenizer.json, read alone: its vocabulary may be too large for a JSON file that is not trusted."""
    path = folder / TOKENIZER
    if not path.is_file():
        return []
    with path.open("rb") as file:
        text = file.read(_MOST_TOKENIZER)
    _, _, after = text.partition(b'"added_tokens"')
    start = after.find(b"[", 0, 100)
    with suppress(ValueError, RecursionError):
        found, _ = json.JSONDecoder().raw_decode(after[start : start + _MOST_ADDED].decode(errors="replace"))
        return found if start >= 0 and isinstance(found, list) else []
    return []


def _is_number(found: object) -> bool:
    return type(found) is int and 0 <= found < 1 << 31


def _are_numbers(found: object) -> bool:
    return isinstance(found, list) and bool(found) and all(map(_is_number, found))


def _table(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise not_read(path, "not JSON", error, f"Give another --tokenizer than {shown(str(folder))}") from error
