"""What is shown: with rich at a terminal; as plain lines in log files, pipes, with NO_COLOR and on dumb terminals.

The plain form of rows is `name  value`, the name in 16 columns; other programs read it. Names and values come from files of
strangers: all that is shown passes `clean` once, on its way out, but for what rich draws of cells that passed it before.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from operator import length_hint
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ..common.text import clean

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

CLOSED = 141  # the exit status that a shell has for what SIGPIPE ended
EVERY = 30  # seconds between the lines of a stage in a log file
PLACE = 16  # columns of a row's name


class Drawn(str):
    """What rich drew: the letters in it that steer a terminal are rich's."""


def cleaned(say: Callable[..., None]) -> Callable[..., None]:
    """`say`, of which nothing reaches a terminal that steers it."""

    def said(*words: object, **settings: Any) -> None:
        with heard():
            say(*(word if isinstance(word, Drawn) else clean(str(word)) for word in words), **settings)

    return said


@contextmanager
def heard() -> Iterator[None]:
    """Where something is printed: if what reads it has closed the pipe, the process ends, as SIGPIPE ends others."""
    try:
        yield
    except BrokenPipeError:
        _leave()


def _leave() -> NoReturn:
    """Without a word; what is left in buffers goes nowhere, or Python would speak of it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for standard in (1, 2):
        os.dup2(nowhere, standard)
    raise SystemExit(CLOSED)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return clean(super().getMessage())


def clean_logs() -> None:
    """The same for what libraries log, in this process."""
    logging.setLogRecordFactory(_Record)


def pretty(stream: TextIO | None = None) -> bool:
    """Whether a person looks at `stream` (stdout), on a terminal that can show more than text."""
    stream = stream or sys.stdout
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return stream.isatty() and not dumb and not os.environ.get("NO_COLOR")


def rows(pairs: Iterable[tuple[str, str]], title: str = "") -> str:
    """Names and values, one a line."""
    if not pretty():
        margin = "\n" + " " * (PLACE + 2)  # a line that a file begins must not look like a row
        return "\n".join(f"{name:<{PLACE}}  {value}".replace("\n", margin) for name, value in pairs)
    from rich.text import Text

    table = _table("ROUNDED", title, show_header=False, border_style="dim")
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(clean(value), style=_style(name, value)))
    return _drawn(table)


def grid(heads: Sequence[str], lines: Iterable[Sequence[str]], title: str = "") -> str:
    """A table with heads; all columns but the first to the right."""
    lines = [[clean(cell, kept="") for cell in line] for line in lines]
    if not pretty():
        columns = []
        for n, column in enumerate(zip(heads, *lines, strict=True)):
            width = max(map(len, column))
            columns.append([cell.rjust(width) if n else cell.ljust(width) for cell in column])
        return "\n".join("  ".join(line) for line in zip(*columns, strict=True))
    from rich.text import Text

    table = _table("SIMPLE_HEAD", title, header_style="bold")
    for n, head in enumerate(heads):
        table.add_column(head, justify="right" if n else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))  # brackets in a name are no markup
    return _drawn(table)


def _table(box: str, title: str, **style: Any) -> "Table":
    from rich import box as boxes
    from rich.table import Table

    return Table(box=getattr(boxes, box), title=title or None, title_justify="left", title_style="bold", **style)


def bar(stage: str, steps: Iterable) -> Iterator:
    """Passes the steps of a stage on, and shows on stderr how far it is."""
    from rich.console import Console

    console = Console(stderr=True)
    console.on_broken_pipe = _leave
    if not pretty(sys.stderr):
        yield from _told(console, stage, steps)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:>9}", style="bold cyan"),
        progress.BarColumn(30, complete_style="cyan", finished_style="green"),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console) as shown:
        yield from shown.track(steps, description=stage)


def _told(console: "Console", stage: str, steps: Iterable) -> Iterator:
    """In lines, one for every half minute, and one at the end."""
    total, done = length_hint(steps), 0
    started = said = time.monotonic()

    def tell() -> None:
        seconds = int(time.monotonic() - started)
        line = f"{stage:>9} {done}/{total or done} {seconds // 60:02}:{seconds % 60:02}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    for step in steps:
        yield step
        done += 1
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            tell()
    if total or done:
        tell()


def _style(name: str, value: str) -> str:
    if name == "problem" or value.startswith(("no:", "refused")):
        return "red"
    if value.startswith("loads") or name == "sound":
        return "green"
    return "yellow" if name in ("note", "left alone") else ""


def _drawn(shown: "RenderableType") -> str:
    """What rich makes of something, as text with colours."""
    from rich.console import Console

    text = StringIO()
    width = min(shutil.get_terminal_size((100, 24)).columns, 140)
    Console(file=text, force_terminal=True, width=width).print(shown)
    return Drawn(text.getvalue().rstrip("\n"))
