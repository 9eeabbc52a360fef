"""`verify`: how long the command `verify` takes, beside one CPU thread of it, and the CPU seconds of both.

    python launch/benchmark.py verify [--shape 8b] [--layers N] [--formats fp8 nvfp4] [--device cuda|cpu]
    python launch/benchmark.py verify --hf-model examples/model --text examples/model/heldout.txt

A model with made-up weights is exported, in bfloat16 as the original and in each format; with --text, the model's own weights are.
Then whole commands take turns, imports and all: with as many threads as there are, and with one on the CPU. `--alone`: without
the second. All of it is read once before. Nothing is fetched, and the folders are deleted at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from megatron_export.checkpoint import hf_folder
from megatron_export.common.errors import ExportError
from megatron_export.common.text import readable
from megatron_export.formats import FORMATS

from .exporting import add_model, model_for
from .measuring import alone, markdown
from .shapes import made_up

COLUMNS = ("format", "weights", "read", "on", "seconds", "each", "CPU seconds", "seconds a billion", "times faster")
ONE = "one CPU thread"


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    parser.set_defaults(run=verify)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8", "nvfp4"], help="default: fp8 nvfp4")
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    parser.add_argument("--repeat", type=int, default=3, help="of which the median is shown; default: 3")
    parser.add_argument("--text", type=Path, help="score on this text too; --hf-model is then a whole model")
    parser.add_argument("--windows", type=int, help="how many windows of 512 tokens of it (default: all there are)")
    parser.add_argument("--alone", action="store_true", help="without one CPU thread beside it")
    parser.add_argument("--output", type=Path, default=Path("export/benchmark"), help="folder to write in and clear")
    add_model(parser)


def verify(flags: argparse.Namespace) -> None:
    """Make the checkpoints, then time the commands in turns; print a table."""
    if flags.repeat < 1:
        raise ExportError(f"--repeat must be at least 1, not {flags.repeat}")
    if flags.text and (flags.hf_model is None or flags.layers is not None):
        raise ExportError("--text needs an --hf-model with weights and a tokenizer, and no --layers")
    alone()
    flags.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with TemporaryDirectory(dir=flags.output) as made:
        reference, folders = (_given if flags.text else _made)(flags, Path(made))
        for name, folder in folders.items():
            rows += _measured(flags, name, folder, reference)
    print("\n".join(markdown(COLUMNS, map(_cells, rows))), flush=True)
    if flags.json:
        said = {"command": sys.argv[1:], "torch": torch.__version__, "cores": os.cpu_count()}
        flags.json.write_text(json.dumps(said | {"rows": rows}, indent=1) + "\n")


def _made(flags: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """A model of made-up weights, exported as it is and in each format."""
    from megatron_export import export_hf_checkpoint

    with model_for(flags, ("bf16", *flags.formats)) as (model, source, cases):
        for case in cases:
            how = {"format": case.format, "calibration": made_up(case.told.plan), "sync": False}
            export_hf_checkpoint(model, folder / case.format, hf_model=source, **how)
        del model
    if flags.device == "cuda":
        torch.cuda.empty_cache()
    return folder / "bf16", {name: folder / name for name in flags.formats}


def _given(flags: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """A model with weights, exported in each format by the command."""
    for name in flags.formats:
        line = ["--hf-model", flags.hf_model, "--format", name, "--output", folder / name, "--device", flags.device]
        _run([sys.executable, "-m", "megatron_export", "export", *map(str, line)], {})
    return hf_folder.find_model(flags.hf_model, weights=True), {name: folder / name for name in flags.formats}


def _measured(flags: argparse.Namespace, name: str, folder: Path, reference: Path) -> list[dict]:
    """A row for the device, and one for one CPU thread."""
    line = [sys.executable, "-m", "megatron_export", "verify", str(folder), "--reference", str(reference)]
    text = ["--text", str(flags.text)] if flags.text else []
    text += ["--windows", str(flags.windows)] if flags.windows else []
    ways = {_device(flags.device): partial(_run, [*line, *text, "--device", flags.device], {})}
    if not flags.alone:
        ways[ONE] = partial(_run, [*line, *text, "--device", "cpu"], {"OMP_NUM_THREADS": "1"})
    next(iter(ways.values()))()  # all files are in memory then
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(flags.repeat):
        for way, run in ways.items():
            times[way].append(run())
    files = {one: sum(path.stat().st_size for path in one.glob("*.safetensors")) for one in (folder, reference)}
    weights = files[reference] // 2  # of bfloat16
    slow = median(wall for wall, _ in times[ONE]) if ONE in times else None
    return [
        {
            "format": name,
            "weights": weights,
            "bytes": sum(files.values()),
            "on": way,
            "seconds": median(wall for wall, _ in found),
            "each": [wall for wall, _ in found],
            "cpu_seconds": median(cpu for _, cpu in found),
            "times": slow / median(wall for wall, _ in found) if slow else None,
        }
        for way, found in times.items()
    ]


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


def _run(line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds that a command takes, and CPU seconds; `ExportError` with what it said if it fails."""
    theirs = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    began, before = time.perf_counter(), os.times()
    done = subprocess.run(line, env=theirs | environment, capture_output=True, text=True, check=False)
    took, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise ExportError(
            f"{' '.join(line[2:])} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return took, used


def _cells(row: dict) -> tuple[str, ...]:
    return (
        row["format"],
        f"{row['weights'] / 1e9:.2f} billion",
        readable(row["bytes"]),
        row["on"],
        f"{row['seconds']:.1f}",
        ", ".join(f"{one:.1f}" for one in row["each"]),
        f"{row['cpu_seconds']:.1f}",
        f"{row['seconds'] / row['weights'] * 1e9:.1f}",
        f"{row['times']:.2f}" if row["times"] else "",
    )
