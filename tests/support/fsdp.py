"""Checkpoints that Megatron-FSDP's own code writes, on the CPU: what Megatron-LM saves with --ckpt-format fsdp_dtensor."""

import argparse
import random
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp import MegatronFSDP
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.distributed.fsdp.src.megatron_fsdp.utils import FSDPDistributedIndex
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint import FileSystemWriter

from megatron_export.mcore.cpu_compat import without_cuda

from .live import loaded
from .models import read_json
from .saving import ITERATION, PLACE, arguments

_NAMES = ("dp_cp", "tp")


def saved_by_fsdp(source: Path, folder: Path, sizes: dict, *, args: dict | None = None) -> None:
    """In a rank: save the model of an HF folder, trained by Megatron-FSDP at these sizes, as iteration 7 of `folder`."""
    with loaded(source, **sizes) as (model, _):
        _mark(model)
        no_gpu = mock.patch.object(torch.cuda, "current_device", lambda: 0)
        with without_cuda(torch.device("cpu")), no_gpu:
            said = vars(arguments(read_json(source / "config.json"))) | {
                "tensor_model_parallel_size": sizes.get("tp", 1)
            }
            _save(_wrapped(model), folder / PLACE, argparse.Namespace(**said | (args or {})))
        if dist.get_rank() == 0:
            (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def _mark(model: nn.Module) -> None:
    """Say of each parameter how it is cut, as Megatron-Core does where it fills them."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            if module.weight is None:  # the output layer of a tied model
                continue
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def _wrapped(model: nn.Module) -> nn.Module:
    """The model as `FullyShardedDataParallel` of Megatron-Core wraps it, which has no mesh of CPUs."""
    sizes = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
    }
    groups = parallel_state.get_data_parallel_group(with_context_parallel=True), _tensor_parallel()
    of_experts = parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    ranks = torch.arange(dist.get_world_size())
    grid = ranks.view(sizes["ep"], -1, sizes["etp"])
    own = next(part for part in grid if dist.get_rank() in part)
    index = FSDPDistributedIndex(
        device_mesh=_mesh(groups, ranks.view(-1, sizes["tp"])),
        dp_shard_dim="dp_cp",
        tp_dim="tp",
        expt_device_mesh=_mesh(of_experts, own),
    )
    wrapped = nn.Module()
    wrapped.config = model.config
    wrapped.module = MegatronFSDP(
        module=model,
        dist_index=index,
        ddp_config=DistributedDataParallelConfig(
            use_megatron_fsdp=True,
            data_parallel_sharding_strategy="optim_grads_params",
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        fsdp_unit_modules=[TransformerLayer],
        device=torch.device("cpu"),
    )
    return wrapped


def _tensor_parallel() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def _mesh(groups: tuple[dist.ProcessGroup, ...], ranks: torch.Tensor) -> DeviceMesh:
    return DeviceMesh.from_group(list(groups), device_type="cpu", mesh=ranks.tolist(), mesh_dim_names=_NAMES)


def _save(wrapped: nn.Module, place: Path, trained: argparse.Namespace) -> None:
    """`preprocess_fsdp_dtensor_state_dict` and `save_checkpoint` of Megatron-LM's checkpointing.py."""
    state = wrapped.module.state_dict()
    handle_fp8_extra_state_case(state)
    moments = {key: {"exp_avg": torch.zeros_like(value)} for key, value in list(state.items())[:3]}
    if wrapped.config.gated_linear_unit:
        state, _ = handle_swiglu_in_state_dict(wrapped, state, None)
    if wrapped.config.num_moe_experts:
        state = handle_experts_in_state_dict(state, wrapped.config.num_moe_experts)
    whole = {
        "args": trained,
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": state,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4}]},
        "rng_state": {f"({dist.get_rank()}, 0)": [random.getstate()]},
    }
    preprocess_state_dict_for_uneven_dtensor(whole)
    dist.checkpoint.save(whole, storage_writer=FileSystemWriter(place))
