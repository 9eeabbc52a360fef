"""The shape of the code: imports point down, torch.distributed and Megatron stay in their files, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_export"
LEVELS = """
errors sizes piece config progress ahead terminal style charts
signals fingerprint untrusted pulse layout journal hub sheet memory
names formats pickles engines
item placement stored rounding finished lowrank
policy smoothing filing claims described homes iteration
plan
quant_config conveyor asked respelled
contents emulated_experts
cpu assets staging statistics calibration_data emulation
measured source topology model shard perplexity quantizers
writer stored_additions supposed
checkpoint
gather build contradictions verify sides additions
loading filling survey manifest forecast stream checking likeness structure inherited adapters
maxima search watching preview diagnosis differences
clipping judge comparison
calibration prepare inspection publishing given
refit account courier
pipeline background card maps
report
presentation
job
cli check_command
commands
__main__
"""
LEVEL = {name: level for level, line in enumerate(LEVELS.split("\n")) for name in line.split()}
DISTRIBUTED = {"topology", "gather", "pulse"}
MEGATRON = {"cpu", "topology", "model", "build", "calibration"}
FILES = sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    """The name in LEVELS that a file belongs to: its own, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, ours as `megatron_export.x`."""
    found = set()
    package = ("megatron_export", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_foreign_things_stay_in_their_files(path: Path) -> None:
    name = owner(path)
    if name == "__init__":
        return
    for imported in imports(path):
        first, _, rest = imported.partition(".")
        below = rest.split(".")[0]
        if first == "megatron_export" and below != name and below in LEVEL:
            assert LEVEL[below] < LEVEL[name], f"{name} imports {below}"
        assert not imported.startswith("torch.distributed") or name in DISTRIBUTED
        assert not imported.startswith("megatron.") or name in MEGATRON
        assert not imported.startswith("triton") or path.name == "triton_kernels.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_documented_and_never_print(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert len(path.read_text().splitlines()) <= 300
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type for handler in handlers), "a bare except"


def test_every_file_has_a_level() -> None:
    assert {owner(path) for path in FILES} - {"__init__"} == set(LEVEL)


def test_importing_the_package_brings_neither_torch_nor_megatron() -> None:
    script = "import sys, megatron_export; print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_style() -> None:
    root = PACKAGE.parent
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
