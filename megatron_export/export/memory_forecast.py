"""What an export will take, from a plan and a topology alone: bytes on disk and between ranks, memory of every rank.

Bytes are exact. Memory is what is alive at once, as each stage tells it:

    weights   the shards of the model, of replicas too, with copies of the embedding; without a model, only those of a bucket
    buckets   one that is taken while the next one is encoded and sent (bucket_load.py)
    base      of a host: the interpreter with torch and Megatron, as measured; `PLAN_BYTES` for each parameter; the statistics
    loading   of a host: pages and copies (checkpoint/reading_cost.py), and what is read ahead for a GPU, which stays
    writing   of a host that writes: the buffers of read_back.py, with a GPU also those of device_to_disk.py

The first two are of the GPU, as `torch.cuda.max_memory_allocated` counts it, or on the CPU of the host too, and so is a calibration
run, of which a bound is told (calibration/memory.py). Not counted: what an allocator keeps of what was freed (glibc's keeps up to
some hundred MB).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from runpy import run_path

import torch

from ..checkpoint.reading_cost import mapped_bytes, reading_bytes
from ..common import prefetch
from ..common.dtypes import SIZES
from ..models import is_expert
from ..planning.parameter import Item
from ..planning.plan import Held, Plan
from ..planning.rank_placement import Grid
from ..writing.device_to_disk import PINNED_BYTES
from ..writing.read_back import FILE_BYTES, THREADS
from ..writing.safetensors_file import file_bytes
from .bucket_load import Load, load_of, opening_bytes, peak

# Of the interpreter with torch and Megatron; measured, the second with CUDA's context on GPUs of 80 GB, TP=1 and 2, and with
# torch's compilers, 70 MiB, which are imported where Megatron-Core calls a function that is compiled.
BASE_BYTES = {"cpu": 315 << 20, "cuda": 1450 << 20}
CUDA_BUILD_BYTES = 280 << 20  # of the libraries that torch's build for CUDA loads on the CPU too
PLAN_BYTES = 16 << 10
STATISTIC_BYTES = 1 << 10  # of one number, as Python keeps it

Loads = dict[int, Load]  # of one bucket, by rank


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes; those of ranks in their order. `sent` goes to writers, `gathered` to other ranks before that; `host` and
    `gpu` are peaks of memory, of a GPU that is not there 0.
    """

    tensors: int
    nbytes: int
    files: dict[str, int]
    sent: tuple[int, ...]
    gathered: tuple[int, ...]
    host: tuple[int, ...]
    gpu: tuple[int, ...]


@dataclass
class Holding:
    """What a rank has of the whole model, in bytes.

    weights, largest  its shards, and the largest of them
    mapped, copied    the pages that it reads them from, and the most that is copied of one while it is read
    first             all that it has when it reads the first
    """

    weights: int = 0
    largest: int = 0
    mapped: int = 0
    copied: int = 0
    first: int = 0

    def reading(self, resident: int, locked: bool) -> int:
        """What it has when it has read nearly all, with so much of the model on the host, and page-locked copies or not."""
        copied = prefetch.most_held(self.copied, prefetch.THREADS * self.copied)
        ahead = prefetch.most_held(self.largest, self.weights) if locked else 0
        return max(resident + self.mapped + copied, self.first) + ahead


def forecast(
    plan: Plan, held: dict[str, Held], grid: Grid, device: str, streamed: bool = False, calibration: int = 0
) -> Forecast:
    """What the export of a plan takes on the ranks that `held` and `grid` name; `device` is cuda or cpu. If it is `streamed`, no
    model is built, and shards are read as they are encoded. `calibration` are the bytes that a calibration run takes on any rank.
    """
    loads, holdings = _loads(plan, held, device, streamed), _holdings(plan, held, grid)
    working = _working(loads)
    built = CUDA_BUILD_BYTES if device == "cpu" and _for_cuda() else 0
    own = BASE_BYTES[device] + built + PLAN_BYTES * len(plan.items) + _statistics(plan)
    files, leaving = Counter(plan.writers.values()), PINNED_BYTES if device == "cuda" else 0
    host, gpu = [], []
    for rank in range(grid.world):
        holding = holdings[grid.place(rank)]
        weights = 0 if streamed else holding.weights
        resident = weights if device == "cpu" else 0
        loading = holding.largest if streamed else holding.reading(resident, locked=device == "cuda")
        writing = FILE_BYTES * min(THREADS, files[rank]) + leaving * (rank in files)
        gpu.append(max(weights + max(working[rank], calibration), holding.largest) if device == "cuda" else 0)
        here = max(writing + working[rank], calibration) if device == "cpu" else writing
        host.append(own + max(loading, resident + here))
    return Forecast(
        tensors=sum(len(outputs) for outputs in plan.files.values()),
        nbytes=plan.nbytes,
        files={name: file_bytes(file) for name, file in plan.files.items()},
        sent=_summed(loads, "sent", grid.world),
        gathered=_summed(loads, "moved", grid.world),
        host=tuple(host),
        gpu=tuple(gpu),
    )


