"""The commands of `python -m megatron_export`: name -> what runs it."""

import sys
from collections.abc import Callable

from . import check_command, cli

COMMANDS: dict[str, Callable[[Callable[..., None], list[str]], int]] = {
    "plan": lambda say, arguments: cli.plan(say, ["plan", *arguments]),
    "check": check_command.check,
}


def run(say: Callable[..., None], arguments: list[str]) -> int:
    """Run the command that the first argument names; returns its exit status, 2 for bad usage. `say` is `print`."""
    if not arguments or arguments[0] not in COMMANDS:
        asked = arguments[:1] in (["-h"], ["--help"])
        usage = f"usage: python -m megatron_export COMMAND ...\nCOMMAND: {', '.join(COMMANDS)}; each has --help"
        say(usage, file=sys.stdout if asked else sys.stderr, flush=True)
        return 0 if asked else 2
    return COMMANDS[arguments[0]](say, arguments[1:])
