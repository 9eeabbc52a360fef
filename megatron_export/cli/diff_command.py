"""`megatron-export diff`: what differs between two checkpoints."""

import argparse
import json
from pathlib import Path

from . import terminal
from .flags import Say

DESCRIPTION = "what differs between two checkpoints"
ON_ERROR = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="A", type=Path)
    parser.add_argument("other", metavar="B", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(say: Say, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> int:
    """The exit status: 0 the same, 1 they differ, 2 bad usage, or they could not be compared."""
    from ..verify import diff

    found = diff.differences(flags.one, flags.other, terminal.bar)
    if flags.json:
        say(json.dumps(diff.as_json(found), indent=2), flush=True)
        return int(found.any)
    if lines := diff.lines(found):
        say(terminal.grid(diff.HEADS, lines, "furthest apart"), flush=True)
    say(terminal.rows(diff.rows(found, flags.one, flags.other), "diff"), flush=True)
    return int(found.any)
