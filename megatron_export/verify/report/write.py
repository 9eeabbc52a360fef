"""report.html and README.md, beside the weights. Engines read neither; the manifest lists neither, as both name its sha256."""

from pathlib import Path

from ...common.errors import ExportError
from ...common.safe_files import MOST_BYTES
from ..thresholds import Inspection
from .facts import account_of

FILES = ("report.html", "README.md")
MARK = "megatron_export"  # is in both


def present(found: Inspection, origin: str, name: str | None = None) -> None:
    """Write both into the folder that was inspected; `origin` is what it was made from, `name` what it will be called."""
    from . import html, model_card  # they import jinja2, which nothing else needs

    if found.judged.plan is None:
        raise ExportError(f"no report of {found.judged.folder}: {found.problems[-1]}")
    folder = found.judged.folder
    for path in (folder / file for file in FILES):
        if path.is_file() and not _is_ours(path):
            raise ExportError(f"{path} is there already, and not from here. Move it away, or leave --report out")
    run = account_of(found, origin, name)
    for file, text in zip(FILES, (html.page(run), model_card.text(run)), strict=True):
        (folder / file).write_text(text, encoding="utf-8")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(MOST_BYTES)
