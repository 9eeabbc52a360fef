"""What an export will take, from a plan and a topology alone: bytes on disk and between ranks, memory of every rank.

Bytes are exact. Memory is what is alive at once:

    weights   the rank's shards as the model holds them, of replicas too, and Megatron's copies of the embedding; where a checkpoint
              is read without a model, only those of a bucket
    bucket    while one is encoded and sent: what splitting and smoothing copy of it, its encoded pieces, the message of each
              item, the parcel of all, on its writer what the others sent, and still the parcel of the bucket before; what is
              gathered first travels before that
    strips    16 bytes for each of the weights that are encoded at a time (formats.form)

On a GPU these are its memory, as `torch.cuda.max_memory_allocated` counts it. On the CPU they are the host's, which has also

    base      the interpreter with torch and Megatron, as measured
    plan      `PLAN_BYTES` for each parameter, and the statistics
    files     while weights are loaded: the pages of the source's files that the rank reads, which are mapped, and what the
              threads that read copy of them; for a GPU also the page-locked copies that are read ahead, which stay
    verify    on ranks that write: the buffers that files are read back with; on a GPU's host also those that it is copied to

Not counted: a calibration run; what an allocator keeps of what was freed (glibc's keeps up to some hundred MB).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from math import prod

import torch

from ..common.piece import Axis
from ..common.prefetch import AHEAD_BYTES
from ..common.prefetch import THREADS as READERS
from ..common.strips import strip_elements
from ..models import Source, is_expert, is_linear_weight
from ..models.hf_config import text_of
from ..models.layouts import QKV, Identity
from ..planning.parameter import Item
from ..planning.plan import Held, Plan
from ..planning.rank_placement import Grid
from ..planning.tensor_spec import Output
from ..writing.device_to_disk import CHUNK as CONVEYED
from ..writing.device_to_disk import SLOTS
from ..writing.read_back import BUFFERS, CHUNK, THREADS
from ..writing.safetensors_file import header_of

# Of the interpreter with torch and Megatron; measured, the second with CUDA's context on GPUs of 80 GB, TP=1 and 2.
BASE_BYTES = {"cpu": 385 << 20, "cuda": 1450 << 20}
CUDA_BUILD_BYTES = 280 << 20  # of the libraries that torch's build for CUDA loads on the CPU too
PLAN_BYTES = 16 << 10
STATISTIC_BYTES = 1 << 10  # of one number, as Python keeps it
MULTIPLIED = 6  # bytes that it takes to multiply out a number in float8, for each of bfloat16's: value, scale, product
VERIFIED = CHUNK * (BUFFERS + 2)  # the chunks of a file that is read back, and their magnitudes
ALIGNMENT = 16  # of the tensors in a message


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


@dataclass(frozen=True)
class Load:
    """What a rank has of a bucket, in bytes; of `splitting` and `encoding`, which pass, the most at a time.

    moved    shards of what is gathered first that it sends to the first rank; arrived: those that others sent it
    copied   what splitting copied, and what was made whole
    encoded  its pieces; sent: its message for the writer
    """

    moved: int = 0
    arrived: int = 0
    copied: int = 0
    splitting: int = 0
    encoded: int = 0
    encoding: int = 0
    sent: int = 0

    def plus(self, other: "Load", times: int) -> "Load":
        """With so many others like `other`."""
        most = ("splitting", "encoding")
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(Load)}
        return Load(**{name: max(a, b) if name in most else a + times * b for name, (a, b) in pairs.items()})


@dataclass
class Holding:
    """What a rank has of the whole model, in bytes: its weights, the largest of them, the pages that it reads them from, the
    most that is copied of one while it is read, and all that it has when it reads the first.
    """

    weights: int = 0
    largest: int = 0
    mapped: int = 0
    copied: int = 0
    first: int = 0

    def reading(self, resident: int, locked: bool) -> int:
        """What it has when it has read nearly all, with so much of the model on the host, and page-locked copies or not."""
        ahead = max(AHEAD_BYTES, self.largest)
        copied = min(READERS * self.copied, max(AHEAD_BYTES, self.copied))
        return max(resident + self.mapped + copied, self.first) + (min(ahead, self.weights) if locked else 0)


def forecast(plan: Plan, held: dict[str, Held], grid: Grid, device: str, streamed: bool = False) -> Forecast:
    """What the export of a plan takes on the ranks that `held` and `grid` name; `device` is cuda or cpu. If it is `streamed`, no
    model is built, and shards are read as they are encoded.
    """
    loads, holdings = _loads(plan, held, strip_elements(device), streamed), _holdings(plan, held, grid)
    working = _working(plan, loads)
    own = _base(device) + PLAN_BYTES * len(plan.items) + _statistics(plan)
    files = Counter(plan.writers.values())
    leaving = SLOTS * CONVEYED if device == "cuda" else 0
    host, gpu = [], []
    for rank in range(grid.world):
        holding = holdings[grid.place(rank)]
        weights = 0 if streamed else holding.weights
        resident = weights if device == "cpu" else 0
        loading = holding.largest if streamed else holding.reading(resident, locked=device == "cuda")
        writing = VERIFIED * min(THREADS, files[rank]) + leaving * (rank in files)
        gpu.append(max(weights + working[rank], holding.largest) if device == "cuda" else 0)
        host.append(own + max(loading, resident + writing + (working[rank] if device == "cpu" else 0)))
    return Forecast(
        tensors=sum(len(outputs) for outputs in plan.files.values()),
        nbytes=plan.nbytes,
        files={name: len(header_of(file)[0]) + sum(o.nbytes for o in file) for name, file in plan.files.items()},
        sent=_summed(plan, loads, "sent", grid.world),
        gathered=_summed(plan, loads, "moved", grid.world),
        host=tuple(host),
        gpu=tuple(gpu),
    )


def _base(device: str) -> int:
    """What a process has before it does anything, with the torch that is here."""
    return BASE_BYTES[device] + (CUDA_BUILD_BYTES if device == "cpu" and torch.version.cuda else 0)


def _summed(plan: Plan, loads: list[dict[int, Load]], name: str, world: int) -> tuple[int, ...]:
    """By rank, over all buckets; what a writer has for itself is not sent."""
    totals = [0] * world
    for bucket, found in zip(plan.buckets, loads, strict=True):
        for rank, load in found.items():
            totals[rank] += 0 if name == "sent" and rank == bucket.writer else getattr(load, name)
    return tuple(totals)


def _loads(plan: Plan, held: dict[str, Held], strip: int, streamed: bool) -> list[dict[int, Load]]:
    """Of every bucket, what it puts on each rank that takes part in it; `strip` weights are encoded at a time."""
    known: dict[tuple, tuple[Load, ...]] = {}
    loads = []
    for bucket in plan.buckets:
        alike: dict[tuple, int] = defaultdict(int)
        for item in bucket.items:
            kind = _kind(item)
            if kind not in known:
                known[kind] = tuple(_load(item, index, strip, streamed) for index in range(len(item.ranks)))
            alike[held[item.source.canonical].ranks[: len(item.ranks)], kind] += 1
        found: dict[int, Load] = defaultdict(Load)
        for (ranks, kind), count in alike.items():
            for rank, load in zip(ranks, known[kind], strict=True):
                found[rank] = found[rank].plus(load, count)
        loads.append(dict(found))
    return loads


def _kind(item: Item) -> tuple:
    """What decides an item's sizes."""
    source, smoothed = item.source, item.smoothed
    how = (smoothed.columns is None, tuple(part for part, _ in smoothed.rows), smoothed.kept)
    shape = (source.layout, source.cut, source.dtype, item.shard_shape, len(item.ranks))
    return (*shape, item.form, item.kv, item.gather_first, how)


