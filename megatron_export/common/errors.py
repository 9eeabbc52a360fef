"""The exceptions that users see: they say what is wrong, where, and what to do."""

import traceback
from pathlib import Path


class ExportError(Exception):
    """A model, checkpoint, setting or machine that cannot be exported as asked. Nothing was published.

    `everywhere`: every rank raises it, with the same message.
    """

    everywhere = False


class StartError(ExportError):
    """What one machine found before the ranks could speak to one another: the first rank of that machine tells it."""


class Interrupted(ExportError):
    """The machine asked the process to stop. What is complete is kept, for a run with --resume."""


class RankLost(ExportError):
    """Another rank failed alone, or is gone. No collective may be called any more."""


def message_of(failure: Exception) -> str:
    """An exception as one line: what was not meant for users with its type, and where in the code it came from."""
    if isinstance(failure, ExportError):
        return str(failure)
    last = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__}: {failure} ({Path(last.filename).name}, line {last.lineno})"


def report(problems: list[str]) -> None:
    """Raise one `ExportError` that lists every problem; return when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ExportError(problems[0])
    shown = [f"  - {problem}" for problem in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"  ... and {len(problems) - len(shown)} more")
    raise ExportError("\n".join([f"{len(problems)} problems:", *shown]))
