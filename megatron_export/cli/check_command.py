"""`python -m megatron_export check`: which engines load a folder, whoever wrote it."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ..common.errors import ExportError
from ..engines import ENGINES, GPUS


def check(say: Callable[..., None], arguments: list[str]) -> int:
    """Run the command; returns its exit status: 0 all engines that were asked for load it, 1 not, 2 bad usage. `say` is `print`."""
    about = "Which engines load a checkpoint: from its configs and the headers of its files alone, without an engine."
    parser = argparse.ArgumentParser(prog="python -m megatron_export check", description=about, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?", help="folder with config.json and .safetensors files")
    parser.add_argument("--engine", choices=ENGINES, help="one engine (default: all)")
    parser.add_argument("--version", help="release of --engine (default: the one that its rules were read in)")
    parser.add_argument("--gpu", choices=GPUS, help="the GPU that it is to run on (default: any)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that are to share each layer (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--rules", action="store_true", help="print every rule and its source instead")
    asked = parser.parse_args(arguments)
    if asked.version and not asked.engine:
        parser.error("--version needs --engine")
    if asked.tp < 1:
        parser.error(f"--tp: {asked.tp} is no number of GPUs")
    if bool(asked.rules) == bool(asked.folder):
        parser.error("give a folder, or --rules")
    from ..planning import engine_check

    if asked.rules:
        say("\n".join(engine_check.rules()), flush=True)
        return 0
    try:
        checkpoint = engine_check.of_folder(asked.folder)
    except ExportError as error:
        say(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    found = engine_check.verdicts(
        checkpoint, [asked.engine] if asked.engine else (), asked.version, asked.gpu, asked.tp
    )
    shown = [json.dumps(engine_check.as_json(found), indent=2)] if asked.json else engine_check.lines(found)
    say("\n".join(shown), flush=True)
    return 0 if all(verdict.loads for verdict in found.values()) else 1
