"""Which format each module gets: an ordered list of globs over HF modules, of which the last that matches counts.

A recipe is a YAML file. Those in the folder `recipes` are known by name. A file may have these keys:

published  who publishes such checkpoints, for readers
formats    the list: each entry one glob and its format, or `bf16`; what no glob matches stays in bfloat16
options    options of an export by name, where the user gives none: of formats, of the KV cache and its scales
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import ExportError
from ..common.safe_files import not_read, shown
from ..common.text import near
from ..formats import FORMATS, PLAIN

SHIPPED = Path(__file__).parent / "recipes"
KEYS = ("published", "formats", "options")
EXAMPLE = 'Write it as:  formats: [{"*": nvfp4}, {"*.self_attn.*": fp8}]'
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """The format of the modules that a glob matches.

    said    how the user sees the line, for messages
    needed  whether it must match a module; one of many lines of a recipe for every architecture need not
    """

    glob: str
    format: str
    said: str
    needed: bool = True


@dataclass(frozen=True)
class Recipe:
    """name     that of a format, of a recipe in `recipes`, or of a file
    lines    the last that matches a module counts
    options  option -> its value, where the user gives none
    """

    name: str
    lines: tuple[Line, ...]
    options: dict[str, Any] = field(default_factory=dict)


def uniform(format: str) -> Recipe:
    """The recipe of one line, `--format`."""
    return Recipe(format, (Line("*", format, f"--format {format}"),))


def set_line(text: str) -> Line:
    """The line that `--set GLOB=FORMAT` adds; `ExportError` for another text."""
    glob, equals, format = text.rpartition("=")
    if not (glob and equals):
        raise ExportError(f"--set {shown(text)}: write it as GLOB=FORMAT, such as '*.self_attn.*=fp8'")
    _check_format(format, f"--set {text}")
    return Line(glob, format, f"--set {text}")


def names() -> list[str]:
    """The recipes that are known by name."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def recipe_of(name: str) -> Recipe:
    """The recipe of a name, or of a file whose name ends with .yaml; `ExportError` for one that cannot be read or is no recipe."""
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else SHIPPED / f"{name}.yaml"
    if not own and name not in names():
        meant = near(name, names())
        hint = f" Did you mean {meant!r}?" if meant else ""
        raise ExportError(
            f"unknown recipe {shown(name)}.{hint} Known: {', '.join(names())}; or the name of a .yaml file"
        )
    table = _read(path)
    if odd := [key for key in table if key not in KEYS]:
        raise ExportError(f"{path}: unknown key {shown(odd[0])}. A recipe has {', '.join(KEYS)}")
    entries, options = table.get("formats"), table.get("options") or {}
    if not isinstance(entries, list) or not entries:
        raise ExportError(f"{path}: it has no list `formats`. {EXAMPLE}")
    if not isinstance(options, dict):
        raise ExportError(f"{path}: options is {shown(options)}, not a table of options")
    return Recipe(Path(name).stem, tuple(_line(entry, path, own) for entry in entries), options)


def _read(path: Path) -> dict:
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        table = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise not_read(path, "not a recipe", error, "Give --recipe one that is there and is YAML") from error
    if not isinstance(table, dict):
        raise ExportError(f"{path}: not a recipe, but {shown(table)}. {EXAMPLE}")
    return table


def _line(entry: object, path: Path, own: bool) -> Line:
    if not (isinstance(entry, dict) and len(entry) == 1 and all(isinstance(w, str) for w in (*entry, *entry.values()))):
        raise ExportError(f"{path}: {shown(entry)} is no glob with its format. {EXAMPLE}")
    ((glob, format),) = entry.items()
    _check_format(format, f"{path}: {glob}")
    return Line(glob, format, f"{path.name if own else f'recipe {path.stem}'}: {glob}: {format}", needed=own)


def _check_format(format: str, where: str) -> None:
    if format not in FORMATS:
        meant = near(format, FORMATS)
        hint = f" Did you mean {meant!r}?" if meant else ""
        raise ExportError(
            f"{where}: unknown format {shown(format)}.{hint} Known: {', '.join(FORMATS)}; {PLAIN} leaves it alone"
        )
