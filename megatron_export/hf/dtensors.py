"""How a tensor of a transformers model is spread over ranks: by FSDP2 and by transformers' tensor parallelism, as DTensors say.

    Shard(d)                      dim d is cut into chunks, all as long but for the last
    _StridedShard(d, s)           so is each of the s blocks that dim d consists of (gate over up)
    Replicate()                   every rank has it whole

An axis of the mesh in which a tensor is replicated makes no difference: the first of the replicas is exported.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from ..common.errors import ExportError


@dataclass(frozen=True)
class Spread:
    """The ranks that hold the chunks of a tensor, in order; the dim that is cut, and into how many blocks it was divided before."""

    ranks: tuple[int, ...]
    dim: int
    blocks: int = 1


def spread_of(name: str, tensor: Tensor) -> Spread | None:
    """How a tensor is spread; None where every rank has it whole. `ExportError` for what is cut along two axes of its mesh."""
    if not isinstance(tensor, DTensor):
        return None
    mesh, cut = tensor.device_mesh, []
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate) or mesh.size(axis) == 1:
            continue
        blocks = placement.split_factor if isinstance(placement, _StridedShard) else int(isinstance(placement, Shard))
        cut.append((axis, placement, blocks))
    if not cut:
        return None
    (axis, placement, blocks), *others = cut
    if others or not blocks:
        raise ExportError(
            f"{name} is placed as {tensor.placements}: only tensors that are cut along one axis of their mesh are exported. Gather "
            "it along the other, or export from one process"
        )
    ranks = mesh.mesh.movedim(axis, 0).flatten(1)[:, 0] if mesh.ndim > 1 else mesh.mesh
    return Spread(tuple(ranks.tolist()), placement.dim % tensor.dim(), blocks)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_of(tensor: Tensor) -> Tensor:
    """The whole tensor. Collective over the ranks that it is spread over."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_whole_when_called(model: nn.Module) -> None:
    """`ExportError` unless modules are called with whole inputs, and have whole weights then: uncut, or cut by FSDP2."""
    cut = [name for name, tensor in model.named_parameters() if spread_of(name, tensor)]
    if cut and not _sharded_by_fsdp(model):
        raise ExportError(
            f"{cut[0]} (of {len(cut)} such) is cut over ranks, and not by FSDP2, so that no rank sees whole inputs. Calibrate it "
            "in one process or under FSDP2, save the statistics, and load them here"
        )


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward pass."""
    for module in _sharded_by_fsdp(model):
        module.reshard()


def _sharded_by_fsdp(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def fully_sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """A model that every rank has, cut by FSDP2 over all of them, layer by layer. Collective."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
