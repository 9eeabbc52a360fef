"""The shape of the code: a room imports only rooms below it, foreign things stay in their rooms, importing is cheap."""

import ast
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from .mutations import mutations

PACKAGE = Path(__file__).parents[1] / "megatron_export"
ROOMS = """
common
models formats engines distributed
planning
checkpoint
mcore hf writing
calibration
export verify
cli
"""
LEVEL = {room: level for level, line in enumerate(ROOMS.split("\n")) for room in line.split()}
TOP = {"__init__.py", "__main__.py"}
WALLS = {  # what may be imported -> where
    "torch.distributed": ("distributed/", "mcore/parallel_state.py", "export/transport.py", "hf/dtensors.py"),
    "megatron": ("mcore/", "calibration/mcore/"),
    **dict.fromkeys(  # what needs Megatron, and is imported by common/optional.py alone
        ("megatron_export.mcore", "megatron_export.calibration.mcore"),
        ("mcore/", "calibration/mcore/", "export/megatron_model.py", "cli/megatron_model.py"),
    ),
    **dict.fromkeys(("megatron_export.export.megatron_model", "megatron_export.cli.megatron_model"), ()),
    "transformers": ("hf/", "calibration/data.py", "calibration/hf/", "cli/transformers_model.py", "verify/"),
    "triton": ("formats/triton_",),
}
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, ours as `megatron_export.room.x`."""
    found = set()
    package = ("megatron_export", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@every_file
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room in TOP:
        return
    for imported in imports(path):
        first, _, rest = imported.partition(".")
        other = rest.split(".")[0]
        if first == "megatron_export" and other != room and other in LEVEL:
            assert LEVEL[other] < LEVEL[room], f"{room} imports {imported}"


@every_file
def test_foreign_things_stay_in_the_rooms_named_for_them(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for imported in imports(path):
        for wall, places in WALLS.items():
            inside = imported == wall or imported.startswith(f"{wall}.")
            assert not inside or place.startswith(places), f"{place} imports {imported}"


@every_file
def test_files_are_short_documented_and_never_print(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) <= 300
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type for handler in handlers), "a bare except"


@every_file
def test_an_assertion_says_what_is_wrong(path: Path) -> None:
    """Its message reaches users, as a mistake of ours: a sentence, not a value."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Assert):
            assert isinstance(node.msg, ast.Constant | ast.JoinedStr | ast.Name), f"line {node.lineno}"


@every_file
def test_functions_have_at_most_40_statements(path: Path) -> None:
    for function in ast.walk(tree_of(path)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            statements = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
            assert statements <= 40, f"{function.name} has {statements} statements"


def test_nothing_lies_beside_the_rooms() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == TOP | set(LEVEL)
    assert len(LEVEL) == 14


def test_a_wheel_has_every_file_that_is_not_python() -> None:
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, patterns in listed.items()
        for pattern in patterns
        for path in PACKAGE.parent.joinpath(*package.split(".")).glob(pattern)
    }
    assert {path for path in PACKAGE.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")} == packed


def test_importing_the_package_brings_neither_torch_nor_megatron() -> None:
    script = "import sys, megatron_export; print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_style() -> None:
    root = PACKAGE.parent
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_mutation_has_its_place() -> None:
    """A text that the code has no more would be tried in vain, and only where somebody tries them."""
    texts = {
        mutation.title: (PACKAGE.parent / mutation.file).read_text().count(mutation.old) for mutation in mutations()
    }
    assert {title: count for title, count in texts.items() if count != 1} == {}
