"""Buckets on their way through all ranks: split, smoothed, quantized on the shards, and delivered to the ranks that write them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..calibration.lookup import measured, numbers_on
from ..common.piece import Piece
from ..common.threads import gathered
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..planning.kept_codes import blocks_of, scales_of_parts
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..planning.shard_files import Bucket
from ..planning.smoothed import Measured
from ..planning.tensor_spec import Output
from . import transport
from .transport import Parcel

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
        with gathered():
            for name, parts in split.parts.items():
                item, amax = split.mine[name], self.work.amaxes.get(name)
                encoded[name] = item.encode(parts, item.ranks.index(self.here.rank), amax, split.numbers[name])
        return transport.parcel_to_writer(self.here, bucket, encoded)
