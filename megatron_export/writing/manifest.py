"""`export_manifest.json`: what is in a published folder, and how it came about. No engine reads it.

files     name -> bytes and sha256, of every other file but report.html and README.md, which name the sha256 of this one
tensors   name -> file, dtype, shape, crc32 of its bytes
identity  what decides the bytes: sha256 of the settings, of the model's weights, of the statistics, and this package's version
run       the rest, in words: options that are not defaults, versions, topology, where model and statistics came from
"""

import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..common.dtypes import SPELLED
from ..common.file_names import MANIFEST
from ..planning.contents import Contents
from .read_back import Verified

KIND = "megatron_export manifest 1"
_PACKAGES = ("torch", "megatron-core", "safetensors", "transformers")


def manifest(contents: Contents, found: dict[str, Verified], identity: dict[str, str], run: dict) -> dict:
    """The content of the file."""
    tensors = {
        output.name: {
            "file": file,
            "dtype": SPELLED[output.dtype],
            "shape": list(output.shape),
            "crc32": f"{found[file].tensors[output.name]:08x}",
        }
        for file, outputs in contents.files.items()
        for output in outputs
    }
    return {
        "kind": KIND,
        "identity": identity,
        "run": run | {"versions": _versions()},
        "files": {name: {"bytes": one.nbytes, "sha256": one.sha256} for name, one in sorted(found.items())},
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
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def origin_of(folder: Path) -> str | None:
    """The folder, if it is there, or the hub id that a published folder was made from, as its manifest names it."""
    named = said_of(folder).get("run", {}).get("hf_model")
    return named if isinstance(named, str) and (not Path(named).is_absolute() or Path(named).is_dir()) else None


def _versions() -> dict[str, str]:
    """Of Python and of every package that took part and is installed."""
    found = {"python": platform.python_version(), "megatron_export": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
