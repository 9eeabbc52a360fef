"""Which rules to look at again when an engine has a new release: what changed in the sources that they cite, between two wheels.

    pip download --no-deps vllm==0.32.0 && pip download --no-deps vllm==0.33.0
    python tests/engines/changed_sources.py vllm OLD.whl NEW.whl

A wheel may also be a folder that holds the package, such as site-packages. Code is compared, not text: comments, docstrings and
layout do not count. For each file that changed: the rules and architectures that rest on it, and its functions, classes and
statements that changed. The exit status is 0 if none did, 1 if some did, 2 for wrong usage.
"""

import argparse
import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron_export.engines import DRAFTS, ENGINES
from megatron_export.engines.architectures import ARCHITECTURES

MODELS = {  # where an engine has its classes of models
    "vllm": ("vllm/model_executor/models/", "vllm/models/"),
    "sglang": ("sglang/srt/models/",),
    "tensorrt_llm": ("tensorrt_llm/_torch/models/",),
}


class Source:
    """The Python files of a wheel, or of a folder that holds the package."""

    def __init__(self, wheel: Path, package: str) -> None:
        if not wheel.is_dir() and not zipfile.is_zipfile(wheel):
            raise ValueError(f"{wheel} is neither a wheel nor a folder")
        self.held = None if wheel.is_dir() else zipfile.ZipFile(wheel)
        self.wheel = wheel
        self.names = {name for name in self._all(package) if name.endswith(".py")}
        if not self.names:
            raise ValueError(f"{wheel} does not hold the package {package}")

    def _all(self, package: str) -> Iterator[str]:
        if self.held is not None:
            return (name for name in self.held.namelist() if name.startswith(f"{package}/"))
        return (str(path.relative_to(self.wheel)) for path in (self.wheel / package).rglob("*.py"))

    def text(self, file: str) -> str | None:
        """Of a file; None if it is not there."""
        if file not in self.names:
            return None
        return (self.wheel / file).read_text() if self.held is None else self.held.read(file).decode()


def parts_of(text: str) -> dict[str, str]:
    """Qualified name -> code, of functions and of the statements around them; a class is its name and bases."""
    found: dict[str, list[str]] = {}

    def visit(body: list[ast.stmt], within: str) -> None:
        for node in body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            name = (
                f"{within}{node.name}"
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                else ""
            )
            if isinstance(node, ast.ClassDef):
                found.setdefault(name, []).append(" ".join(map(ast.unparse, (*node.bases, *node.decorator_list))))
                visit(node.body, f"{name}.")
            else:
                found.setdefault(name or f"{within}(statements)", []).append(_without_docstring(node))

    visit(ast.parse(text).body, "")
    return {name: "\n".join(code) for name, code in found.items()}


def _without_docstring(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def changed(old: str | None, new: str | None) -> list[str]:
    """Names of parts that differ, with + and - for those that are in one alone."""
    if old is None or new is None:
        return ["(the file)" if old == new else "+ (the file)" if old is None else "- (the file)"]
    before, after = parts_of(old), parts_of(new)
    marks = {name: "+ " if name not in before else "- " if name not in after else "" for name in before | after}
    return [f"{mark}{name}" for name, mark in marks.items() if before.get(name) != after.get(name)]


def resting(engine: str, *sources: Source) -> dict[str, list[tuple[str, bool]]]:
    """File -> names of the rules that cite it, and of the architectures whose class it has; whether tests ask the engine itself."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for table, of in ((ENGINES, ""), (DRAFTS, " of drafts")):
        for name, rule in table[engine].RULES.items():
            file = rule.source.rpartition(" ")[2].removeprefix(f"{engine}/")
            found.setdefault(f"{engine}/{file}", []).append((f"{name}{of}", rule.seen))
    for file in sorted({file for source in sources for file in source.names if file.startswith(MODELS[engine])}):
        texts = "\n".join(source.text(file) or "" for source in sources)
        defined = re.findall(r'^class (\w+)|register_auto_model\("(\w+)"\)', texts, re.MULTILINE)
        for name in sorted({one or other for one, other in defined} & ARCHITECTURES.keys()):
            found.setdefault(file, []).append((name, bool(ENGINES[engine].SEEN_IN)))
    return found


def report(engine: str, old: Path, new: Path) -> tuple[list[str], int]:
    """Lines about each file that changed, and how many did."""
    before, after = Source(old, engine), Source(new, engine)
    lines, again, count = [], {True: set(), False: set()}, 0
    files = resting(engine, before, after)
    for file, rules in files.items():
        parts = changed(before.text(file), after.text(file))
        if not parts:
            continue
        count += 1
        lines += [file, f"    rules: {', '.join(name for name, _ in rules)}", *(f"        {part}" for part in parts)]
        for name, seen in rules:
            again[seen].add(name)
    lines.append(f"{count} of {len(files)} files changed")
    if again[True]:
        lines.append(f"tests/engines asks the new release: {', '.join(sorted(again[True]))}")
    if again[False]:
        lines.append(f"to be read again, as no test asks: {', '.join(sorted(again[False]))}")
    return lines, count


def main(given: list[str] | None = None) -> int:
    """Print the report; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("old", type=Path, help="a wheel, or a folder that holds the package")
    parser.add_argument("new", type=Path, help="the same of the new release")
    flags = parser.parse_args(given)
    try:
        lines, count = report(flags.engine, flags.old, flags.new)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
