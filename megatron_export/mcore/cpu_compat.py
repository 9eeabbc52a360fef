"""What Megatron-Core needs in order to run on the CPU, and without Transformer Engine; for a model on a GPU with it,
nothing at all happens.

Megatron-Core's CPU path is complete but for a few lines that name the CUDA device: buffers are created on
`torch.cuda.current_device()` (pipeline receives, vocabulary-parallel masks) or on "cuda" (token counts of the
schedules), tied embeddings are moved with `.cuda()` under pipeline parallelism, `torch.cuda.synchronize()` is called,
attention forks the CUDA random state around its dropout, DDP looks up the current stream, which it then needs only for
CUDA graphs, and the dispatchers of experts order their copies by CUDA events. Without Transformer Engine, routers and
latent attention trip over names that their imports left undefined. `without_cuda()` answers those with the CPU, only
inside its `with`, and leaves torch and Megatron as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from torch.overrides import TorchFunctionMode


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
    if on_gpu:
        with _without_transformer_engine():
            yield
        return
    with (
        _without_transformer_engine(),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: None),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda tracker, name=None: nullcontext()),
        mock.patch.object(torch.cuda, "Event", mock.MagicMock),
        mock.patch.object(torch.cuda, "Stream", mock.MagicMock),
        _OnCpu(),
    ):
        yield


@contextmanager
def _without_transformer_engine() -> Iterator[None]:
    """Make Megatron's own fallbacks reachable where Transformer Engine is not installed."""
    if HAVE_TE:
        yield
        return
    with (
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(multi_latent_attention, "HAVE_TE", False),
    ):
        yield
