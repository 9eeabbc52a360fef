"""A world of ranks that hear each other: started and ended, with its heartbeat, a control group, and failures told to all.

What the ranks share with whom is told by whoever knows: Megatron's parallel state (mcore/parallel_state.py), or `plain` here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..common.errors import NO_CUDA, ExportError, RankLost, StartError, message_of, no_more_files
from .heartbeat import Pulse
from .topology import Cut, Topology

TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(hours=24)  # others wait here while rank 0 syncs a large checkpoint, or a node downloads one


@contextmanager
def living(
    groups: Callable[[], dict[str, Any]], timeout: float, device: torch.device | None = None
) -> Iterator[Topology]:
    """The topology that has the fields `groups` gives, while this rank is in it. Collective: every rank enters and leaves.

    device  where this rank works; None: the current GPU where the world talks over NCCL, else the CPU
    If one rank alone raises, or is silent for `timeout` seconds, the others raise `RankLost`; a process that a collective holds is
    ended.
    """
    shared = groups()
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    if _on_cuda():  # all ranks form the NCCL communicator here, so that a few of them can send to one another later
        dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()))
    pulse = Pulse(dist.get_rank(), dist.get_world_size(), partial(_from_first, control), timeout)
    here = torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else torch.device("cpu")
    ranks = {"rank": dist.get_rank(), "world": dist.get_world_size()}
    try:
        yield Topology(**ranks, **shared, control=control, device=device or here, pulse=pulse)
    except Exception as error:
        if isinstance(error, RankLost) or (isinstance(error, ExportError) and error.everywhere):
            raise
        if blamed := pulse.explain(error):
            raise RankLost(blamed) from error
        verdict = pulse.tell(message_of(error))
        if isinstance(error, ExportError) or dist.get_world_size() == 1:
            raise
        raise RankLost(verdict) from error
    finally:
        pulse.stop()
        dist.destroy_process_group(control)


@contextmanager
def plain(timeout: float, device: torch.device | None = None, *, replicas: bool = False) -> Iterator[Topology]:
    """The ranks of torch.distributed as it is, one world without pipeline stages; without one, this process alone.

    device    where the model is
    replicas  every rank sees whole tensors, and has data of its own, as under FSDP2; else parameters, those of experts too, are
              cut over all ranks: FSDP2's or tensor-parallel shards
    Collective, as `living`. `ExportError` if several ranks cannot send what is on their GPUs.
    """
    with nullcontext() if dist.is_initialized() else _alone(device):
        if device and device.type == "cuda" and dist.get_world_size() > 1 and not _on_cuda():
            raise ExportError(
                f"the model is on {device}, and torch.distributed was initialized without NCCL. Initialize it with "
                '"cpu:gloo,cuda:nccl", or with "nccl"'
            )
        alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        try:
            with living(partial(_undivided, alone, replicas), timeout, device) as here:
                yield here
        finally:
            dist.destroy_process_group(alone)


def _undivided(alone: ProcessGroup, replicas: bool) -> dict[str, Any]:
    """Who shares what where all ranks are one cut, or one data parallelism; `alone` is this rank's group of its own."""
    everyone = dist.group.WORLD
    mine, all_of_us = (0, 1, alone), (dist.get_rank(), dist.get_world_size(), everyone)
    (tp_rank, tp_size, tp_group), (dp_rank, dp_size, dp_group) = (mine, all_of_us) if replicas else (all_of_us, mine)
    return {
        "tp_rank": tp_rank,
        "tp_size": tp_size,
        "tp_group": tp_group,
        "dp_rank": dp_rank,
        "dp_size": dp_size,
        "dp_group": dp_group,
        "pp_size": 1,
        "vpp_size": 1,
        "cp_size": 1,
        "ep_size": 1,
        "experts": Cut(tp_rank, tp_size, tp_group, dp_rank, dp_group),
        "dispatch": Cut(tp_rank, tp_size, tp_group, dp_rank, dp_group),
        "stage_group": everyone,
    }


@contextmanager
def _alone(device: torch.device | None) -> Iterator[None]:
    """A world of this process alone, which talks over NCCL too where its model is on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if device and device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def started(device: str | None, needed: int = 1) -> Iterator[torch.device]:
    """Start torch.distributed for this process of a `torchrun`, or for it alone where `needed` is 1, and end it.

    `device` is "cuda" (NCCL), "cpu" (gloo), or None for CUDA where there is one. `StartError` without the GPUs or the torchrun that
    this needs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError(NO_CUDA)
    world = {} if "RANK" in os.environ else _one_rank(needed)
    if device == "cuda":
        _take_gpu()
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT, **world)
    with ending(dist.destroy_process_group):
        yield torch.device(device)


@contextmanager
def ending(groups: Callable[[], None]) -> Iterator[None]:
    """End groups of ranks by a call of `groups`, whatever happened, unless a rank is lost: for its part the others would wait."""
    try:
        yield
    except RankLost:
        raise
    except BaseException:
        groups()
        raise
    groups()


@contextmanager
def enough_files() -> Iterator[None]:
    """`StartError` where the system gives this process no more files or sockets to open: every group of ranks takes some."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if told := no_more_files(error):
            raise StartError(told) from error
        raise


def _from_first(control: ProcessGroup, mine: object) -> object:
    """What rank 0 passed, on every rank."""
    box = [mine]
    dist.broadcast_object_list(box, 0, group=control)
    return box[0]


def _on_cuda() -> bool:
    """Whether the world talks over NCCL, alone or beside gloo; without CUDA torch may list it all the same."""
    return torch.cuda.is_available() and "nccl" in dist.get_backend_config()


def _take_gpu() -> None:
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus and "NCCL_HOSTID" not in os.environ:  # with a host id per rank, NCCL lets ranks share a GPU
        raise StartError(f"{ranks} ranks on a machine with {gpus} GPUs. Start torchrun with --nproc-per-node {gpus}")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)


def _one_rank(needed: int) -> dict[str, Any]:
    """How a process that torchrun did not start is a world of its own; `StartError` where the sizes need more ranks."""
    if needed > 1:
        raise StartError(
            f"these sizes need {needed} ranks, and torchrun did not start this process. Start it so, with the same flags: "
            f"torchrun --nproc-per-node {needed} -m megatron_export export"
        )
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
