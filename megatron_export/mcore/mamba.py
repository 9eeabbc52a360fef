"""Mamba mixers of Megatron-Core without mamba_ssm, which their constructor and forward pass ask for: here they are plain torch.

A head keeps a state [width, state]. With x, B and C after the convolution, d = softplus(dt + dt_bias) and A = -exp(A_log),

    state = exp(A d) state + d x B^T        output = state C + D x

B and C belong to a group of heads. Tokens are taken in chunks: inside one, all pairs at once; from one to the next, the state. The
output is gated by silu(z) and normed by group. All of that is in float32. Source: Dao and Gu, "Transformers are SSMs", 2024.
"""

from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus

CHUNK = 64  # tokens: pairs of them are held for each head


def mixer(kernel: int, on_gpu: bool) -> ModuleSpec:
    """A mixer whose convolution sees `kernel` tokens: Megatron-Core's own where its kernels are there, else plain torch."""
    parts = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    kernels = mamba_mixer.HAVE_MAMBA_SSM and mamba_mixer.HAVE_EINOPS and mamba_mixer.causal_conv1d_fn is not None
    return ModuleSpec(Mixer if on_gpu and kernels else PlainMixer, params={"d_conv": kernel}, submodules=parts)


class GatedNorm(nn.Module):
    """Of [..., inner]: RMSNorm of each group of numbers, of what a gate was multiplied with."""

    def __init__(
        self, size: int, eps: float, group_size: int, device: torch.device, dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        gated = (hidden.float() * silu(gate.float())).unflatten(-1, (-1, self.group_size))
        return torch.rms_norm(gated, (self.group_size,), eps=self.eps).flatten(-2) * self.weight.float()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As Megatron-Core's own norm is saved."""
        group = parallel_state.get_tensor_model_parallel_group()
        more = {"tp_group": group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **more)


class Mixer(mamba_mixer.MambaMixer):
    """Megatron-Core's mixer, whose norm goes by the settings: there it has an epsilon of its own."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.norm.eps = self.config.layernorm_epsilon


class PlainMixer(Mixer):
    """Its parameters, cuts and checkpoints. It forgets what it saw: a call has whole samples."""

    def __init__(self, *args: Any, **named: Any) -> None:
        with (
            mock.patch.multiple(mamba_mixer, HAVE_MAMBA_SSM=True, HAVE_EINOPS=True, ExtendedRMSNorm=GatedNorm),
            mock.patch.object(mamba_context_parallel, "HAVE_EINOPS", True),
        ):
            super().__init__(*args, **named)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[tokens, batch, hidden] -> the same; and no bias."""
        heads, inner = self.nheads_local_tp, self.d_inner_local_tp
        states = self.ngroups_local_tp * self.d_state
        mixed = self.in_proj(hidden_states)[0].transpose(0, 1)  # [batch, tokens, ...]
        gate, convolved, steps = mixed.split((inner, inner + 2 * states, heads), dim=-1)
        weight, bias = _convolution(self)
        before = nn.functional.pad(convolved.mT, (weight.shape[-1] - 1, 0))
        convolved = silu(conv1d(before, weight, bias, groups=len(weight))).mT
        values, keys, queries = convolved.split((inner, states, states), dim=-1)
        scanned = scan(
            values.unflatten(-1, (heads, -1)).float(),
            softplus(steps.float() + self.dt_bias.float()),
            -self.A_log.float().exp(),
            *(each.unflatten(-1, (self.ngroups_local_tp, -1)).float() for each in (keys, queries)),
        )
        scanned = scanned + self.D.float()[:, None] * values.unflatten(-1, (heads, -1)).float()
        return self.out_proj(self.norm(scanned.flatten(-2), gate).to(mixed.dtype).transpose(0, 1).contiguous())


def _convolution(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [channels, 1, kernel] and bias, which are parameters of the mixer itself from Megatron-Core 0.19 on."""
    own = dict(module.named_parameters())
    return tuple(
        own[f"conv1d.{leaf}"] if f"conv1d.{leaf}" in own else own[f"conv1d_{leaf}"] for leaf in ("weight", "bias")
    )


def scan(values: Tensor, steps: Tensor, decay: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """The outputs, without D, of the recurrence from an empty state. float32 all.

    values [batch, tokens, heads, width], steps [batch, tokens, heads], decay [heads], keys (B) and queries (C)
    [batch, tokens, groups, state]; returns as `values`.
    """
    per_group = values.shape[2] // keys.shape[2]
    state, outputs = values.new_zeros(*values.shape[::2], values.shape[-1], keys.shape[-1]), []
    for x, d, b, c in zip(*(each.split(CHUNK, dim=1) for each in (values, steps, keys, queries)), strict=True):
        b, c = (
            each.repeat_interleave(per_group, dim=2).transpose(1, 2) for each in (b, c)
        )  # [batch, heads, chunk, state]
        x, since = (x * d[..., None]).transpose(1, 2), (d * decay).cumsum(1).transpose(1, 2)  # since the chunk began
        between = (since[..., :, None] - since[..., None, :]).tril()  # [batch, heads, to, from]
        pairs = (c @ b.mT * between.exp()).tril()
        outputs.append(pairs @ x + since.exp()[..., None] * (c @ state.mT))
        left = (since[..., -1:] - since).exp()[..., None]
        state = state * since[..., -1].exp()[..., None, None] + (x * left).mT @ b
    return torch.cat(outputs, dim=2).transpose(1, 2)
