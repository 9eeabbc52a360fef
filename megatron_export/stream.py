"""One bucket's way through all ranks: split, smoothed, quantized on the shards, and delivered to the rank that writes it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from . import gather
from .filing import Bucket
from .gather import together
from .item import Item, Measured, Output
from .measured import measured
from .piece import Piece
from .plan import Plan
from .topology import Topology


@dataclass(frozen=True)
class Work:
    """What is encoded, and the numbers that it is encoded with: this rank's shards and the amax of weights by canonical name, and
    the statistics.
    """

    plan: Plan
    shards: dict[str, Tensor]
    amaxes: dict[str, Tensor]
    calibration: dict[str, Tensor]


@dataclass(frozen=True)
class Delivered:
    """A bucket that has arrived, and how many bytes this rank sent for it."""

    bucket: Bucket
    parcel: gather.Parcel
    sent: int

    def tensors(self) -> Iterator[tuple[Output, Tensor]]:
        """On its writer: the tensors of the checkpoint that are in it, or slices of them, on this rank's device."""
        return gather.open_at_writer(self.bucket, self.parcel)


def delivered(here: Topology, bucket: Bucket, work: Work) -> Delivered:
    """Encode a bucket and send it to its writer. Collective; a failure on any rank is one on all."""
    here.pulse.at("export", bucket.items[0].source.canonical)
    numbers, parts, moved = _parts(here, bucket.items, work)
    with together(here, "quantize"):
        encoded = {
            name: item.encode(parts[name], item.ranks.index(here.rank), work.amaxes.get(name), numbers[name])
            for item in bucket.items
            if (name := item.source.canonical) in parts
        }
        parcel = gather.parcel_to_writer(here, bucket, encoded)
    return Delivered(bucket, parcel, moved + gather.deliver(here, parcel))


def _parts(
    here: Topology, items: tuple[Item, ...], work: Work
) -> tuple[dict[str, Measured], dict[str, dict[str, Piece]], int]:
    """What this rank is to encode, smoothed and in bfloat16, by canonical name, and the numbers that belong to it: its
    shards, or whole what is gathered first. And the bytes that it sent for that.
    """
    mine = {item.source.canonical: item for item in items if here.rank in item.ranks}
    with together(here, "split its shards"):
        numbers = {name: measured(item, work.calibration, here.device) for name, item in mine.items()}
        parts = {
            name: item.split(work.shards[name], item.ranks.index(here.rank), numbers[name])
            for name, item in mine.items()
        }
        parcels = {name: gather.parcel_to_first(here, i, parts[name]) for name, i in mine.items() if i.gather_first}
    moved = sum(gather.deliver(here, parcel) for parcel in parcels.values())
    if any(item.gather_first for item in items):
        with together(here, "join shards"):
            whole = {name: gather.open_first(here, mine[name], parcel) for name, parcel in parcels.items()}
            parts = {name: found for name, found in (parts | whole).items() if found is not None}
    return numbers, parts, moved
