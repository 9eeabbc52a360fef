"""What Megatron-Core needs in order to run on the CPU, and without Transformer Engine and flash-linear-attention; nothing is
changed where it has them.

A few lines of Megatron-Core name the CUDA device even on the CPU, and a few names are undefined without Transformer Engine.
`without_cuda()` replaces them inside its `with` alone.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode

from .linear_attention import l2_norm

try:
    from megatron.core.ssm.gated_delta_net import common as kernels  # from Megatron-Core 0.17 on
except ImportError:
    from megatron.core.ssm import gated_delta_net as kernels


class _OnCpu(TorchFunctionMode):
    """Turns device="cuda" into the CPU, and `tensor.cuda()` into the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs = kwargs | {"device": "cpu"}
        return func(*args, **(kwargs or {}))


@contextmanager
def without_cuda(device: torch.device | None = None) -> Iterator[None]:
    """Run Megatron-Core code on the CPU where `device` is the CPU or, if it is not given, where there is no CUDA."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    patches: list = []
    if not HAVE_TE:  # names that imports left undefined
        patches += [
            mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
            mock.patch.object(multi_latent_attention, "HAVE_TE", False),
        ]
    if not kernels.HAVE_FLA:  # then the forward pass of linear attention is plain torch, in its deterministic mode
        patches += [mock.patch.multiple(kernels, create=True, HAVE_FLA=True, l2norm=l2_norm)]
    if not on_gpu:
        patches += [
            mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),  # where buffers are made
            mock.patch.object(torch.cuda, "current_stream", lambda device=None: None),  # DDP
            mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
            mock.patch.object(CudaRNGStatesTracker, "fork", lambda tracker, name=None: nullcontext()),  # attention
            mock.patch.object(torch.cuda, "Event", mock.MagicMock),  # dispatchers of experts
            mock.patch.object(torch.cuda, "Stream", mock.MagicMock),
            _OnCpu(),
        ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
