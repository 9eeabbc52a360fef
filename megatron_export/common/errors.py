"""The exceptions that users see: they say what is wrong, where, and what to do."""

import resource
import traceback
from pathlib import Path

from .text import clean

_PACKAGE = Path(__file__).parents[1]
NO_CUDA = "--device cuda: torch sees no CUDA device here. Use --device cpu, or check the driver"


class ExportError(Exception):
    """A model, checkpoint, setting or machine that cannot be exported as asked. Nothing was published.

    `everywhere`: every rank raises it, with the same message.
    """

    everywhere = False

    def __str__(self) -> str:
        """The message, which may quote a file, without what steers a terminal."""
        return clean(super().__str__())


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


def no_more_files(failure: Exception) -> str:
    """What to do where the system gave this process no more files, or sockets, to open; "" for another failure."""
    if "Too many open files" not in str(failure):
        return ""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may have {limit} files open, and needs more. Allow them: ulimit -n 4096"


def message_of(failure: Exception) -> str:
    """The message of an exception; of one that is no `ExportError`, also its type, and the file and line that raised it. An
    assertion of this package is called what it is.
    """
    if isinstance(failure, ExportError):
        return str(failure)
    if told := no_more_files(failure):
        return told
    last = traceback.extract_tb(failure.__traceback__)[-1]
    place = f"{Path(last.filename).name}, line {last.lineno}"
    if isinstance(failure, AssertionError) and Path(last.filename).is_relative_to(_PACKAGE):
        return clean(
            f"{failure} ({place}). This is a mistake of megatron_export, and not of your model: please report it"
        )
    return clean(f"{type(failure).__name__}: {failure} ({place})")


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
