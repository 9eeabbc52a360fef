"""`export_manifest.json`: what is in a published folder, and how it came about. No engine reads it.

files     name -> bytes, crc32 and, with --sha256, sha256, of every other file but report.html and README.md, which name the
          sha256 of this one
tensors   name -> file, dtype, shape, crc32 of its bytes
identity  what decides the bytes: sha256 of the settings, of the model's weights, of the statistics, and this package's version
run       the rest, in words: options that are not defaults, versions, topology, the names of what model and statistics came from
"""

import json
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..common.errors import ExportError
from ..common.file_names import MANIFEST
from ..common.safe_files import exists, shown
from ..planning.contents import Contents
from .crc32 import spelled
from .read_back import Verified

KIND = "megatron_export manifest 1"
_PACKAGES = ("torch", "megatron-core", "safetensors", "transformers")
_ACCELERATORS = ("transformer_engine", "apex")


def manifest(
    contents: Contents, found: dict[str, Verified], sums: dict[str, str], identity: dict[str, str], run: dict
) -> dict:
    """The content of the file; `sums` are the sha256 of the files that have one."""
    tensors = {
        output.name: {
            "file": file,
            "dtype": output.dtype,
            "shape": list(output.shape),
            "crc32": spelled(found[file].tensors[output.name]),
        }
        for file, outputs in contents.files.items()
        for output in outputs
    }
    files: dict[str, dict] = {}
    for name, one in sorted(found.items()):
        files[name] = {"bytes": one.nbytes, "crc32": spelled(one.crc32)}
        if name in sums:
            files[name]["sha256"] = sums[name]
    return {
        "kind": KIND,
        "identity": identity,
        "run": run | {"versions": _versions() | run.get("versions", {})},
        "files": files,
        "tensors": tensors,
    }


def identity_of(folder: Path) -> dict | None:
    """The `identity` in a published folder's manifest; None without a manifest, or if a file of it is gone or has another size."""
    said = said_of(folder)
    try:
        there = all((folder / name).stat().st_size == file["bytes"] for name, file in said["files"].items())
        return said["identity"] if there else None
    except (OSError, KeyError, TypeError, AttributeError):
        return None


def said_of(folder: Path) -> dict:
    """The manifest of a published folder; empty if there is none."""
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return said if said["kind"] == KIND else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def origin_of(folder: Path) -> str:
    """What a published folder was made from, as its manifest names it: a hub id, or a folder of that name, beside it or in the
    working directory. `ExportError` where that cannot be told.
    """
    run = said_of(folder).get("run")
    name = run.get("hf_model") if isinstance(run, dict) else None
    if not isinstance(name, str) or not name.isprintable():
        raise ExportError(f"{folder} does not say what it was made from. Give --reference PATH_OR_ID")
    if "/" in name and not Path(name).is_absolute():
        return name
    places = (folder.resolve().parent / name, Path(name)) if name not in ("", ".", "..") else ()
    found = next((place for place in places if exists(place) and place.is_dir()), None)
    if found is None:
        raise ExportError(f"{folder} was made from {shown(name)}, which is not beside it. Give --reference PATH_OR_ID")
    return str(found)


def names_in(said: Any) -> Any:
    """The same without where files and folders lie, which is private: a path becomes its name, in the hub's cache the hub id."""
    if isinstance(said, dict):
        return {names_in(key): names_in(value) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [names_in(value) for value in said]
    if not isinstance(said, str) or not said or not (Path(said).is_absolute() or exists(said)):
        return said
    path = Path(os.path.normpath(Path.cwd() / said))
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def accelerators() -> dict[str, str]:
    """Versions of Transformer Engine and Apex, where Megatron-Core has loaded them in this process; "unknown" if not installed."""
    found = {}
    for name in _ACCELERATORS:
        if name in sys.modules:
            found[name] = "unknown"
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    return found


@cache
def _versions() -> dict[str, str]:
    """Of Python and of every package that took part and is installed."""
    found = {"python": platform.python_version(), "megatron_export": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
