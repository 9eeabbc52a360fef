"""Runs calibration data through a model and returns the statistics as plain tensors: the only file that knows hooks.

Statistics are float32 scalars on the CPU, named by canonical Megatron module and the same on every rank:

    decoder.layers.{l}.{...}.linear_{...}.input_amax   largest |input| of the linear, over all tokens
    decoder.layers.{l}.self_attention.k_amax, .v_amax  largest |key| after rotation, largest |value|

A maximum does not depend on the order of samples, batches or ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, groupby, islice
from math import inf, isfinite

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from . import topology
from .cpu import without_cuda
from .errors import ExportError
from .formats import FORMATS, chosen
from .gather import everyone, together
from .model import attentions_of, chunks_of, finish_gathering, linear_input, linears_of
from .progress import Progress, quiet
from .topology import Topology

Statistics = dict[str, Tensor]
Maxima = dict[str, Tensor]


def calibrate(
    model: nn.Module | list[nn.Module],
    batches: Iterable[Tensor],
    *,
    format: str = "fp8",
    progress: Progress = quiet,
) -> Statistics:
    """Measure what `format` needs of a live Megatron-Core model; the model is left as it was.

    model    a `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or not
    batches  int64 token ids [batch, tokens] each; the ranks of one data-parallel replica pass the same batches, and
             replicas may each pass a share
    Collective: all ranks call it. Raises `ExportError` for tokens outside the (padded) vocabulary, and for NaN or Inf in
    activations, naming the module. An exception of the model itself, such as CUDA running out of memory, is raised on
    its rank alone, as in training. A format that needs no activations (bf16) returns {} at once.
    """
    if not chosen(FORMATS, format).CALIBRATED:
        return {}
    with topology.current() as here:
        with together(here, "check the calibration data"):
            batches = list(batches)
            _check_parallelism(chunks_of(model)[0], batches, here)
            _check(batches, chunks_of(model)[0].vocab_size)
        finish_gathering(model)
        maxima: Maxima = {}
        with _evaluating(model), _watching(model, maxima), without_cuda(here.device), torch.no_grad():
            _forward(model, batches, here, progress)
        return _agreed(here, maxima)


def _check_parallelism(chunk: nn.Module, batches: list[Tensor], here: Topology) -> None:
    if here.cp_size > 1:
        raise ExportError(
            f"calibration under context parallelism ({here.cp_size}) is not supported: measure without it, save the "
            "statistics, and load them here"
        )
    lengths = {batch.shape[-1] for batch in batches}
    if chunk.config.sequence_parallel and any(length % here.tp_size for length in lengths):
        raise ExportError(
            f"sequence parallelism cuts samples of {sorted(lengths)} tokens in {here.tp_size}: give a length that divides"
        )


def _check(batches: list[Tensor], vocab: int) -> None:
    if not batches:
        raise ExportError("the calibration data holds no batch")
    for number, batch in enumerate(batches):
        if batch.dim() != 2 or batch.numel() == 0 or batch.dtype not in (torch.int64, torch.int32):
            raise ExportError(
                f"calibration batch {number} is {batch.dtype} {tuple(batch.shape)}, not integer [batch, tokens]"
            )
        if batch.min() < 0 or batch.max() >= vocab:
            raise ExportError(
                f"calibration batch {number} holds token ids {int(batch.min())} to {int(batch.max())}, outside the "
                f"model's vocabulary of {vocab}: was it tokenized for another model?"
            )


def _forward(
    model: nn.Module | list[nn.Module],
    batches: list[Tensor],
    here: Topology,
    progress: Progress,
) -> None:
    """Megatron's own schedules move the micro-batches through the pipeline, those of one shape at a time.

    The interleaved schedule takes them in whole groups. The last one is repeated to fill its group: a maximum does not
    change by seeing a batch twice.
    """
    chunks = chunks_of(model)
    group = chunks[0].config.microbatch_group_size_per_vp_stage if len(chunks) > 1 else 1
    steps = iter(progress("calibrate", batches))
    for shape, run in groupby(batches, key=lambda batch: tuple(batch.shape)):
        run = list(run)
        repeated = run[-1:] * (-len(run) % group)
        shown = chain(islice(steps, len(run)), repeated)
        get_forward_backward_func()(
            forward_step_func=partial(_step, here),
            data_iterator=[shown, *(iter(run + repeated) for _ in chunks[1:])],
            model=chunks,
            num_microbatches=len(run) + len(repeated),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=True,
        )
    next(steps, None)


def _step(here: Topology, batches: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable]:
    ids = next(batches).to(here.device)
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)  # True: not attended to
    output = chunk(ids, positions, mask)
    return output, lambda logits: (logits.new_zeros(()), {})


@contextmanager
def _evaluating(model: nn.Module | list[nn.Module]) -> Iterator[None]:
    """While open, the model is in evaluation mode; afterwards every attribute of every module is what it was.

    That takes more than the mode: the schedules leave numbers of micro-batches and received activations in modules.
    """
    modules = [module for chunk in chunks_of(model) for module in chunk.modules()]
    attributes = [dict(vars(module)) for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, were in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(were)


@contextmanager
def _watching(model: nn.Module | list[nn.Module], maxima: Maxima) -> Iterator[None]:
    """While open, `maxima` follows the largest magnitudes of this rank's part of the model; NaN and Inf stay visible."""

    def linear_called(name: str, module: nn.Module, args: tuple) -> None:
        _note(maxima, f"{name}.input_amax", linear_input(module, args[0]))

    def attention_called(name: str, module: nn.Module, args: tuple) -> None:
        _note(maxima, f"{name}.k_amax", args[1])
        _note(maxima, f"{name}.v_amax", args[2])

    with ExitStack() as hooks:
        for name, module in linears_of(model).items():
            hooks.callback(module.register_forward_pre_hook(partial(linear_called, name)).remove)
        for name, module in attentions_of(model).items():
            hooks.callback(module.register_forward_pre_hook(partial(attention_called, name)).remove)
        yield


def _note(maxima: Maxima, name: str, values: Tensor) -> None:
    low, high = torch.aminmax(values)
    seen = torch.maximum(-low, high).float()
    maxima[name] = torch.maximum(maxima[name], seen) if name in maxima else seen


def _agreed(here: Topology, maxima: Maxima) -> Statistics:
    """The maxima over all ranks: shards of one input, replicas' shares of the data, and stages' layers alike."""
    merged: dict[str, float] = {}
    for theirs in everyone(here, {name: value.item() for name, value in maxima.items()}):
        for name, value in theirs.items():
            merged[name] = max(merged.get(name, 0.0), value if isfinite(value) else inf)
    if bad := list(dict.fromkeys(name.rpartition(".")[0] for name, value in merged.items() if value == inf)):
        others = f" and of {len(bad) - 1} other modules" if bad[1:] else ""
        raise ExportError(
            f"NaN or Inf in the activations of {bad[0]}{others}. Check the weights, and that the model runs on this "
            "data in bfloat16"
        )
    return {name: torch.tensor(merged[name]) for name in sorted(merged)}
