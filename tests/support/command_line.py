"""The commands in this process, without ranks, and a Python beside it."""

import os
import subprocess
import sys
from collections.abc import Callable

from megatron_export.cli import commands


def said_by(main: Callable[..., int], *flags: object) -> tuple[int, str]:
    """The exit status of a command with these flags, and all that it said."""
    said: list[str] = []
    try:
        status = main(lambda *words, **_: said.append(" ".join(map(str, words))), list(map(str, flags)))
    except SystemExit as exit:
        status = exit.code
    return status, "\n".join(said)


def command_line(*flags: object) -> tuple[int, str]:
    """The same of `python -m megatron_export`."""
    return said_by(commands.main, *flags)


def python(*words: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """What comes of a Python of its own with these words, on one thread and nobody's rank unless `environment` says otherwise."""
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    given = {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()}
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=outside | given, timeout=600)