def _load(item: Item, index: int, strip: int, streamed: bool) -> Load:
    """What shard `index` of an item puts on its rank, with the shard itself if it is `streamed`."""
    raw, sent = _packed(item.raw_message(index)), _packed(item.message(index))
    whole = sum(part.nbytes for part in item.parts)
    interleaved = isinstance(item.source.layout, QKV) and len(item.shard_shape) == 2  # whose parts are no views
    smoothed = bool(item.smoothed.columns or item.smoothed.rows)
    copies = smoothed or (interleaved and item.splits)
    copied = raw if copies or streamed else 0
    largest = max(prod(part.shape) for part in (item.parts if item.gather_first else item.raw_message(index)))
    splitting = 8 * largest if smoothed else 0  # twice in float32
    splitting += raw if copies and streamed else 0
    if item.gather_first and index:
        return Load(moved=raw, copied=copied, splitting=splitting)
    arrived = 0
    if item.gather_first:
        arrived = raw + sum(_packed(item.raw_message(other)) for other in range(1, len(item.ranks)))
        copied, splitting = whole, splitting + (whole if interleaved and not item.splits else 0)
    if item.form is None:
        return Load(arrived=arrived, copied=copied, splitting=splitting, sent=sent)
    strips = 16 * min(largest, strip) + (sent if largest > strip else 0)
    return Load(0, arrived, copied, splitting, sent, strips, sent)


