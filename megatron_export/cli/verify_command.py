"""`megatron-export verify`: a finished checkpoint against the model that it was made from."""

import argparse
import json
import sys
from pathlib import Path

from ..common.errors import NO_CUDA, ExportError
from . import hub, terminal
from .config import check_thresholds
from .flags import Say

DESCRIPTION = "judge a checkpoint against the model that it was made from"
ON_ERROR = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
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


def run(say: Say, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> int:
    """The exit status: 0 fine, 1 failed, 2 bad usage, or it could not be judged."""
    _check(parser, flags)
    import torch

    from ..checkpoint import hf_folder
    from ..verify import thresholds
    from ..verify.folder import tensor_files
    from ..verify.report import write
    from ..writing.manifest import origin_of

    tensor_files(flags.folder)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ExportError(NO_CUDA)
    if flags.push_to_hub:
        hub.check(flags.push_to_hub)
    named = flags.reference or origin_of(flags.folder)
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


def _check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Bad usage where flags have no effect, or mean nothing."""
    for flag, given in (("--max-ppl-ratio", flags.max_ppl_ratio), ("--windows", flags.windows)):
        if given is not None and flags.text is None:
            parser.error(f"{flag} needs --text")
    if flags.windows is not None and flags.windows < 2:
        parser.error(f"--windows must be at least 2, for a standard error, not {flags.windows}")
    try:
        check_thresholds(flags.min_snr, flags.max_ppl_ratio)
        if flags.push_to_hub is not None:
            hub.check_name(flags.push_to_hub)
    except ValueError as error:
        parser.error(str(error))
