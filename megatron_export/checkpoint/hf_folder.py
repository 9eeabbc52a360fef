"""The files of an HF model around its weights: its folder, its config, and what is copied."""

import re
from pathlib import Path

from ..common.errors import ExportError
from ..common.file_names import CONFIG, GENERATION_CONFIG, INDEX, QUANT_CONFIG
from ..common.folder_kinds import ADAPTERS, refuse_adapters
from ..common.safe_files import exists, inside, not_read, opened, read_index, read_json, read_table, shown
from ..models import architecture_of
from .dialects import dialect_of
from .torch_dist_iteration import TRACKER

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COPIED = (
    *(GENERATION_CONFIG, "chat_template*", "*preprocessor_config.json", "*.jinja", "*.py", "LICENSE*", "NOTICE*"),
    *(
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "*.tiktoken",
    ),
)
_VOCABULARIES = (
    "tokenizer.json",
    "*.model",
    "vocab.*",
    "*.tiktoken",
)  # what a tokenizer cannot be without: one of these
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")  # may run code when they are read
_NEVER_COPIED = (*_PICKLES, ".safetensors")  # whatever they are called


def find_model(hf_model: str | Path, *, weights: bool) -> Path:
    """The folder of an HF model: a local path, or a hub id, which is fetched into the hub's cache.

    With `weights`, its safetensors files are fetched too. `ExportError` if there is no such model, or it has no config or weights.
    """
    folder = Path(hf_model)
    if not exists(folder) and _HUB_ID.fullmatch(str(hf_model)) and not str(hf_model).startswith("."):
        patterns = [CONFIG, QUANT_CONFIG, ADAPTERS, *_COPIED, *(["*.safetensors", INDEX] if weights else [])]
        folder = _fetch(str(hf_model), patterns)
    if exists(folder) and folder.is_file():
        raise ExportError(f"{folder} is a file. Give the folder that it is in, with config.json")
    if not exists(folder) or not folder.is_dir():
        way_out = "Give the path of an HF checkpoint, or a hub id such as org/name"
        raise ExportError(f"no model folder {hf_model}. {way_out}")
    refuse_adapters(folder)
    if not (folder / CONFIG).is_file():
        way_out = "Give a folder that has one"
        if (folder / TRACKER).exists() or any(folder.glob("iter_*")):
            way_out = f"Give the HF model that was trained further, and --megatron-checkpoint {folder}"
        raise ExportError(f"{folder} has no config.json: it is not an HF checkpoint. {way_out}")
    files_to_copy(folder)
    if weights:
        weights_in(folder)
    return folder


def find_tokenizer(tokenizer: str | Path) -> Path:
    """The folder of a tokenizer: a local path, or a hub id, whose small files are fetched; `ExportError` if it has none."""
    folder = Path(tokenizer)
    if not exists(folder) and _HUB_ID.fullmatch(str(tokenizer)) and not str(tokenizer).startswith("."):
        folder = _fetch(str(tokenizer), list(_COPIED))
    if not exists(folder) or not folder.is_dir():
        raise ExportError(
            f"--tokenizer {tokenizer} is no folder. Give one with a tokenizer, or a hub id such as org/name"
        )
    if lacking := lacks_tokenizer(folder):
        raise ExportError(f"--tokenizer: {lacking}. Give another folder")
    files_to_copy(folder)
    return folder


