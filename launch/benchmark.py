"""Measures this package; `--help` lists the subcommands, and that of each says what it needs."""

import argparse
import os
import sys
import warnings

from bench.encoding import add_encode
from bench.exporting import add_export, add_scale
from bench.loading import add_load
from bench.peering import add_peer
from bench.quality import add_quality
from bench.searching import add_search
from bench.serving import add_serve
from bench.tracing import add_trace
from bench.verifying import add_verify

from megatron_export.common.errors import ExportError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 refused or failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_quality(commands.add_parser("quality", help="perplexity, divergence and size of checkpoints, as a table"))
    add_encode(commands.add_parser("encode", help="the speed of each format against a copy's, as a table"))
    add_export(commands.add_parser("export", help="seconds, bytes and memory of exports, beside save_file"))
    add_load(commands.add_parser("load", help="seconds from safetensors files to a device, beside safetensors alone"))
    add_peer(commands.add_parser("peer", help="exports beside those of NVIDIA ModelOpt, where it is installed"))
    add_search(commands.add_parser("search", help="the search of an AWQ format, beside that of ModelOpt"))
    add_verify(commands.add_parser("verify", help="the command verify, beside one CPU thread of it, as a table"))
    add_scale(commands.add_parser("scale", help="the same against the number of layers, as a table and a plot"))
    add_serve(
        commands.add_parser(
            "serve", help="checkpoints in a real vLLM or SGLang, beside what check says and decode gives"
        )
    )
    add_trace(commands.add_parser("trace", help="where the time of one export goes, by thread and kind of work"))
    flags = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")  # Megatron and torch name every optional package they miss
    try:
        flags.run(flags)
    except ExportError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
