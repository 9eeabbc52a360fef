"""Which iteration of a Megatron checkpoint is read, and whether its format can be read."""

import re
from pathlib import Path

from ..common.errors import ExportError
from ..common.file_names import CONFIG
from ..common.safe_files import exists, inside, not_read, read_json, shown
from .torch_dist_metadata import METADATA

SETTINGS = "metadata.json"
TRACKER = "latest_checkpointed_iteration.txt"


def find_iteration(folder: Path, iteration: int | None) -> Path:
    """The folder of one iteration: the given or the latest of a checkpoint, or `folder` itself; `ExportError` if it is not read."""
    if not exists(folder) or not folder.is_dir():
        raise ExportError(f"--megatron-checkpoint {folder} is no folder. Give the one that --save of Megatron-LM named")
    if (folder / METADATA).exists() or (folder / SETTINGS).exists() or _legacy(folder):
        if iteration is not None and folder.name != _name(iteration):
            raise ExportError(f"{folder} is one iteration already, not number {iteration}. Leave out --iteration")
        return _checked(folder)
    there = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"iter_\d+|release", path.name))
    choice = f"There are {', '.join(there)}" if there else "There is none"
    if iteration is not None:
        found = _name(iteration)
    elif (folder / TRACKER).is_file():
        with inside(folder, TRACKER).open("rb") as file:
            said = file.read(100).decode(errors="replace").strip()
        if said != "release" and not re.fullmatch(r"[0-9]{1,18}", said):
            no_number = f"{folder / TRACKER} says {shown(said)}, no iteration"
            raise ExportError(f"{no_number}. Choose one with --iteration. {choice}")
        found = said if said == "release" else _name(int(said))
    elif (folder / CONFIG).is_file() and not there:
        raise ExportError(
            f"{folder} is an HF model, not a checkpoint of Megatron. Give the folder that --save of Megatron-LM named"
        )
    else:
        way_out = "Choose an iteration with --iteration, if one is complete"
        raise ExportError(f"{folder} has no {TRACKER}. {way_out}. {choice}")
    if not (folder / found).is_dir():
        raise ExportError(f"{folder} has no {found}. {choice}")
    return _checked(folder / found)


def _name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _legacy(folder: Path) -> bool:
    return any(folder.glob("mp_rank_*"))


def _checked(folder: Path) -> Path:
    """The folder of an iteration; `ExportError` unless its format can be read."""
    if _legacy(folder):
        raise ExportError(
            f"{folder} is a checkpoint of the old kind, a file for each rank (mp_rank_*), which only the run that made it can "
            "read. Convert it there with Megatron-LM's --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        )
    path = inside(folder, SETTINGS)
    if not path.is_file():
        if (folder / METADATA).is_file():  # torch_dist_fsdp.py
            return folder
        raise ExportError(f"{folder} is no checkpoint of Megatron: it has neither {SETTINGS} nor {METADATA}")
    try:
        said = read_json(path)
        kind = said.get("sharded_backend") if isinstance(said, dict) else None
    except (OSError, ValueError) as error:
        raise not_read(path, "not JSON", error, "Copy the checkpoint again") from error
    if kind == "zarr":
        way_out = "Load it into the run that made it, and save it with --ckpt-format torch_dist"
        raise ExportError(f"{folder} is a zarr checkpoint of an old Megatron-Core. {way_out}")
    if kind != "torch_dist":
        raise ExportError(f"{path}: sharded_backend is {shown(kind)}; only 'torch_dist' is read")
    if not (folder / METADATA).is_file():
        why = "which is written last: saving it was interrupted. Give another one"
        raise ExportError(f"{folder} has no {METADATA}, {why}")
    return folder
