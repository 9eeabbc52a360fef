"""Seconds, peaks of memory and the same bytes through `save_file`; rows of a table, and JSON."""

import argparse
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.common.text import readable

Held = dict[str, dict[str, Tensor]]  # file -> its tensors


@dataclass(frozen=True)
class Row:
    """What one export, repeated, took, in bytes and seconds.

    times, saved  of every run, and of every `save_file` of the same bytes
    wire          what all ranks sent
    gpu, host     the most that a rank took above its model, and the most that one had in all
    """

    tool: str
    model: str
    layers: int
    format: str
    device: str
    ranks: str
    writers: str
    fsync: bool
    model_bytes: int
    written: int
    times: tuple[float, ...]
    saved: tuple[float, ...]
    wire: int
    gpu: int
    host: int

    @property
    def seconds(self) -> float:
        return median(self.times)

    @property
    def case(self) -> tuple[str | int, ...]:
        """What was measured, however often."""
        return self.tool, self.model, self.layers, self.format, self.device, self.ranks, self.writers, self.fsync

    def tell(self) -> None:
        """Say on rank 0 what was found, as soon as it was: what follows may fail, or be stopped."""
        if dist.get_rank() == 0:
            saved = f", save_file {_each(self.saved)}" if self.saved else ""
            what = f"{self.tool} {self.model} {self.layers} {self.format}{', fsync' if self.fsync else ''}"
            print(f"{what}: {_each(self.times)}{saved}", flush=True)

    def cells(self) -> dict[str, str]:
        """Column -> what the table shows."""
        saved = median(self.saved) if self.saved else None
        return {
            "tool": self.tool,
            "model": f"{self.model}, {self.layers} layers, {readable(self.model_bytes)}",
            "format": self.format,
            "ranks": self.ranks,
            "writers": self.writers,
            "fsync": "yes" if self.fsync else "no",
            "written": readable(self.written),
            "seconds": f"{self.seconds:.2f}",
            "GB/s": f"{self.written / self.seconds / 1e9:.2f}",
            "save_file": f"{saved:.2f}" if saved else "",
            "ratio": f"{self.seconds / saved:.2f}" if saved else "",
            "over the wire": readable(self.wire) if self.ranks != "1" else "",
            "GPU above the model": readable(self.gpu) if self.device != "cpu" else "",
            "host": readable(self.host),
        }


def _each(seconds: Iterable[float]) -> str:
    return f"{', '.join(f'{one:.2f}' for one in seconds)} s"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a markdown table; a row has a cell for each column."""
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


def compared(change: Tensor) -> list[str]:
    """Of changes in nats per token by window, float64: the ratio of perplexities, and their mean with its standard error."""
    error = change.std() / math.sqrt(len(change))
    return [f"{change.mean().exp():.4f}", f"{change.mean():+.5f} ± {error:.5f}"]


def table(rows: Iterable[Row]) -> list[str]:
    """The lines of a markdown table, without columns that are empty."""
    cells = [row.cells() for row in rows]
    columns = [name for name in cells[0] if any(row[name] for row in cells)]
    return markdown(columns, ([row[name] for name in columns] for row in cells))


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """The rows and what they were measured with, as JSON."""
    used = ("torch", "megatron-core", "safetensors", "nvidia-modelopt")
    versions = {name: version(name) for name in used if find_spec(name.removeprefix("nvidia-").replace("-", "."))}
    kept = [asdict(row) | {"seconds": row.seconds} for row in rows]
    file.write_text(json.dumps({"command": sys.argv[1:], "versions": versions, "rows": kept}, indent=1) + "\n")


def read_rows(file: Path) -> list[Row]:
    """The rows of such a file."""
    try:
        found = json.loads(file.read_text())["rows"]
        rows = [Row(**{name: value for name, value in row.items() if name != "seconds"}) for row in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{file}: not written by --json ({error}). Give a file that was") from error
    return rows


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag that says where all is done."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: cuda where there is one")


def alone_or_torchrun() -> None:
    """Be the one rank of a `torchrun`, if none started this."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def alone() -> None:
    """The same, where there may be only one."""
    alone_or_torchrun()
    if os.environ["WORLD_SIZE"] != "1":
        raise ExportError(f"this runs on one rank, not on {os.environ['WORLD_SIZE']}. Start it with python")


def every(mine: object) -> list:
    """One object from every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def timed(work: Callable[[], object]) -> float:
    """Seconds from when all ranks begin until all have ended."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def peaks_of(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """The most that a rank takes of its GPU above what it has before, and the most that one has on the host in all."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    work()
    gpu = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    lines = Path("/proc/self/status").read_text().splitlines()
    host = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    gpus, hosts = zip(*every((gpu, host)), strict=True)
    return max(gpus), max(hosts)


def held_from(folder: Path) -> Held:
    """The tensors of a checkpoint in memory of their own, not in pages of its files."""
    return {
        path.name: {name: tensor.clone() for name, tensor in load_file(path).items()}
        for path in sorted(folder.glob("*.safetensors"))
    }


def save(held: Held, folder: Path, sync: bool) -> None:
    """The same files through `save_file`, and with `sync` to the disk."""
    folder.mkdir()
    for name, tensors in held.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    for path in (*(folder / name for name in held), folder) if sync else ():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def delete(*folders: Path) -> None:
    """On rank 0; what is still to be written of other files is written, so that no run pays for another's."""
    if dist.get_rank() == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
    dist.barrier()