def weights_in(folder: Path) -> Path:
    """The index of a folder's safetensors files, or the only such file; `ExportError` if it has neither."""
    for name in (INDEX, "model.safetensors"):
        if (folder / name).is_file():
            return inside(folder, name)
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLES):
        raise ExportError(
            f"{folder}: no weights but in {pickles[0]}, a pickle, which can run code when it is read and is never read here. "
            "Convert it to safetensors where you trust it, as save_pretrained of transformers does, and give that folder"
        )
    raise ExportError(
        f"{folder}: no weights: neither model.safetensors nor {INDEX} is there. Give a checkpoint in safetensors format"
    )


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file, by the index of a folder or its only safetensors file; `ExportError` if it has neither."""
    home = weights_in(folder)
    return read_index(folder) if home.name == INDEX else dict.fromkeys(opened(home, framework="numpy").keys(), home)


def with_copied(folder: Path, hf_model: str | Path, prefixes: tuple[str, ...]) -> Path:
    """The folder of a model found before; of a hub id, with the files of tensors whose names begin with one of `prefixes`."""
    if not prefixes or Path(hf_model).exists():
        return folder
    index = _fetch(str(hf_model), [INDEX])
    if not (index / INDEX).is_file():
        return _fetch(str(hf_model), ["*.safetensors"])
    homes = read_index(index)
    return _fetch(str(hf_model), sorted({file.name for name, file in homes.items() if name.startswith(prefixes)}))


def of_the_whole(config: dict) -> dict:
    """A config.json with its quantization at the top, also where it stands among the settings of the language model (Kimi K2.5)."""
    key, inner = "quantization_config", config.get("text_config")
    if not isinstance(inner, dict) or key not in inner or key in config:
        return config
    return config | {key: inner[key], "text_config": {name: value for name, value in inner.items() if name != key}}


def read_config(folder: Path, *, weights: bool = True) -> dict:
    """config.json as a dict. `ExportError` for an unknown architecture, and then, if the `weights` beside it are to be read, for
    ones that are quantized in a dialect that is not read (dialects.py).
    """
    path = inside(folder, CONFIG)
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise not_read(path, "not JSON", error, "Fetch it again") from error
    if not isinstance(config, dict):
        raise ExportError(f"{path}: not the settings of a model but a {type(config).__name__}. Fetch it again")
    config = of_the_whole(config)
    quantized = config.get("quantization_config")
    if quantized is not None and not isinstance(quantized, dict):
        raise ExportError(f"{path}: quantization_config is {shown(quantized)}, not a table of settings. Fetch it again")
    architecture_of(config)  # first: of an unknown one, no key of config.json is known
    if weights and (how := quantized_as(folder, config)):
        raise ExportError(f"{folder} is quantized already ({how}); give the original model")
    return config


def quantized_as(folder: Path, config: dict) -> str:
    """What says that a folder's weights are quantized in a way that is not read; "" if nothing does.

    Older releases of ModelOpt write hf_quant_config.json alone.
    """
    try:
        if dialect_of(config):
            return ""
    except ValueError as error:
        return str(error)
    path = inside(folder, QUANT_CONFIG)
    if not path.is_file():
        return ""
    try:
        quantization = read_table(path).get("quantization")
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: not JSON ({error}). Fetch it again") from error
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    return f"{QUANT_CONFIG} says {shown(algorithm)}" if algorithm else ""


def files_to_copy(folder: Path) -> list[Path]:
    """Tokenizer, chat template, generation config, remote code (never run), licence; `ExportError` for a link out of the folder."""
    found = (path for path in sorted(folder.iterdir()) if path.is_file() or path.is_symlink())
    named = [path for path in found if any(path.match(pattern) for pattern in _COPIED)]
    files = [inside(folder, path.name) for path in named if path.suffix.lower() not in _NEVER_COPIED]
    return [path for path in files if path.is_file()]


def lacks_tokenizer(folder: Path) -> str:
    """Which files of a tokenizer are not in a model's folder, as the beginning of a sentence; "" if it has one."""
    if not folder.is_dir() or any(path.match(pattern) for pattern in _VOCABULARIES for path in folder.iterdir()):
        return ""
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).exists()]
    return f"{folder} has no tokenizer: {' and '.join(missing)} (or {', '.join(_VOCABULARIES[1:])}) missing"


def tokenizer_remarks(folder: Path) -> tuple[str, ...]:
    """What to say of an export of a model without a tokenizer. A folder of config.json alone is one to plan with."""
    lacking = lacks_tokenizer(folder) if len(list(folder.iterdir())) > 1 else ""
    return (f"{lacking}: the checkpoint has none either, and engines want one",) if lacking else ()


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:  # the hub's client, its HTTP client and the file system each raise their own
        raise ExportError(
            f"no model folder {hub_id}, and the hub has none to give ({type(error).__name__}: {error})"
        ) from error


def of_folder(folder: Path) -> dict[str, tuple[int, int]]:
    """File name -> bytes, and time of the last change in nanoseconds, of the files in a folder."""
    found = ((path.name, path.stat()) for path in folder.iterdir() if path.is_file())
    return {name: (state.st_size, state.st_mtime_ns) for name, state in found}


def check_unchanged(folder: Path, before: dict[str, tuple[int, int]]) -> None:
    """Raise `ExportError` if a file of the folder has another size or time than `before`."""
    now = of_folder(folder)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise ExportError(f"{folder / changed[0]} changed while it was exported. Start again when nobody writes there")
