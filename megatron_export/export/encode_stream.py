"""Buckets on their way through all ranks: split, smoothed, quantized on the shards, and delivered to the ranks that write them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from torch import Tensor

from ..calibration.lookup import measured, numbers_on
from ..common.piece import Piece
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..formats import encode_bytes
from ..planning.kept_codes import blocks_of, scales_of_parts
from ..planning.parameter import Item, Measured
from ..planning.plan import Plan
from ..planning.shard_files import Bucket
from ..planning.tensor_spec import Output
from . import transport
from .transport import Parcel, size_of

Take = Callable[[Iterator[tuple[Output, Tensor]]], None]


@dataclass(frozen=True)
class Work:
    """What is encoded: this rank's shards by canonical name; and with what: the amax of weights by such names, and statistics."""

    plan: Plan
    shards: Mapping[str, Tensor]
    amaxes: dict[str, Tensor]
    calibration: dict[str, Tensor]


@dataclass(frozen=True)
class _Split:
    """What this rank has of a bucket, by canonical name: its items, their numbers, and their parts, in bfloat16."""

    mine: dict[str, Item]
    numbers: dict[str, Measured]
    parts: dict[str, dict[str, Piece]]


class Stream:
    """Encodes buckets. `take` is given the tensors of each on the rank that writes it; `sent` counts the bytes that this rank sent.

    A bucket is taken while all ranks encode the next one, so that ranks agree on failures once for each bucket.
    """

    def __init__(self, here: Topology, work: Work, take: Take) -> None:
        self.here = here
        self.work = work
        self.take = take
        self.statistics = numbers_on(here.device, work.calibration)
        self.sent = 0

    def run(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """Every bucket when it has been taken. Collective; a failure on any rank is one on all."""
        last: tuple[Bucket, Parcel] | None = None
        for bucket in buckets:
            parcel = self._encoded(bucket, last)
            if last:
                yield last[0]
            self.sent += transport.deliver(self.here, parcel)
            last = bucket, parcel
        if last:
            with together(self.here, "write"):
                self._pass_on(last)
            yield last[0]

    def _pass_on(self, last: tuple[Bucket, Parcel] | None) -> None:
        if last and last[0].writer == self.here.rank:
            self.take(transport.open_at_writer(*last))

    def _encoded(self, bucket: Bucket, last: tuple[Bucket, Parcel] | None) -> Parcel:
        """A bucket's parcel, ready to travel; on the way, the last one is taken."""
        here, tensor = self.here, bucket.items[0].source.canonical
        first = any(item.gather_first for item in bucket.items)
        with together(here, "write", tensor=tensor) as at:
            self._pass_on(last)
            at("split its shards")
            split = self._split(bucket)
            if not first:
                at("quantize")
                return self._quantized(bucket, split)
            firsts = {name: item for name, item in split.mine.items() if item.gather_first}
            parcels = {name: transport.parcel_to_first(here, i, split.parts[name]) for name, i in firsts.items()}
        self.sent += sum(transport.deliver(here, parcel) for parcel in parcels.values())
        with together(here, "join shards", tensor=tensor) as at:
            whole = {name: transport.open_first(here, split.mine[name], parcel) for name, parcel in parcels.items()}
            parts = {name: found for name, found in (split.parts | whole).items() if found is not None}
            at("quantize")
            return self._quantized(bucket, _Split(split.mine, split.numbers, parts))

    def _split(self, bucket: Bucket) -> _Split:
        here, work = self.here, self.work
        mine = {item.source.canonical: item for item in bucket.items if here.rank in item.ranks}
        numbers = {name: measured(item, self.statistics, here.device) for name, item in mine.items()}
        index = {name: item.ranks.index(here.rank) for name, item in mine.items()}
        for name, item in mine.items():
            if item.kept:
                scales = work.shards.scales(name, blocks_of(item.form))
                numbers[name] = replace(numbers[name], scales=scales_of_parts(item, scales, index[name]))
        parts = {name: item.split(work.shards[name], index[name], numbers[name]) for name, item in mine.items()}
        return _Split(mine, numbers, parts)

    def _quantized(self, bucket: Bucket, split: _Split) -> Parcel:
        encoded = {}
        for name, parts in split.parts.items():
            item, amax = split.mine[name], self.work.amaxes.get(name)
            encoded[name] = item.encode(parts, item.ranks.index(self.here.rank), amax, split.numbers[name])
        return transport.parcel_to_writer(self.here, bucket, encoded)


class Load(NamedTuple):
    """Memory that a bucket takes on a rank, in bytes; of `splitting`, `encoding` and `opening`, which pass, the most at a time.

    moved, arrived   of what is gathered first: the shards that this rank sends to the first rank, and on that those of all ranks
    copied           what splitting copied, and what was made whole
    encoded, sent    the pieces, and the message for the writer
    parcel, opening  when all has travelled: the message, on the writer those of others and its own pieces; and what taking them
                     copies
    """

    moved: int = 0
    arrived: int = 0
    copied: int = 0
    splitting: int = 0
    encoded: int = 0
    encoding: int = 0
    sent: int = 0
    parcel: int = 0
    opening: int = 0

    def plus(self, other: "Load", times: int) -> "Load":
        """With so many others like `other`."""
        return Load(
            self.moved + times * other.moved,
            self.arrived + times * other.arrived,
            self.copied + times * other.copied,
            max(self.splitting, other.splitting),
            self.encoded + times * other.encoded,
            max(self.encoding, other.encoding),
            self.sent + times * other.sent,
            self.parcel + times * other.parcel,
            self.opening + times * other.opening,
        )


def load_of(item: Item, index: int, device: str, streamed: bool) -> Load:
    """What shard `index` of an item takes on its rank; `device` is "cpu" or "cuda". If `streamed`, the shard itself counts too."""
    raw, sent = size_of(item.raw_message(index)), size_of(item.message(index))
    interleaved = not item.source.layout.views and len(item.shard_shape) == 2
    smoothed = bool(item.smoothed.columns or item.smoothed.rows)
    copies = smoothed or (interleaved and item.splits)
    copied, arrived = raw if copies or streamed else 0, 0
    parts = item.parts if item.gather_first else item.raw_message(index)
    largest = max((part.shape for part in parts), key=prod)
    splitting = 8 * prod(largest) * smoothed + raw * (copies and streamed)  # twice in float32
    if item.gather_first and index:
        return Load(moved=raw, copied=copied, splitting=splitting)
    if item.gather_first:
        arrived = sum(size_of(item.raw_message(other)) for other in range(len(item.ranks)))
        copied = sum(part.nbytes for part in item.parts)
        splitting += copied if len(item.shard_shape) > 1 and not item.splits else 0
    encoded, encoding = (sent, encode_bytes(item.form, largest, device)) if item.form else (0, 0)
    return Load(0, arrived, copied, splitting, encoded, encoding, sent, sent)


def peak(old: Load, new: Load) -> int:
    """The most memory that a rank has at a time, in bytes, while bucket `old` is taken and `new` is encoded and delivered."""
    return max(
        old.copied + old.parcel + new.moved + new.arrived + new.copied + new.splitting,
        old.parcel + new.copied + new.encoded + max(new.encoding, new.sent),
        old.parcel + new.sent + new.parcel + new.opening,
    )
