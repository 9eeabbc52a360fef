"""The way of encoded bytes between ranks: from those that hold a shard to the one that writes it.

A sender packs the tensors of a bucket into one uint8 tensor in the plan's order; the receiver, who has the same plan, unpacks it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.blocks import blocks_in
from ..common.errors import ExportError
from ..common.piece import Piece
from ..common.shards import Shards
from ..common.storage import bytes_of, kind_of
from ..distributed.collectives import everyone
from ..distributed.topology import Topology
from ..formats.cpu import empty
from ..models import is_expert
from ..planning.parameter import Item
from ..planning.plan import Held
from ..planning.row_strips import placed
from ..planning.shard_files import Bucket
from ..planning.tensor_spec import Output
from .bucket_load import padded, size_of


def locate(here: Topology, shards: Shards) -> dict[str, Held]:
    """Where every canonical parameter lives; of replicas, the first. Collective. `ExportError` if several stages have it."""
    mine = {}
    for name, shape in shards.shapes.items():
        cut = here.cut(is_expert(name))
        if cut.replica == 0:
            mine[name] = (cut.rank, shape, kind_of(shards.live[name]), blocks_in(shards.live[name]))
    found: dict[str, list[tuple]] = {}
    for rank, theirs in enumerate(everyone(here, mine)):
        for name, (index, *told) in theirs.items():
            found.setdefault(name, []).append((index, rank, *told))
    held = {}
    for name, places in found.items():
        places.sort(key=itemgetter(0, 1))
        indices, ranks, shapes, kinds, blocks = zip(*places, strict=True)
        if len(set(indices)) < len(places):
            raise ExportError(f"{name} lives on several pipeline stages: ranks {list(ranks)}")
        odd = ""
        if len(set(shapes)) > 1:
            odd = f"{name} has different shapes on its ranks: {list(zip(ranks, shapes, strict=True))}"
        same = blocks[0] if len(set(blocks)) == 1 else None
        held[name] = Held(ranks, shapes[0], odd, max(kinds), blocks=same, at_hand=not any(kinds))
    return held


@dataclass(frozen=True)
class Parcel:
    """Messages on their way to rank `to`, ready to travel: this rank's own, packed, and there a buffer for every other.

    own  on rank `to`, what it made itself of its items, by canonical name, which is not packed

    All that can fail for one rank alone (packing, allocating, unpacking) is done before and after `deliver`, inside
    `together`; `deliver` itself only moves bytes.
    """

    to: int
    mine: Tensor | None
    received: dict[int, Tensor]
    own: dict[str, dict[str, Piece]] = field(default_factory=dict)


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
    shards = [_unpack(parcel.received[rank], 0, item.raw_message(index)) for index, rank in enumerate(item.ranks)]
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
            if not size_of(theirs := item.message(index)) or rank == here.rank == bucket.writer:
                continue
            sizes[rank] = sizes.get(rank, 0) + size_of(theirs)
            if rank == here.rank:
                message += theirs
                tensors += (encoded[item.source.canonical][output.name].data for output in theirs)
    parcel = _parcel(here, bucket.writer, sizes, _packed(message, tensors) if message else None)
    return replace(parcel, own=encoded) if here.rank == bucket.writer else parcel


def open_at_writer(bucket: Bucket, parcel: Parcel) -> Iterator[tuple[Output, Tensor]]:
    """The tensors of the checkpoint that are in a bucket, or slices or strips of them, on its writer's device."""
    offsets = dict.fromkeys(parcel.received, 0)
    for item in bucket.items:
        shards = []
        for index, rank in enumerate(item.ranks):
            if not size_of(message := item.message(index)):  # the last shards of a padded vocabulary may have no rows
                continue
            if rank == parcel.to:
                own = parcel.own[item.source.canonical]
                shards.append({output.name: own[output.name] for output in message})
            else:
                shards.append(_unpack(parcel.received[rank], offsets[rank], message))
                offsets[rank] += size_of(message)
        yield from placed(item, shards)


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
    """The tensors of a bucket that its writer has, on every rank's device. Collective."""
    mine = [tensor for _, tensor in tensors]
    outputs = [output for item in bucket.items for output in item.outputs]
    packed = torch.empty(size_of(outputs), dtype=torch.uint8, device=here.device)
    if here.rank == bucket.writer:
        packed = _packed(outputs, mine)
    dist.broadcast(packed, bucket.writer)
    return list(_unpacked(packed, 0, outputs))


def _parcel(here: Topology, to: int, sizes: dict[int, int], mine: Tensor | None) -> Parcel:
    if here.rank != to:
        return Parcel(to, mine, {})
    received = {r: torch.empty(size, dtype=torch.uint8, device=here.device) for r, size in sizes.items() if r != to}
    return Parcel(to, mine, received if mine is None else received | {to: mine})


def _wait(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _packed(message: Sequence[Output], tensors: Sequence[Tensor]) -> Tensor:
    """One uint8 tensor: each tensor's bytes, padded so that the next one is aligned for any dtype; nobody reads the padding."""
    packed = empty((size_of(message),), torch.uint8, tensors[0].device)
    offset = 0
    for output, data in zip(message, tensors, strict=True):
        assert (data.dtype, tuple(data.shape)) == (output.torch_dtype, output.shape), (
            f"{output.name} is {data.dtype} {tuple(data.shape)}, and was planned as {output.torch_dtype} {output.shape}"
        )
        packed[offset : offset + output.nbytes] = bytes_of(data)
        offset += padded(output.nbytes)
    return packed


def _unpacked(packed: Tensor, offset: int, message: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
    """The tensors of a message that starts at byte `offset`: views of its bytes."""
    for output in message:
        yield output, packed[offset : offset + output.nbytes].view(output.torch_dtype).reshape(output.shape)
        offset += padded(output.nbytes)


def _unpack(packed: Tensor, offset: int, message: Iterable[Output]) -> dict[str, Piece]:
    return {output.name: Piece(data, output.axes) for output, data in _unpacked(packed, offset, message)}
