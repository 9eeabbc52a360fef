"""`megatron-export COMMAND`: a table of subcommands, each a module with

DESCRIPTION     what --help says first
add_flags, run  a parser gets its flags; these are carried out, which returns the exit status
ON_ERROR        the exit status where `run` raises `ExportError`
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path

from ..common.errors import ExportError, message_of
from ..common.later import import_now
from . import terminal
from .flags import Parser, Say

COMMANDS = {
    "export": "write a Megatron-Core model as a quantized HuggingFace checkpoint",
    "plan": "what an export would write and take, from config.json alone",
    "check": "which engines load a checkpoint, whoever wrote it",
    "verify": "judge a checkpoint against the model that it was made from",
    "diff": "what differs between two checkpoints",
}
NAMES_ALONE = ("plan", "check")  # what they look at: they need no tensors, and do not wait until torch is imported


def main(say: Say, arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit status. `say` is `print`."""
    say = terminal.cleaned(say)
    terminal.clean_logs()
    given = sys.argv[1:] if arguments is None else arguments
    chosen = given[0] if given and given[0] in COMMANDS else None
    if chosen and chosen not in NAMES_ALONE:
        import_now("torch")
    module = import_module(f".{chosen}_command", __package__) if chosen else None  # others may take seconds
    started = Path(sys.argv[0]).name  # as what: the console script, or python -m
    parser = Parser(prog=started if started == "megatron-export" else "python -m megatron_export")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        one = commands.add_parser(name, help=about, description=module.DESCRIPTION if name == chosen else about)
        if name == chosen:
            module.add_flags(one)
            asked = one
    flags = parser.parse_args(given)
    warnings.filterwarnings("ignore")  # torch, transformers and Megatron name every optional package they miss
    try:
        return module.run(say, asked, flags)
    except (ExportError, OSError) as error:
        say(f"error: {message_of(error)}", file=sys.stderr, flush=True)
        return module.ON_ERROR
