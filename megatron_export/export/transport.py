"""The way of encoded bytes between ranks: from those that hold a shard to the one that writes it.

Messages carry bytes: each sender packs the tensors of a bucket into one uint8 tensor in the plan's order, and the receiver, who has
the same plan, unpacks it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.errors import ExportError
from ..common.piece import Piece
from ..distributed.collectives import everyone
from ..distributed.topology import Topology
from ..models import is_expert
from ..planning.parameter import Item
from ..planning.plan import Held
from ..planning.shard_files import Bucket
from ..planning.tensor_spec import Output

ALIGNMENT = 16


def locate(here: Topology, shards: dict[str, Tensor]) -> dict[str, Held]:
    """Where every canonical parameter of the whole model lives; of replicas, only the first counts."""
    mine = {}
    for name, shard in shards.items():
        cut = here.cut(is_expert(name))
        if cut.replica == 0:
            mine[name] = (cut.rank, tuple(shard.shape))
    found: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {}
    for rank, theirs in enumerate(everyone(here, mine)):
        for name, (index, shape) in theirs.items():
            found.setdefault(name, []).append((index, rank, shape))
    held = {}
    for name, places in found.items():
        places.sort()
        if len({index for index, _, _ in places}) < len(places):
            raise ExportError(f"{name} lives on several pipeline stages: ranks {[rank for _, rank, _ in places]}")
        odd = ""
        if len({shape for _, _, shape in places}) > 1:
            odd = f"{name} has different shapes on its ranks: {[(rank, shape) for _, rank, shape in places]}"
        held[name] = Held(tuple(rank for _, rank, _ in places), places[0][2], odd)
    return held


@dataclass(frozen=True)
class Parcel:
    """Messages on their way to rank `to`, ready to travel: this rank's own, packed, and there a buffer for every other.

    All that can fail for one rank alone (packing, allocating, unpacking) is done before and after `deliver`, inside
    `together`; `deliver` itself only moves bytes.
    """

    to: int
    mine: Tensor | None
    received: dict[int, Tensor]


def parcel_to_first(here: Topology, item: Item, parts: dict[str, Piece]) -> Parcel:
    """The bfloat16 shards of an item, on their way to the first rank that holds it."""
    messages = {rank: item.raw_message(index) for index, rank in enumerate(item.ranks)}
    sizes = {rank: size_of(message) for rank, message in messages.items()}
    mine = messages[here.rank]
    return _parcel(here, item.ranks[0], sizes, _packed(mine, [parts[output.name].data for output in mine]))


def open_first(here: Topology, item: Item, parcel: Parcel) -> dict[str, Piece] | None:
    """The whole bfloat16 parts of an item on the first rank that holds it; the others get None."""
    if here.rank != parcel.to:
        return None
    shards = [_unpack(parcel.received[rank], 0, item.raw_message(index))[0] for index, rank in enumerate(item.ranks)]
    return item.opened(item.join(shards))


def parcel_to_writer(here: Topology, bucket: Bucket, encoded: dict[str, dict[str, Piece]]) -> Parcel:
    """The encoded tensors of a bucket, on their way to the rank that writes it.

    `encoded` maps the canonical names of this rank's items to what it made of them.
    """
    sizes: dict[int, int] = {}
    message: list[Output] = []
    tensors: list[Tensor] = []
    for item in bucket.items:
        for index, rank in enumerate(item.ranks):
            if not (theirs := item.message(index)):
                continue
            sizes[rank] = sizes.get(rank, 0) + size_of(theirs)
            if rank == here.rank:
                message += theirs
                tensors += (encoded[item.source.canonical][output.name].data for output in theirs)
    return _parcel(here, bucket.writer, sizes, _packed(message, tensors) if message else None)


def open_at_writer(bucket: Bucket, parcel: Parcel) -> Iterator[tuple[Output, Tensor]]:
    """The tensors of the checkpoint that are in a bucket, or slices of them, on its writer's device."""
    offsets = dict.fromkeys(parcel.received, 0)
    for item in bucket.items:
        shards = []
        for index, rank in enumerate(item.ranks):
            if message := item.message(index):
                shard, offsets[rank] = _unpack(parcel.received[rank], offsets[rank], message)
                shards.append(shard)
        yield from item.assembled(item.join(shards))


def opening_bytes(item: Item) -> int:
    """Memory that `open_at_writer` takes of an item beside its messages: shards are joined, the dims of stacks are swapped."""
    nbytes = sum(output.nbytes for output in item.outputs)
    return nbytes * ((len(item.ranks) > 1 and not item.gather_first) + item.stacked)


def deliver(here: Topology, parcel: Parcel) -> int:
    """Move the bytes; every rank that has a part in the parcel calls this. Returns how many this one sent."""
    if here.rank == parcel.to:
        sources = {rank: buffer for rank, buffer in parcel.received.items() if rank != here.rank}
        _wait([dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in sources.items()])
        return 0
    if parcel.mine is None:
        return 0
    _wait([dist.P2POp(dist.isend, parcel.mine, parcel.to)])
    return parcel.mine.nbytes


def to_all(here: Topology, bucket: Bucket, tensors: Iterable[tuple[Output, Tensor]]) -> list[tuple[Output, Tensor]]:
    """The tensors of a bucket that its writer has, on every rank's device."""
    mine = list(tensors)
    outputs = [output for item in bucket.items for output in item.outputs]
    packed = torch.empty(size_of(outputs), dtype=torch.uint8, device=here.device)
    if here.rank == bucket.writer:
        packed = _packed(outputs, [tensor for _, tensor in mine])
    dist.broadcast(packed, bucket.writer)
    found, offset = [], 0
    for output in outputs:
        data = packed[offset : offset + output.nbytes].view(output.dtype).reshape(output.shape)
        found.append((output, data))
        offset += _padded(output.nbytes)
    return found


def _parcel(here: Topology, to: int, sizes: dict[int, int], mine: Tensor | None) -> Parcel:
    if here.rank != to:
        return Parcel(to, mine, {})
    others = {rank: size for rank, size in sizes.items() if rank != to}
    received = {rank: torch.empty(size, dtype=torch.uint8, device=here.device) for rank, size in others.items()}
    return Parcel(to, mine, received if mine is None else received | {to: mine})


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def size_of(message: Sequence[Output]) -> int:
    """Bytes of a message."""
    return sum(_padded(output.nbytes) for output in message)


def _packed(message: Sequence[Output], tensors: Sequence[Tensor]) -> Tensor:
    """One uint8 tensor: each tensor's bytes, padded so that the next one is aligned for any dtype; nobody reads the padding."""
    packed = torch.empty(size_of(message), dtype=torch.uint8, device=tensors[0].device)
    offset = 0
    for output, data in zip(message, tensors, strict=True):
        assert (data.dtype, tuple(data.shape)) == (output.dtype, output.shape), output
        packed[offset : offset + output.nbytes] = data.contiguous().reshape(-1).view(torch.uint8)
        offset += _padded(output.nbytes)
    return packed


def _unpack(packed: Tensor, offset: int, message: tuple[Output, ...]) -> tuple[dict[str, Piece], int]:
    pieces = {}
    for output in message:
        data = packed[offset : offset + output.nbytes].view(output.dtype).reshape(output.shape)
        pieces[output.name] = Piece(data, output.axes)
        offset += _padded(output.nbytes)
    return pieces, offset
