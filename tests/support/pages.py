"""Pages that show how the package is changed: their blocks, and the package as it is once somebody did what a page says."""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

ROOT = Path(__file__).parents[2]
_STEP = re.compile(r"^## (\d+\..*?)(?:: (\S+))?$", re.MULTILINE)


def read(name: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / name).read_text()


def section(page: str, heading: str) -> str:
    """What is below the heading of the second level that begins so, with it; "" if there is none."""
    found = re.search(rf"^## {re.escape(heading)}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[0] if found else ""


def blocks(text: str, language: str) -> list[str]:
    """The blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block(page: str, heading: str, language: str) -> str:
    """The first block in a language below the heading that begins so."""
    found = blocks(section(page, heading), language)
    assert found, f"the page has no {language} below {heading!r}"
    return found[0]


def without(page: str, step: str) -> str:
    """The page as if its author had forgotten a step."""
    assert section(page, step), f"the page has no step {step!r}"
    return page.replace(section(page, step), "")


def follow(page: str, folder: Path) -> Path:
    """Copy the package into a folder, and do there what the steps of a page say: a step names a file, and shows all of a new one in
    Python, or lines of one that is there as a diff. Returns the folder, for `using`.
    """
    shutil.copytree(ROOT / "megatron_export", folder / "megatron_export", ignore=shutil.ignore_patterns("__pycache__"))
    for step, file in _STEP.findall(page):
        path = folder / "megatron_export" / file.replace("\\", "")
        for new in blocks(section(page, step), "python"):
            path.write_text(new)
        for change in blocks(section(page, step), "diff"):
            path.write_text(_changed(path.read_text(), change))
    return folder


def _changed(text: str, change: str) -> str:
    """A file with the lines of a diff, which has no line numbers: what it leaves must stand in the file once."""
    lines = change.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    count = text.count(f"\n{before}")
    assert count == 1, f"the page changes these lines, which are there {count} times:\n{before}"
    return text.replace(f"\n{before}", f"\n{after}")


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """While open, what this process imports as `megatron_export` is that of a folder; what it had imported is there again later."""
    before = _taken_out()
    sys.path.insert(0, str(folder))
    invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict:
    names = [name for name in sys.modules if name.partition(".")[0] == "megatron_export"]
    return {name: sys.modules.pop(name) for name in names}
