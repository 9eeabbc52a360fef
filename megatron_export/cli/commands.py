"""The commands that need no ranks: `python -m megatron_export COMMAND`. A command is one entry of a table."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from ..common.errors import ExportError
from . import check_command, export_command, terminal

Say = Callable[..., None]
Command = Callable[[Say, list[str]], int]


def verify(say: Say, arguments: list[str]) -> int:
    """Judge a checkpoint against its original; returns the exit status: 0 fine, 1 failed, 2 bad usage."""
    parser = _parser("verify")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the checkpoint")
    parser.add_argument("--reference", metavar="PATH_OR_ID", help="its original (default: what its manifest names)")
    parser.add_argument("--text", type=Path, help="also measure perplexity and KL against the reference on this text")
    parser.add_argument("--windows", type=int, help="how many windows of 512 tokens of it (default: all there are)")
    parser.add_argument(
        "--min-snr", type=float, metavar="DB", help="least signal-to-noise of a weight (default: by format)"
    )
    parser.add_argument("--max-ppl-ratio", type=float, help="largest perplexity over the reference's; needs --text")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--report", action="store_true", help="write report.html and README.md into DIR")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload DIR if nothing is wrong; a new REPO is private")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_args(arguments)
    if flags.max_ppl_ratio is not None and flags.text is None:
        parser.error("--max-ppl-ratio needs --text")
    return _done(say, parser, lambda: _verify(say, flags))


def _verify(say: Say, flags: argparse.Namespace) -> int:
    import torch

    from ..checkpoint import hf_folder
    from ..verify import thresholds
    from ..verify.report import write
    from ..writing.manifest import origin_of
    from . import hub

    named = flags.reference or origin_of(flags.folder)
    if named is None:
        raise ExportError(f"{flags.folder} does not say what it was made from. Give --reference PATH_OR_ID")
    reference = hf_folder.find_model(named, weights=True)
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = thresholds.Wanted(flags.min_snr, flags.max_ppl_ratio, flags.text, flags.windows, device)
    found = thresholds.inspected(flags.folder.resolve(), reference, wanted, terminal.bar)
    if flags.report:
        write.present(found, named, flags.push_to_hub)
    if flags.json:
        say(json.dumps(thresholds.as_json(found), indent=2), flush=True)
    else:
        say(terminal.grid(thresholds.HEADS, thresholds.worst_lines(found), "worst weights"), flush=True)
        say(terminal.rows(thresholds.rows(found), "verify"), flush=True)
    if found.problems or not flags.push_to_hub:
        return int(bool(found.problems))
    try:
        say(terminal.rows([("pushed", hub.push(flags.folder.resolve(), flags.push_to_hub))]), flush=True)
    except ExportError as error:
        say(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def diff(say: Say, arguments: list[str]) -> int:
    """Tell what differs between two checkpoints; returns the exit status: 0 the same, 1 they differ, 2 bad usage."""
    parser = _parser("diff")
    parser.add_argument("one", metavar="A", type=Path)
    parser.add_argument("other", metavar="B", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    flags = parser.parse_args(arguments)
    return _done(say, parser, lambda: _diff(say, flags))


def _diff(say: Say, flags: argparse.Namespace) -> int:
    from ..verify import diff

    found = diff.differences(flags.one, flags.other, terminal.bar)
    if flags.json:
        say(json.dumps(diff.as_json(found), indent=2), flush=True)
        return int(found.any)
    if lines := diff.lines(found):
        say(terminal.grid(diff.HEADS, lines, "furthest apart"), flush=True)
    say(terminal.rows(diff.rows(found, flags.one, flags.other), "diff"), flush=True)
    return int(found.any)


# name -> what it is about, what runs it with (say, all arguments)
COMMANDS: dict[str, tuple[str, Command]] = {
    "plan": (
        "what an export would write and take, from config.json alone",
        lambda say, rest: export_command.plan(say, ["plan", *rest]),
    ),
    "check": ("which engines load a checkpoint, whoever wrote it", check_command.check),
    "verify": ("judge a checkpoint against the model that it was made from", verify),
    "diff": ("what differs between two checkpoints", diff),
}


def main(say: Say, arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit status. `say` is `print`."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        warnings.filterwarnings("ignore")  # torch and transformers name every optional package they miss
        return COMMANDS[given[0]][1](say, given[1:])
    parser = argparse.ArgumentParser(prog="python -m megatron_export", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (about, _) in COMMANDS.items():
        commands.add_parser(name, help=about)
    parser.parse_args(given)
    raise AssertionError("argparse leaves by itself")


def _parser(name: str) -> argparse.ArgumentParser:
    about = COMMANDS[name][0]
    return argparse.ArgumentParser(prog=f"python -m megatron_export {name}", description=about, allow_abbrev=False)


def _done(say: Say, parser: argparse.ArgumentParser, run: Callable[[], int]) -> int:
    """The status of `run`; 2, with the reason, where it could not be done as it was asked for."""
    try:
        return run()
    except ExportError as error:
        say(f"error: {error}", file=sys.stderr, flush=True)
        return 2