def _packed(message: tuple[Output, ...]) -> int:
    """Bytes of a message, each tensor padded as gather pads it."""
    return sum(-(-output.nbytes // ALIGNMENT) * ALIGNMENT for output in message)


def _arriving(bucket: dict[int, Load]) -> int:
    """What the writer has of a bucket when all messages have come, its own too."""
    return sum(load.sent for load in bucket.values())


def _working(plan: Plan, loads: list[dict[int, Load]]) -> dict[int, int]:
    """Of every rank, the most that it takes beside the weights, over all buckets."""
    peaks: dict[int, int] = defaultdict(int)
    before, from_before = {}, None
    for bucket, now in zip(plan.buckets, loads, strict=True):
        joined = max(_joined(item) for item in bucket.items)
        for rank in now.keys() | {bucket.writer, from_before} - {None}:
            old, new = before.get(rank, Load()), now.get(rank, Load())
            parcel = _arriving(before) if rank == from_before else old.sent
            next_parcel = _arriving(now) if rank == bucket.writer else new.sent
            stages = (
                old.copied + old.encoded + parcel + new.moved + new.arrived + new.copied + new.splitting,
                old.encoded + parcel + new.copied + new.encoded + new.encoding,
                parcel + new.copied + new.encoded + new.sent + next_parcel,
                new.copied + new.encoded + next_parcel + (joined if rank == bucket.writer else 0),
            )
            peaks[rank] = max(peaks[rank], *stages)
        before, from_before = now, bucket.writer
    return peaks


def _joined(item: Item) -> int:
    """What joining the shards of an item copies, and swapping the dims of a stacked one."""
    nbytes = sum(output.nbytes for output in item.outputs)
    return nbytes * ((len(item.ranks) > 1 and not item.gather_first) + item.stacked)


def _holdings(plan: Plan, held: dict[str, Held], grid: Grid) -> dict[tuple[int, int], Holding]:
    """By place, what a rank holds and reads."""
    found = {(stage, home): Holding() for stage in range(grid.pp) for home in range(grid.ep)}
    for item in plan.items:
        source = item.source
        shard = prod(held[source.canonical].shape) * source.dtype.itemsize
        read, copied = _read(plan.config, source, shard), _copied(plan.config, source, shard)
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


def _read(config: dict, source: Source, shard: int) -> int:
    """Bytes of a file's pages that a rank touches when it reads a shard of so many bytes."""
    across = Axis.OUT if source.stack else Axis.IN  # what a cut of every row of the file is along: it touches all pages
    nbytes = prod(source.shape) * source.dtype.itemsize if source.cut is across else shard
    if config.get("quantization_config") and is_linear_weight(source.canonical):
        return nbytes // 2  # float8
    return nbytes * 2 if _wide(config) else nbytes


def _copied(config: dict, source: Source, shard: int) -> int:
    """Bytes that a rank copies of a shard of so many bytes while it reads it: it casts parts, and joins them."""
    joined = 0 if isinstance(source.layout, Identity) and not source.stack else shard
    if config.get("quantization_config") and is_linear_weight(source.canonical):
        return MULTIPLIED * shard + joined
    return joined + (shard if _wide(config) else 0)


def _wide(config: dict) -> bool:
    """Whether the files are in float32."""
    text = text_of(config)
    return (text.get("dtype") or text.get("torch_dtype")) == "float32"


def _statistics(plan: Plan) -> int:
    """Bytes of the statistics, which every rank has on its host."""
    vectors = {item.smoothed.columns: item.source.shape[-1] for item in plan.items if item.smoothed.columns}
    codes = sum(prod(item.source.shape) // item.form.tile[1] for item in plan.items if item.smoothed.codes)
    numbers = sum(item.form is not None and item.form.calibrated for item in plan.items)
    return STATISTIC_BYTES * numbers + 8 * sum(vectors.values()) + codes
