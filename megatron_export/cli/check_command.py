"""`megatron-export check`: which engines load a folder, whoever wrote it."""

import argparse
import json
from pathlib import Path

from ..common.text import clean
from ..engines import ENGINES, GPUS, release_of
from .flags import Say

DESCRIPTION = "Which engines load a checkpoint: from its configs and the headers of its files alone, without an engine."


ON_ERROR = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", help="folder with config.json and .safetensors files")
    parser.add_argument(
        "--with", dest="base", metavar="BASE", type=Path, help="of a draft: folder of the model it is for"
    )
    parser.add_argument("--engine", choices=ENGINES, help="one engine (default: all)")
    parser.add_argument("--version", help="release of --engine (default: the one that its rules were read in)")
    parser.add_argument("--gpu", choices=GPUS, help="the GPU that it is to run on (default: any)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that are to share each layer (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--rules", action="store_true", help="print every rule and its source instead")


def run(say: Say, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> int:
    """The exit status: 0 all engines that were asked for load it, 1 not, 2 bad usage."""
    if flags.version and not flags.engine:
        parser.error("--version needs --engine")
    if flags.version and not release_of(flags.version):
        parser.error(f"--version: {flags.version!r} is no release: it has no number")
    if flags.tp < 1:
        parser.error(f"--tp: {flags.tp} is no number of GPUs")
    if bool(flags.rules) == bool(flags.folder):
        parser.error("give a folder, or --rules")
    if flags.base and not flags.folder:
        parser.error("--with needs the folder of a draft")
    from ..planning import engine_check

    if flags.rules:
        say("\n".join(engine_check.rules()), flush=True)
        return 0
    checkpoint = engine_check.of_folder(flags.folder)
    base = engine_check.base_of(checkpoint, flags.base) if flags.base else None
    engines = [flags.engine] if flags.engine else ()
    found = engine_check.verdicts(checkpoint, engines, flags.version, flags.gpu, flags.tp, base)
    if flags.json:
        say(json.dumps(engine_check.as_json(found), indent=2), flush=True)
    else:
        say("\n".join(clean(line, kept="") for line in engine_check.lines(found)), flush=True)
    return 0 if all(verdict.loads for verdict in found.values()) else 1
