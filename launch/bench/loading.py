"""`load`: how long weights take from safetensors files to a device, beside `safetensors` alone reading the same files to it.

    python launch/benchmark.py load [--shape 8b] [--layers 8]

A model with made-up weights is exported in bfloat16. Then a model is filled from these files, and they are read by
`safetensors.torch.load_file` to the same device, in turns. The files stay in the page cache: no disk is measured.
"""

import argparse
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

from megatron_export.common.optional import part
from megatron_export.common.text import readable

from .exporting import add_model, model_for
from .measuring import delete, markdown, timed


def add_load(parser: argparse.ArgumentParser) -> None:
    """The flags of `load`."""
    parser.set_defaults(run=load)
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    parser.add_argument("--repeat", type=int, default=3, help="of which the median is shown; default: 3")
    parser.add_argument("--output", type=Path, default=Path("export/benchmark"), help="folder to write in and clear")
    add_model(parser)


def load(flags: argparse.Namespace) -> None:
    """Show the medians and their ratio."""
    from megatron_export import export_hf_checkpoint

    parallel_state, load_hf = part("mcore.parallel_state"), part("mcore.load_hf")
    out = flags.output.resolve() / "run"
    with model_for(flags, ["bf16"]) as (model, source, [case]):
        delete(out)
        nbytes = export_hf_checkpoint(model, out, hf_model=source, format="bf16", sync=False).plan.nbytes
        with parallel_state.current() as here:
            ours = partial(_waited, here.device, partial(load_hf.load_hf_weights, model, out, case.config, here))
            theirs = partial(_waited, here.device, partial(_load_files, out, here.device))
            ours(), theirs()
            times = [(timed(ours), timed(theirs)) for _ in range(flags.repeat)]
        delete(out)
    mine, other = (median(one) for one in zip(*times, strict=True))
    row = [
        case.model,
        readable(nbytes),
        f"{mine:.2f}",
        f"{other:.2f}",
        f"{nbytes / mine / 1e9:.2f}",
        f"{other / mine:.2f}",
    ]
    print("\n".join(markdown(["model", "bytes", "seconds", "safetensors", "GB/s", "speed against safetensors"], [row])))


def _waited(device: torch.device, work: partial) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _load_files(folder: Path, device: torch.device) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        load_file(path, device=str(device))
