"""Which rules to look at again when an engine has a new release: what changed in the sources that they cite, between two wheels.

    pip download --no-deps vllm==0.32.0 vllm==0.33.0  (each by itself)
    python -m tests.engines.changed_sources vllm OLD.whl NEW.whl

A wheel may also be a folder that holds the package, such as site-packages. Code is compared, not text: comments, docstrings and
layout do not count. For each file: the rules that cite it, and the functions, classes and statements that changed.
"""

import argparse
import ast
import zipfile
from pathlib import Path

from megatron_export.engines import ENGINES

PACKAGES = {"vllm": "vllm", "sglang": "sglang", "tensorrt_llm": "tensorrt_llm"}


def source(wheel: Path, file: str) -> str | None:
    """A file of a wheel, or of a folder; None if it is not there."""
    if wheel.is_dir():
        return (wheel / file).read_text() if (wheel / file).exists() else None
    with zipfile.ZipFile(wheel) as held:
        return held.read(file).decode() if file in held.namelist() else None


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


def report(engine: str, old: Path, new: Path) -> list[str]:
    """A line for each cited file that changed, with its rules, and one for each part; files that did not change are counted."""
    module, root = ENGINES[engine], PACKAGES[engine]
    cited: dict[str, list[str]] = {}
    for name, rule in module.RULES.items():
        cited.setdefault(rule.source.rpartition(" ")[2].removeprefix(f"{root}/"), []).append(name)
    lines, same = [], 0
    for file, rules in cited.items():
        inside = f"{root}/{file}"
        if parts := changed(source(old, inside), source(new, inside)):
            lines += [f"{file}: {', '.join(rules)}", *(f"    {part}" for part in parts)]
        else:
            same += 1
    return [*lines, f"{same} of {len(cited)} files that rules cite did not change"]


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args()
    print("\n".join(report(given.engine, given.old, given.new)))


if __name__ == "__main__":
    main()
