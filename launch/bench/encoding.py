"""`benchmark.py encode`: how near encoding comes to the speed of memory, for each format, against a copy in the same run.

    python launch/benchmark.py encode [--shape OUT IN] [--formats FORMAT ...] [--device cpu] [--json FILE]

Bytes are those of the bfloat16 weight and of all encoded tensors, each once. On a GPU, plain torch and the kernels are timed.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from megatron_export import formats
from megatron_export.common.errors import ExportError
from megatron_export.common.piece import Amax, Axis, join
from megatron_export.common.strips import row_strips
from megatron_export.formats import FORMATS, Form, Options, chosen
from megatron_export.formats.cuda_kernels import kernel_of

from .measuring import add_device, markdown

IN_TURN = 4  # weights, so that none is in a cache when it is read again
WARM_UP = 5
AHEAD = 100  # copies that keep the GPU busy until all that is to be timed has been asked for
COLUMNS = ("format", "path", "GB/s", "of a copy", "ms")


def add_encode(parser: argparse.ArgumentParser) -> None:
    """The flags of `encode`."""
    parser.set_defaults(run=encode)
    parser.add_argument("--shape", nargs=2, type=int, default=(14336, 4096), metavar=("OUT", "IN"), help="14336 4096")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS][1:], help="default: all but bf16")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median counts; default: 20")
    add_device(parser)
    parser.add_argument("--json", type=Path, help="write the table there too")


def encode(flags: argparse.Namespace) -> None:
    """Time a copy, then each format; print the table."""
    device = torch.device(flags.device)
    rows, columns = flags.shape
    generator = torch.Generator(device).manual_seed(0)
    drawn = (torch.randn(rows, columns, generator=generator, device=device) for _ in range(IN_TURN))
    weights = [(numbers * 0.02).to(torch.bfloat16) for numbers in drawn]
    targets = [torch.empty_like(weight) for weight in weights]
    seconds = timed(lambda turn: targets[turn].copy_(weights[turn]), weights, flags.repeats)
    copied = 2 * weights[0].nbytes
    found = [row("copy", "", copied, seconds, copied / seconds)]
    for label, form in forms(flags.formats).items():
        if not form.ragged and (rows % form.tile[0] or columns % form.tile[1]):
            raise ExportError(f"--shape {rows} {columns}: {label} needs multiples of {form.tile[0]} and {form.tile[1]}")
        amaxes = [Amax(weight.abs().amax().float(), torch.ones((), device=device)) for weight in weights]
        size = weights[0].nbytes + sum(piece.data.nbytes for piece in plain(form, weights[0], amaxes[0]).values())
        paths: dict[str, Callable] = {"plain": plain}
        if kernel_of(form, weights[0], amaxes[0]):
            paths["kernel"] = formats.encode
        for path, run in paths.items():
            calls = [partial(run, form, *pair) for pair in zip(weights, amaxes, strict=True)]
            seconds = timed(lambda turn, calls=calls: calls[turn](), weights, flags.repeats)
            found.append(row(label, path, size, seconds, copied / found[0]["seconds"]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{rows} x {columns} on {name}, torch {torch.__version__}\n\n" + "\n".join(table(found)), flush=True)
    if flags.json:
        about = {"device": name, "torch": torch.__version__, "shape": [rows, columns], "repeats": flags.repeats}
        flags.json.write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")


def forms(names: list[str]) -> dict[str, Form]:
    """The formats by what the table calls them, those with groups in both sizes, and nvfp4 with all scales."""
    found = {}
    for name in names:
        found[name] = chosen(name)
        if "group_size" in FORMATS[name].OPTIONS:
            found[f"{name}, groups of 64"] = chosen(name, Options(group_size=64))
        for scales in ("mse", "four_over_six") if name == "nvfp4" else ():
            found[f"{name}, {scales}"] = chosen(name, Options(nvfp4_scales=scales))
    return found


def plain(form: Form, weight: Tensor, amax: Amax) -> dict:
    """What `formats.encode` does where there is no kernel."""
    strips = [form.encode(weight[rows], amax) for rows in row_strips(weight, form.tile[0])]
    return {suffix: join([strip[suffix] for strip in strips], Axis.OUT) for suffix in strips[0]}


def timed(run: Callable[[int], object], weights: list[Tensor], repeats: int) -> float:
    """Median seconds of `run` over the weights in turn; what it made stays until all of them have had theirs again."""
    cuda = weights[0].is_cuda
    kept: list[object] = [None] * IN_TURN
    for turn in range(WARM_UP if cuda else 1):
        kept[turn % IN_TURN] = run(turn % IN_TURN)
    if not cuda:
        seconds = []
        for turn in range(repeats):
            begin = time.perf_counter()
            kept[turn % IN_TURN] = run(turn % IN_TURN)
            seconds.append(time.perf_counter() - begin)
        return median(seconds)
    aside = torch.empty_like(weights[0])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats)]
    for _ in range(AHEAD):
        aside.copy_(weights[0])
    for turn, (begin, end) in enumerate(zip(events[::2], events[1::2], strict=True)):
        begin.record()
        kept[turn % IN_TURN] = run(turn % IN_TURN)
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True)) / 1000


def row(label: str, path: str, size: int, seconds: float, copy: float) -> dict:
    """One row: bytes read and written, and their rate as a share of the copy's."""
    return {
        "format": label,
        "path": path,
        "bytes": size,
        "seconds": seconds,
        "gb_per_s": size / seconds / 1e9,
        "of_copy": size / seconds / copy,
    }


def table(rows: list[dict]) -> list[str]:
    """The lines of a markdown table."""
    cells = (
        (one["format"], one["path"], f"{one['gb_per_s']:,.1f}", f"{one['of_copy']:.2f}", f"{one['seconds'] * 1000:.3f}")
        for one in rows
    )
    return markdown(COLUMNS, cells)
