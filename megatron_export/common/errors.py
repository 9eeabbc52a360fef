"""The exceptions that users see: they say what is wrong, where, and what to do."""

import traceback
from pathlib import Path


class ExportError(Exception):
    """A model, checkpoint, setting or machine that cannot be exported as asked. Nothing was published.

    `everywhere`: every rank raises it, with the same message.
    """

    everywhere = False


class StartError(ExportError):
    """A machine cannot take part; found before the ranks could speak to each other. The machine's first rank prints it."""


class Interrupted(ExportError):
    """A signal asked the process to stop: "stopped by SIGTERM". What is complete is kept, for a run with --resume."""

    @property
    def signal(self) -> str:
        """The signal's name."""
        return str(self).rpartition(" ")[2]


class RankLost(ExportError):
    """Another rank failed alone, or is gone. No collective may be called any more."""


def message_of(failure: Exception) -> str:
    """The message of an exception; of one that is no `ExportError`, also its type, and the file and line that raised it."""
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
