"""What ranks agree on: maxima, small objects, and failures (one rank's failure becomes every rank's at the next `together`)."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..common.errors import ExportError, Interrupted, message_of
from .signals import heed
from .topology import Cut, Topology


@contextmanager
def together(here: Topology, stage: str, heeding: bool = True, tensor: str = "") -> Iterator[Callable[[str], None]]:
    """Run a stage that talks to no other rank; if it fails anywhere, it fails everywhere with the same message.

    It yields a function that renames the stage. `tensor` names the tensor that the stage is about. If `heeding`, a signal to stop
    on any rank raises `Interrupted` on every rank.
    """
    failure: Exception | None = None

    def at(named: str) -> None:
        nonlocal stage
        stage = named
        here.pulse.at(stage, tensor)

    at(stage)
    try:
        yield at
        if heeding:
            heed()
    except Exception as error:  # noqa: BLE001 - every failure must reach the other ranks, which wait for this one
        failure = error
    here.pulse.check()
    if not _anywhere(here, failure is not None):
        return
    mine = None if failure is None else (message_of(failure), isinstance(failure, Interrupted), stage)
    messages = everyone(here, mine)
    first = next(rank for rank, message in enumerate(messages) if message is not None)
    text, interrupted, stage = messages[first]
    if interrupted or messages.count(messages[first]) == here.world:
        common = Interrupted(text) if interrupted else ExportError(text)
    else:
        common = ExportError(f"rank {first} failed to {stage}: {text}")
    common.everywhere = True
    try:
        raise common from failure
    finally:  # a traceback holds its frames: without these names, tensors of the stage are free when the caller has handled it
        del failure, common


def _anywhere(here: Topology, mine: bool) -> bool:
    """Whether it is so on any rank. One rank asks nobody: even so short a collective waits for other threads of its process."""
    if here.world == 1:
        return mine
    found = torch.tensor([int(mine)])
    dist.all_reduce(found, group=here.control)
    return bool(found.item())


def everyone(here: Topology, mine: object) -> list:
    """A small object from every rank, in rank order, on every rank."""
    theirs = [None] * here.world
    dist.all_gather_object(theirs, mine, group=here.control)
    return theirs


def from_first(here: Topology, mine: object) -> object:
    """Rank 0's object, on every rank."""
    box = [mine]
    dist.broadcast_object_list(box, 0, group=here.control)
    return box[0]


def at_first(here: Topology, mine: object) -> list | None:
    """An object from every rank, in rank order, on rank 0; None on the others."""
    theirs = [None] * here.world if here.first else None
    dist.gather_object(mine, theirs, 0, group=here.control)
    return theirs


def nodes(here: Topology) -> tuple[int, ...]:
    """The number of each rank's node, in rank order; nodes are told apart by host names."""
    names = everyone(here, socket.gethostname())
    return tuple(list(dict.fromkeys(names)).index(name) for name in names)


def spread(here: Topology, mine: dict[str, Tensor], experts: bool = False) -> dict[str, Tensor]:
    """The tensors of all pipeline stages, by name, on the CPU of every rank.

    `mine` are those of this rank's stage, the same on all ranks of the stage; if `experts`, those of this rank's own experts.
    """
    cut = here.experts
    source = cut.rank == cut.replica == 0 if experts else dist.get_rank(here.stage_group) == 0
    mine = {name: tensor.contiguous().cpu() for name, tensor in mine.items()} if source else {}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in mine.items()}
    found: dict[str, Tensor] = {}
    for rank, theirs in enumerate(everyone(here, specs)):
        for name, (dtype, shape) in theirs.items():
            tensor = mine[name].clone() if rank == here.rank else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor.view(-1).view(torch.uint8), rank, group=here.control)
            found[name] = tensor
    return dict(sorted(found.items()))


def maximum(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Element-wise maximum over a group (None: all ranks), of any shape and dtype; `values` is overwritten if it is contiguous."""
    values = values.contiguous()
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def total(values: Tensor, group: ProcessGroup) -> Tensor:
    """Element-wise sum over a group, of any shape and dtype; `values` is overwritten if it is contiguous."""
    values = values.contiguous()  # gloo sums the storage of others wrongly, and says nothing
    dist.all_reduce(values, group=group)
    return values


def whole(cut: Cut, shard: Tensor, dim: int) -> Tensor:
    """The whole tensor, of which each rank of a cut holds an equal shard along `dim`."""
    if cut.size == 1:
        return shard
    mine = shard.movedim(dim, 0).contiguous()
    sent = mine.reshape(-1).view(torch.uint8)  # as bytes: gloo does not gather every dtype
    received = [torch.empty_like(sent) for _ in range(cut.size)]
    dist.all_gather(received, sent, group=cut.group)
    return torch.cat([part.view(shard.dtype).view(mine.shape) for part in received]).movedim(0, dim)
