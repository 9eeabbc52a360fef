"""Which rank this is and which ranks share what with it: the only reader of Megatron's parallel state."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ..common.errors import ExportError
from ..distributed import world
from ..distributed.topology import Cut, Topology
from ..planning.request import SILENCE
from .cpu_compat import without_cuda


@contextmanager
def current(timeout: float = SILENCE) -> Iterator[Topology]:
    """The topology that Megatron's parallel state describes. Collective: every rank of the world enters and leaves.

    Ranks hear each other, as in `distributed.world.living`. `ExportError` if model parallelism is not initialized.
    """
    with world.living(_groups, timeout) as here:
        yield here


def _groups() -> dict[str, Any]:
    """What Megatron's parallel state says of a `Topology`."""
    if not parallel_state.model_parallel_is_initialized():
        raise ExportError(
            "Megatron's model parallelism is not initialized: call parallel_state.initialize_model_parallel"
        )
    experts = Cut(
        rank=parallel_state.get_expert_tensor_parallel_rank(),
        size=parallel_state.get_expert_tensor_parallel_world_size(),
        group=parallel_state.get_expert_tensor_parallel_group(),
        replica=parallel_state.get_expert_data_parallel_rank(),
        replicas=parallel_state.get_expert_data_parallel_group(),
    )
    dispatch = replace(
        experts,
        rank=parallel_state.get_expert_tensor_and_model_parallel_rank(),
        size=parallel_state.get_expert_tensor_and_model_parallel_world_size(),
        group=parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    return {
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "tp_size": parallel_state.get_tensor_model_parallel_world_size(),
        "dp_rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "dp_size": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "dp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pp_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp_size": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp_size": parallel_state.get_context_parallel_world_size(),
        "ep_size": parallel_state.get_expert_model_parallel_world_size(),
        "experts": experts,
        "dispatch": dispatch,
        "stage_group": parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    }


@contextmanager
def started(
    tp: int, pp: int, device: str | None, *, ep: int = 1, etp: int | None = None, vpp: int = 1
) -> Iterator[None]:
    """Start torch.distributed and Megatron's model parallelism for this process of a `torchrun`, or for it alone, and end them.

    `device` as in `distributed.world.started`; `etp` None is `tp`. `ExportError` unless the world is a multiple of tp * pp and of
    etp * ep * pp; `StartError` without the GPUs or the torchrun that this needs.
    """
    needed = math.lcm(tp * pp, ep * (etp or tp) * pp)
    with world.started(device, needed) as place, world.ending(parallel_state.destroy_model_parallel):
        _check_world(dist.get_world_size(), tp, pp, ep, etp)
        with without_cuda(place):
            experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
            parallel_state.initialize_model_parallel(tp, pp, vpp if vpp > 1 else None, **experts)
        if place.type == "cuda":
            model_parallel_cuda_manual_seed(1234)  # attention forks this state; nothing here draws from it
        yield


def _check_world(ranks: int, tp: int, pp: int, ep: int, etp: int | None) -> None:
    if ranks % (tp * pp):
        raise ExportError(
            f"world size {ranks} is not tp * pp * dp: it is no multiple of --tp {tp} x --pp {pp} = {tp * pp}. "
            f"Start torchrun with --nproc-per-node {tp * pp}, or a multiple of it"
        )
    experts = ep * (etp or tp) * pp
    if ranks % experts:
        raise ExportError(
            f"world size {ranks} does not hold the experts: it is no multiple of --ep {ep} x --etp {etp or tp} x --pp {pp} = "
            f"{experts}. Start torchrun with --nproc-per-node {math.lcm(experts, tp * pp)}, or a multiple of it"
        )
