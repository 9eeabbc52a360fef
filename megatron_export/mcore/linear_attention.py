"""Gated delta nets of Megatron-Core: which rows of a live one are which, and how one is built and run in plain torch.

ms-swift has a class of the same name and the same parameters, whose rows lie otherwise: only Megatron-Core's own is read.
"""

from collections.abc import Iterator

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn

from ..common.errors import ExportError
from ..common.storage import kind_of

MIXED = "self_attention.in_proj.weight"


def check_delta_nets(chunk: nn.Module) -> None:
    """`ExportError` for linear attention whose rows are not known to lie as Megatron-Core's."""
    for name, module in chunk.named_modules():
        kind = type(module)
        if (
            name.endswith(".self_attention")
            and hasattr(module, "in_proj")
            and kind.__module__ != GatedDeltaNet.__module__
        ):
            raise ExportError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}, and how the rows of its in_proj lie is not known: only "
                "Megatron-Core's own GatedDeltaNet is read"
            )


def without_beta_and_alpha(name: str, tensor: Tensor, chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A parameter under canonical names: of an in_proj of linear attention the rows of q, k, v and z, and those of b and a."""
    if not name.endswith(MIXED):
        yield name, tensor
        return
    if kind := kind_of(tensor):
        raise ExportError(f"{name} is a {kind}: the rows of linear attention are told apart in plain tensors only")
    config = chunk.config
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    last = tensor.shape[0] * config.linear_num_value_heads // (keys + values + config.linear_num_value_heads)
    yield name, tensor[:-last]
    yield name.replace("in_proj.", "in_proj_ba."), tensor[-last:]


def delta_net() -> ModuleSpec:
    """The local spec's linear attention, which Megatron-Core has with Transformer Engine's linears only."""
    parts = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear)
    return ModuleSpec(module=GatedDeltaNet, submodules=parts)


def l2_norm(values: Tensor) -> Tensor:
    """As flash-linear-attention's, which Megatron-Core calls."""
    return (values.float() * torch.rsqrt(values.float().square().sum(-1, keepdim=True) + 1e-6)).type_as(values)
