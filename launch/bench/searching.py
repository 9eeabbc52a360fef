"""`search`: how long the search of an AWQ format takes, beside that of NVIDIA ModelOpt in the same run, where it is installed.

    python launch/benchmark.py search [--shape 8b | --hf-model DIR] [--format int4_awq] [--samples 128] [--tokens 512]

One process, TP=1, the same weights, random tokens and batches. Both sides do all that it takes to know the scales of the format, in
two passes. ModelOpt changes the model that it quantizes, so it comes second, and each runs once.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.common.optional import part
from megatron_export.common.text import readable

from .exporting import add_model
from .measuring import alone, markdown, peaks_of, timed
from .peering import modelopt, run_on
from .shapes import build, config_of

CONFIGS = {"int4_awq": "INT4_AWQ_CFG", "nvfp4_awq": "NVFP4_AWQ_LITE_CFG"}
COLUMNS = ("tool", "seconds", "tokens/s", "GPU above the model")


def add_search(parser: argparse.ArgumentParser) -> None:
    """The flags of `search`."""
    parser.set_defaults(run=search)
    parser.add_argument("--format", choices=CONFIGS, default="int4_awq", help="default: int4_awq")
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    parser.add_argument("--samples", type=int, default=128, help="default: 128")
    parser.add_argument("--tokens", type=int, default=512, help="of each sample; default: 512")
    parser.add_argument("--batch", type=int, default=8, help="samples that pass at a time; default: 8")
    parser.add_argument("--alone", action="store_true", help="without ModelOpt")
    add_model(parser)


def search(flags: argparse.Namespace) -> None:
    """Time both, one after the other, on one model."""
    from megatron_export import calibrate

    parallel_state = part("mcore.parallel_state")

    if min(flags.samples, flags.tokens, flags.batch) < 1:
        raise ExportError("--samples, --tokens and --batch must be at least 1")
    if flags.format == "nvfp4_awq" and flags.device == "cpu" and not flags.alone:
        raise ExportError("ModelOpt quantizes to NVFP4 on a GPU only. Add --alone, or use --format int4_awq")
    quantization = None if flags.alone else modelopt()[0]
    alone()
    config = config_of(flags.shape, flags.hf_model, flags.layers)
    shape = flags.samples, flags.tokens
    tokens = torch.randint(config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    batches = tokens.split(flags.batch)
    with parallel_state.started(1, 1, flags.device):
        with parallel_state.current() as here:
            model = build("megatron", config, here, flags.tokens)
        ours = partial(calibrate, model, batches, format=flags.format)
        rows = [_row("megatron_export", ours, tokens.numel(), here.device)]
        print(f"{rows[0]['tool']}: {rows[0]['seconds']:.1f} s", flush=True)  # whatever becomes of the other
        if quantization:
            theirs = partial(_quantized, quantization, model, CONFIGS[flags.format], batches, here.device)
            rows.append(_row("ModelOpt", theirs, tokens.numel(), here.device))
    cells = ((row["tool"], f"{row['seconds']:.1f}", f"{row['tokens/s']:,.0f}", readable(row["gpu"])) for row in rows)
    print("\n".join(markdown(COLUMNS, cells)), flush=True)
    if flags.json:
        said = {name: getattr(flags, name) for name in ("shape", "format", "layers", "samples", "tokens", "batch")}
        flags.json.write_text(json.dumps(said | {"rows": rows}, indent=1) + "\n")


def _quantized(quantization: Any, model: Any, name: str, batches: tuple[Tensor, ...], device: torch.device) -> None:
    from megatron_export.mcore.cpu_compat import without_cuda

    with without_cuda(device), torch.no_grad():
        quantization.quantize(model, getattr(quantization, name), lambda model: [run_on(model, ids) for ids in batches])


def _row(tool: str, work: Callable[[], object], tokens: int, device: torch.device) -> dict:
    seconds: list[float] = []
    gpu, _ = peaks_of(lambda: seconds.append(timed(work)), device)
    return {"tool": tool, "seconds": seconds[0], "tokens/s": tokens / seconds[0], "gpu": gpu}
