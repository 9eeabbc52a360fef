"""Which rank this is and which ranks share what with it: the only reader of Megatron's parallel state."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from ..common.errors import NO_CUDA, ExportError, RankLost, StartError, message_of, no_more_files
from ..distributed.heartbeat import Pulse
from ..distributed.topology import Cut, Topology
from ..planning.request import SILENCE
from .cpu_compat import without_cuda

TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(hours=24)  # others wait here while rank 0 syncs a large checkpoint, or a node downloads one


@contextmanager
def current(timeout: float = SILENCE) -> Iterator[Topology]:
    """The topology that Megatron's parallel state describes. Collective: every rank of the world enters and leaves.

    If one rank alone raises, or is silent for `timeout` seconds, the others raise `RankLost`; a process that a collective holds is
    ended. `ExportError` if model parallelism is not initialized.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ExportError(
            "Megatron's model parallelism is not initialized: call parallel_state.initialize_model_parallel"
        )
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    if _on_cuda():  # all ranks form the NCCL communicator here, so that a few of them can send to one another later
        dist.all_reduce(torch.zeros(1, device=torch.cuda.current_device()))
    pulse = Pulse(dist.get_rank(), dist.get_world_size(), partial(_from_first, control), timeout)
    experts = Cut(
        rank=parallel_state.get_expert_tensor_parallel_rank(),
        size=parallel_state.get_expert_tensor_parallel_world_size(),
        group=parallel_state.get_expert_tensor_parallel_group(),
        replica=parallel_state.get_expert_data_parallel_rank(),
        replicas=parallel_state.get_expert_data_parallel_group(),
    )
    try:
        yield Topology(
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
            dp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
            vpp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
            cp_size=parallel_state.get_context_parallel_world_size(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            experts=experts,
            dispatch=replace(
                experts,
                rank=parallel_state.get_expert_tensor_and_model_parallel_rank(),
                size=parallel_state.get_expert_tensor_and_model_parallel_world_size(),
                group=parallel_state.get_expert_tensor_and_model_parallel_group(),
            ),
            stage_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
            control=control,
            device=torch.device("cuda", torch.cuda.current_device()) if _on_cuda() else torch.device("cpu"),
            pulse=pulse,
        )
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


@contextmanager
def enough_files() -> Iterator[None]:
    """`StartError` where the system gives this process no more files or sockets to open: every group of ranks takes some."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if told := no_more_files(error):
            raise StartError(told) from error
        raise


@contextmanager
def started(
    tp: int, pp: int, device: str | None, *, ep: int = 1, etp: int | None = None, vpp: int = 1
) -> Iterator[None]:
    """Start torch.distributed and Megatron's model parallelism for this process of a `torchrun`, or for it alone, and end them.

    `device` is "cuda" (NCCL), "cpu" (gloo), or None for CUDA where there is one; `etp` None is `tp`. `ExportError` unless the
    world is a multiple of tp * pp and of etp * ep * pp; `StartError` without the GPUs or the torchrun that this needs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError(NO_CUDA)
    world = {} if "RANK" in os.environ else _one_rank(math.lcm(tp * pp, ep * (etp or tp) * pp))
    if device == "cuda":
        _take_gpu()
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=TIMEOUT, **world)
    try:
        _check_world(dist.get_world_size(), tp, pp, ep, etp)
        with without_cuda(torch.device(device)):
            experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
            parallel_state.initialize_model_parallel(tp, pp, vpp if vpp > 1 else None, **experts)
        if device == "cuda":
            model_parallel_cuda_manual_seed(1234)  # attention forks this state; nothing here draws from it
        yield
    except RankLost:  # whose part in ending the groups the others would wait for
        raise
    except BaseException:
        _end()
        raise
    _end()


def _one_rank(needed: int) -> dict[str, Any]:
    """How a process that torchrun did not start is a world of its own; `StartError` where the sizes need more ranks."""
    if needed > 1:
        raise StartError(
            f"these sizes need {needed} ranks, and torchrun did not start this process. Start it so, with the same flags: "
            f"torchrun --nproc-per-node {needed} -m megatron_export export"
        )
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def _end() -> None:
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _check_world(world: int, tp: int, pp: int, ep: int, etp: int | None) -> None:
    if world % (tp * pp):
        raise ExportError(
            f"world size {world} is not tp * pp * dp: it is no multiple of --tp {tp} x --pp {pp} = {tp * pp}. "
            f"Start torchrun with --nproc-per-node {tp * pp}, or a multiple of it"
        )
    experts = ep * (etp or tp) * pp
    if world % experts:
        raise ExportError(
            f"world size {world} does not hold the experts: it is no multiple of --ep {ep} x --etp {etp or tp} x --pp {pp} = "
            f"{experts}. Start torchrun with --nproc-per-node {math.lcm(experts, tp * pp)}, or a multiple of it"
        )
