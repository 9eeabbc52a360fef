"""Files of strangers, who may mean harm: JSON of bounded size without double keys, names that stay in their folder, safetensors
headers. Nothing in them is run. The safetensors library refuses offsets that overlap or leave the file, sizes that overflow, holes
and unknown dtypes; its errors become `ExportError`s here.
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any

from .errors import ExportError, no_more_files
from .file_names import CONFIG, INDEX
from .text import clean

if TYPE_CHECKING:
    from safetensors import safe_open

MOST_BYTES = 40 << 20  # of a JSON file or a header: the largest index that is known has 14 million
MOST_VALUES = 1_000_000  # of either; each takes up to 250 bytes of memory
MOST_LEVELS = 50  # of lists and objects in one another
MOST_FILES = 10_000  # of a checkpoint
MOST_LETTERS = 500  # of a tensor's name, or of what another program says
MOST_ELEMENTS = 1 << 60  # of a tensor, and of each of its sizes
_NAME = re.compile(r"(?!\.{1,2}$)[^/\\]+")
_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value as a short text for a message, whatever its size."""
    return _SHORT.repr(value)


def reason_of(error: Exception) -> str:
    """The text of an error, printable and short: it may quote a file that is not trusted."""
    text = clean(str(error)[:MOST_LETTERS], kept="")
    return text if len(str(error)) <= MOST_LETTERS else f"{text}..."


def not_read(path: Path, what: str, error: Exception, way_out: str) -> ExportError:
    """The error for a file that was not read: for what the system says, or because it is `what`."""
    if told := no_more_files(error):
        return ExportError(f"{path}: not opened: {told}")
    if isinstance(error, PermissionError):
        return _not_allowed(path)
    if isinstance(error, OSError) and error.strerror:
        return ExportError(f"{path}: not read ({error.strerror}). {way_out}")
    if isinstance(error, UnicodeDecodeError):
        return ExportError(f"{path}: {what} (not in UTF-8 from byte {error.start:,} on). {way_out}")
    return ExportError(f"{path}: {what} ({reason_of(error)}). {way_out}")


def exists(path: str | Path) -> bool:
    """Whether a file or folder is there; under a name that is too long for any, none is."""
    try:
        return Path(path).exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def check_readable(path: Path) -> None:
    """Raise `ExportError` for a file or folder that this user may not read."""
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0), effective_ids=True):
        raise _not_allowed(path)


def _not_allowed(path: Path) -> ExportError:
    return ExportError(f"{path}: this user may not read it. Allow it: chmod u+rX, or run as its owner")


def read_text(path: Path, way_out: str = "Give a text in UTF-8") -> str:
    """The content of a text file; `ExportError` if it is not read, or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise not_read(path, "not a text", error, way_out) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. `ValueError` or `OSError` says why it is not read.

    In config.json a key that is not read here may be Infinity or NaN. The keys that are read are judged by their values.
    """
    with path.open("rb") as file:
        return parsed(file.read(MOST_BYTES + 1), finite=path.name != CONFIG)


def read_table(path: Path) -> dict[str, Any]:
    """The object in a JSON file. `ValueError` (for another value too) or `OSError` says why it is not read."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def parsed(text: bytes, finite: bool = True) -> Any:
    """The value of a JSON text, read in bounded memory; `ValueError` says why it is refused."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    try:
        constant = _finite if finite else float
        found = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels deep") from None
    level = [found]
    for _ in range(MOST_LEVELS):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
    if level:
        raise ValueError(f"more than {MOST_LEVELS} levels deep")
    if _SURROGATE.search(text):
        json.dumps(found, ensure_ascii=False).encode()  # raises where half a character is left over
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def inside(folder: Path, name: object) -> Path:
    """The path of the file `name` in a folder; `ExportError` for a name or a symbolic link that leads out of the folder.

    A folder in the hub's cache is made of links to the cache's own files: these are followed.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable() or len(name.encode()) > 255:
        raise ExportError(
            f"{folder}: {shown(name)} is not the name of a file in this folder. Fetch the checkpoint again, or do not trust it"
        )
    path, home = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(home) and not _in_hub_cache(home, real):
        raise ExportError(
            f"{path} is a symbolic link out of its folder, which is not followed. Put the file itself there, or give the "
            "folder where it is"
        )
    if path.exists() and not path.is_file():
        raise ExportError(f"{path} is not a file. Fetch the checkpoint again")
    if path.exists():
        check_readable(path)
    return path


def _in_hub_cache(home: Path, real: Path) -> bool:
    """Whether `real` is a blob of the cached repository whose snapshot is `home`; newer caches share blobs among repositories."""
    for folder in (home, *home.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs"
            return real.parent == repository / "blobs" or bool(
                real.is_relative_to(shared) and _SHARED.fullmatch(real.relative_to(shared).as_posix())
            )
    return False


def read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file, from the index of a checkpoint; `ExportError` for one that is damaged or names other folders."""
    path = inside(folder, INDEX)
    try:
        found = read_json(path)
        homes = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(homes, dict):
            raise ValueError(f"its weight_map is {shown(homes)}, not a table of files")
        for name in homes:
            check_name(name)
        if odd := [file for file in homes.values() if not isinstance(file, str) or not file.endswith(".safetensors")]:
            raise ValueError(f"{shown(odd[0])} is no safetensors file")
        if len(named := dict.fromkeys(homes.values())) > MOST_FILES:
            raise ValueError(f"it names {len(named):,} files, more than {MOST_FILES:,}")
    except (OSError, ValueError) as error:
        raise not_read(path, "not the index of a checkpoint", error, "Fetch it again") from error
    files = {file: inside(folder, file) for file in named}
    return {name: files[file] for name, file in homes.items()}


def opened(path: Path, way_out: str = "Fetch this file again", framework: str = "pt") -> "safe_open":
    """A safetensors file, open for reading; `ExportError` for a header that is damaged, too large or names a tensor twice.

    Where only names are asked for, `framework` is numpy: torch maps a file so that Linux refuses one that is larger than memory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        header = read_header(path)
        file = safe_open(path, framework=framework)
        for name, said in header.items():
            check_name(name)
            if name != "__metadata__" and max(said["shape"], default=0) > MOST_ELEMENTS:
                raise ValueError(f"{name} is {shown(said['shape'])}")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last: of torch, which maps the file
        raise not_read(path, "not a readable safetensors file", error, way_out) from error
    return file


def headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name -> dtype, as safetensors spells it, and shape; `ExportError` as of `opened`."""
    opened(path, framework="numpy")
    said = read_header(path)
    return {name: (one["dtype"], tuple(one["shape"])) for name, one in said.items() if name != "__metadata__"}


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file. `ValueError` for a tensor that is there twice: the library would take the last one."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > size - 8:
            raise ValueError(f"its header would have {length:,} bytes, the file has {size:,}")
        if length > MOST_BYTES:
            raise ValueError(f"its header has {length:,} bytes, more than {MOST_BYTES:,}")
        header = parsed(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    return header


def check_name(name: str) -> None:
    if not 0 < len(name) <= MOST_LETTERS or not name.isprintable():
        raise ValueError(f"{shown(name)} is no name of a tensor")


@contextmanager
def panics() -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no `Exception` in Python, into a `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error
