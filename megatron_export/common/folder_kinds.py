"""What a folder is that is no language model, known by the names in it: adapters of PEFT, an embedding model."""

from collections.abc import Collection
from pathlib import Path

from .errors import ExportError
from .file_names import CONFIG, INDEX
from .safe_files import check_readable, exists, inside, read_table, shown

ADAPTERS = "adapter_config.json"
HEADLESS = "an embedding model: its tensors have no 'model.' before their names, and it has no output layer"


def refuse_adapters(folder: Path) -> None:
    """Raise for a folder of PEFT adapters that has no model beside them, and for one that this user may not read."""
    if not exists(folder):
        return
    check_readable(folder)
    if not (folder / ADAPTERS).is_file() or ((folder / CONFIG).is_file() and has_weights(folder)):
        return
    try:
        base = read_table(inside(folder, ADAPTERS)).get("base_model_name_or_path")
    except (OSError, ValueError):
        base = None
    of = f" for {shown(base)}" if base else ""
    raise ExportError(
        f"{folder} has PEFT adapters{of} ({ADAPTERS}), and no model. Merge them into their model, as merge_and_unload of peft "
        "does, save that, and give its folder"
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors files of a whole model, by their names."""
    return any((folder / name).is_file() for name in (INDEX, "model.safetensors"))


def is_headless(names: Collection[str]) -> bool:
    """Whether these are the tensors of a model that was saved without its output layer, as embedding models are."""
    return "embed_tokens.weight" in names and not any(name.startswith(("model.", "lm_head.")) for name in names)