def _for_cuda() -> bool:
    """Whether torch here is a build for CUDA. Its version.py says so; torch itself would take a second to import."""
    return run_path(str(Path(torch.__spec__.origin).with_name("version.py")))["cuda"] is not None


def _summed(loads: list[Loads], name: str, world: int) -> tuple[int, ...]:
    """By rank, over all buckets."""
    totals, alike = [0] * world, {id(found): found for found in loads}
    for key, times in Counter(map(id, loads)).items():
        for rank, load in alike[key].items():
            totals[rank] += times * getattr(load, name)
    return tuple(totals)


def _loads(plan: Plan, held: dict[str, Held], device: str, streamed: bool) -> list[Loads]:
    """Of every bucket, what it puts on each rank that takes part in it; buckets that are alike have it in common."""
    known: dict[int, tuple[Load, ...]] = {}  # by the first item of each kind
    firsts: dict[int, Item] = {}
    made: dict[tuple, Loads] = {}
    loads = []
    for bucket in plan.buckets:
        alike: dict[tuple[tuple[int, ...], int], int] = defaultdict(int)
        for item in bucket.items:
            kind = id(first := item.first or item)
            if kind not in known:
                known[kind] = tuple(load_of(item, index, device, streamed) for index in range(len(item.ranks)))
                firsts[kind] = first
            alike[held[item.source.canonical].ranks[: len(item.ranks)], kind] += 1
        key = bucket.writer, frozenset(alike.items())
        if key not in made:
            opening = max(opening_bytes(firsts[kind]) for _, kind in alike)
            made[key] = _of_bucket(alike, known, bucket.writer, opening)
        loads.append(made[key])
    return loads


def _of_bucket(
    alike: dict[tuple[tuple[int, ...], int], int], known: dict[int, tuple[Load, ...]], writer: int, opening: int
) -> Loads:
    """What a bucket puts on each rank, from how many items of each kind it has on which ranks."""
    found: Loads = defaultdict(Load)
    own = 0
    for (ranks, kind), count in alike.items():
        for rank, load in zip(ranks, known[kind], strict=True):
            found[rank] = found[rank].plus(load, count)
            if rank == writer:  # it keeps what it encoded until that is written
                own += count * (load.encoded or load.copied)
    arriving, mine = sum(load.sent for load in found.values()), found[writer]
    return {**found, writer: mine._replace(sent=0, parcel=arriving - mine.sent + own, opening=opening)}


def _working(loads: list[Loads]) -> dict[int, int]:
    """Of every rank, the most that it takes beside the weights, over all buckets."""
    peaks: dict[int, int] = defaultdict(int)
    nothing, pairs = Load(), zip([{}, *loads], loads, strict=False)
    for before, now in {(id(before), id(now)): (before, now) for before, now in pairs}.values():
        for rank in now.keys() | before.keys():
            peaks[rank] = max(peaks[rank], peak(before.get(rank, nothing), now.get(rank, nothing)))
    return peaks


def _holdings(plan: Plan, held: dict[str, Held], grid: Grid) -> dict[tuple[int, int], Holding]:
    """By place, what a rank holds and reads."""
    found = {(stage, home): Holding() for stage in range(grid.pp) for home in range(grid.ep)}
    known: dict[int, tuple[int, int, int]] = {}  # by the first item of each kind
    for item in plan.items:
        source, kind = item.source, id(item.first or item)
        if kind not in known:
            shard = prod(held[source.canonical].shape) * SIZES[source.dtype]
            reading = (of(plan.config, source, shard) for of in (mapped_bytes, reading_bytes))
            known[kind] = (shard, *reading)
        shard, read, copied = known[kind]
        homes = [grid.expert_rank(source)] if is_expert(source.canonical) else range(grid.ep)
        stages = [grid.stage_rank(source), *[grid.pp - 1] * grid.copies(source)]
        for copy, stage in enumerate(stages):
            first = item is plan.items[0] and copy == 0  # the embedding
            for holding in (found[stage, home] for home in homes):
                holding.weights += shard
                holding.largest = max(holding.largest, shard)
                holding.mapped += read
                holding.copied = max(holding.copied, 0 if first else copied)
                holding.first = max(holding.first, read + copied + shard if first else 0)
    return found


def _statistics(plan: Plan) -> int:
    """Bytes of the statistics, which every rank has on its host."""
    vectors = {item.smoothed.columns: item.source.shape[-1] for item in plan.items if item.smoothed.columns}
    codes = sum(prod(item.source.shape) // item.form.tile[1] for item in plan.items if item.smoothed.codes)
    numbers = sum(item.form is not None and item.form.calibrated for item in plan.items)
    return STATISTIC_BYTES * numbers + 8 * sum(vectors.values()) + codes
