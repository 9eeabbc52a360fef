"""Runs calibration data through a model: once for maxima, once more where an AWQ format searches, and again for clipping.

Statistics are tensors on the CPU, the same on every rank; models/statistic_names.py lists their names.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby, islice

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..common.errors import ExportError
from ..common.piece import Axis
from ..common.progress import Progress, quiet
from ..common.shards import Shards
from ..distributed.collectives import everyone, together
from ..distributed.topology import Topology
from ..formats import FORMATS, Form, Options, chosen
from ..formats.awq import SHARED, search_of
from ..formats.int4 import CLIP_RATIOS
from ..mcore import parallel_state
from ..mcore.cpu_compat import without_cuda
from ..mcore.gradients import only_activations
from ..mcore.model import chunks_of, finish_gathering, heads_of, layouts_of, local_experts_of, weights_of, whole_of
from ..models import cut_of, is_expert, reads_heads
from .amax import Maxima
from .awq_clip import Clips
from .awq_search import Alphas
from .checks import check_batches, check_modules, check_parallelism, check_replicas
from .hooks import Observer, watching
from .lookup import Statistics
from .memory import CLIP_BYTES
from .sensitivity import Sensitivities


def calibrate(
    model: nn.Module | list[nn.Module],
    batches: Iterable[Tensor],
    *,
    format: str | Iterable[str] = "fp8",
    group_size: int = 128,
    awq_clip: bool = False,
    all_experts: bool = False,
    head: bool = False,
    sensitivities: Iterable[str | Form] = (),
    progress: Progress = quiet,
) -> Statistics:
    """Measure what `format`, or each of several, needs of a live Megatron-Core model; the model is left as it was.

    model       a `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or not
    batches     int64 token ids [batch, tokens] each; the ranks of one data-parallel replica pass the same batches, and
                replicas may each pass a share
    group_size  of int4_awq and w4a8_awq
    awq_clip    search the clipping of AWQ formats too
    all_experts measure every expert on all tokens, and not on those that are routed to it
    head        measure the input of the output layer too, for a recipe that quantizes it
    sensitivities  formats, or `Form`s with options, whose cost in every linear is measured too, as `effective_bits` chooses by it:
                one more pass, with gradients, which keeps the activations of all layers (calibration/sensitivity.py)
    Every result serves fp8, nvfp4 and every KV cache too; bf16 alone needs nothing and gives {}. Memory on a rank: the input and
    twice the output in float32 of one linear, four copies of its weight (the whole linear's, where a shard cuts a group), 44 bytes
    for every input channel and search, and, when clipping, at most 1 GiB (or one linear's) of losses.
    Collective: all ranks call it. `ExportError` for tokens outside the (padded) vocabulary, and for NaN or Inf in activations,
    naming the module. An exception of the model itself is raised on its rank alone, as in training.
    """
    forms = _forms((format,) if isinstance(format, str) else tuple(format), group_size, awq_clip)
    tried = _tried(sensitivities)
    if all(not form.quantization for form in (*forms, *tried)):
        return {}
    smoothings = {form.smoothing.search: form.smoothing.folds for form in forms if form.smoothing}
    with parallel_state.current() as here:
        with together(here, "check the calibration data"):
            batches = list(batches)
            check_parallelism(chunks_of(model)[0], batches, here)
            check_batches(batches, chunks_of(model)[0].vocab_size)
            check_modules(here, model, bool(smoothings))
        check_replicas(here, model, batches)
        finish_gathering(model)
        run = partial(_observe, here, model, batches, progress, all_experts)
        with _evaluating(model), without_cuda(here.device), torch.no_grad():
            config = chunks_of(model)[0].config
            # without sequence parallelism, all tensor-parallel ranks send the same token on
            repeats = here.experts.size * (1 if config.sequence_parallel else here.tp_size)
            maxima = Maxima(here, bool(smoothings), local_experts_of(model), repeats, config.num_query_groups)
            run("calibrate", maxima, head)
            statistics, means = maxima.agreed()
            held_whole = whole_of(model)
            if tried:
                found = Sensitivities(
                    here, tried, statistics, layouts_of(model), held_whole, sum(map(torch.numel, batches)), repeats
                )
                with only_activations(model):
                    _observe(here, model, batches, progress, False, "sensitivities", found, gradients=True)
                statistics |= found.agreed()
            if not smoothings:
                return statistics
            heads, weights = heads_of(model), weights_of(model)
            searches = partial(_searches, smoothings, heads.queries_per_group)
            topk = config.moe_router_topk
            alphas = Alphas(here, means, searches, heads.same_in_group, weights, topk, held_whole)
            run("search", alphas)
            statistics |= alphas.agreed()
            for group in _clipped_together(here, weights, searches) if awq_clip else ():
                clips = Clips(here, statistics, lambda n, group=group: group.get(n, ()), layouts_of(model), held_whole)
                run("clip", clips)
                statistics |= clips.agreed()
        return statistics


def _forms(names: tuple[str, ...], group_size: int, awq_clip: bool) -> list[Form]:
    """The formats that are calibrated for; `ExportError` for none, for unknown ones, and for an option without effect."""
    if not names:
        raise ExportError("calibrate() was given no format")
    forms = [chosen(name, _options(name, group_size, awq_clip)) for name in names]
    used = {option for name in names for option in FORMATS[name].OPTIONS}
    if (group_size != 128 and "group_size" not in used) or (awq_clip and "awq_clip" not in used):
        chosen(names[0], Options(group_size=group_size, awq_clip=awq_clip))  # says which has no effect
    return forms


def _tried(sensitivities: Iterable[str | Form]) -> list[Form]:
    """The formats, named or given, that quantize."""
    named = (one if isinstance(one, Form) else chosen(one) for one in dict.fromkeys(sensitivities))
    return [form for form in named if form.quantization]


def _options(name: str, group_size: int, awq_clip: bool) -> Options:
    """The options that the format of that name reads, if there is one."""
    reads = FORMATS[name].OPTIONS if name in FORMATS else ()
    return Options(group_size=group_size if "group_size" in reads else 128, awq_clip=awq_clip and "awq_clip" in reads)


def _searches(smoothings: dict[str, bool], queries_per_group: int, name: str) -> tuple[str, ...]:
    """The searches for one linear: a vector that may be folded into v is also searched as one for each query group."""
    shared = reads_heads(f"{name}.weight") and queries_per_group > 1
    return tuple(key for one, folds in smoothings.items() for key in (one, one + SHARED)[: 1 + (shared and folds)])


def _clipped_together(
    here: Topology, weights: Shards, searches: Callable[[str], tuple[str, ...]]
) -> list[dict[str, tuple[str, ...]]]:
    """This rank's linears and their searches in groups, each with at most `CLIP_BYTES` of losses; as many on every rank."""
    groups: list[dict[str, tuple[str, ...]]] = [{}]
    size = 0
    for name, (rows, columns) in weights.shapes.items():
        nbytes = 0
        for search in map(search_of, searches(name)):
            gathered = cut_of(f"{name}.weight") is Axis.IN and columns % search.group  # its shard cuts a group
            elements = rows * columns * (here.cut(is_expert(name)).size if gathered else 1)
            nbytes += 0 if search.per_tensor else 8 * len(CLIP_RATIOS) * elements // search.group
        if groups[-1] and size + nbytes > CLIP_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = searches(name)
        size += nbytes
    most = max(everyone(here, len(groups)))
    return groups + [{}] * (most - len(groups))


def _observe(
    here: Topology,
    model: nn.Module | list[nn.Module],
    batches: list[Tensor],
    progress: Progress,
    all_experts: bool,
    stage: str,
    observer: Observer,
    head: bool = False,
    gradients: bool = False,
) -> None:
    """Run all batches through the model and show `observer` the calls of its modules.

    Megatron's own schedules take the micro-batches, those of one shape at a time. The interleaved schedule takes them in whole
    groups: the last one is repeated to fill its group, and not shown again.
    """
    chunks = chunks_of(model)
    group = chunks[0].config.microbatch_group_size_per_vp_stage if len(chunks) > 1 else 1
    steps = iter(progress(stage, batches))
    here.pulse.at(stage)
    for shape, run in groupby(batches, key=lambda batch: tuple(batch.shape)):
        run = list(run)
        repeated = run[-1:] * (-len(run) % group)
        shown = chain(islice(steps, len(run)), repeated)
        with watching(here, model, observer, len(run), all_experts, head, gradients):
            get_forward_backward_func()(
                forward_step_func=partial(_step_with_loss if gradients else _step, here),
                data_iterator=[shown, *(iter(run + repeated) for _ in chunks[1:])],
                model=chunks,
                num_microbatches=len(run) + len(repeated),
                seq_length=shape[1],
                micro_batch_size=shape[0],
                forward_only=not gradients,
            )
    next(steps, None)


def _step(here: Topology, batches: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable]:
    ids = next(batches).to(here.device)
    # layers that predict one more token only run where there is something to predict
    output = _called(chunk, ids, ids if chunk.config.mtp_num_layers else None)
    return output, lambda logits: (logits.new_zeros(()), {})


def _step_with_loss(here: Topology, batches: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Callable]:
    """The loss is the sum over all tokens that have a next one."""
    ids = next(batches).to(here.device)
    count = torch.ones((), dtype=torch.int, device=ids.device)
    return _called(chunk, ids, ids.roll(-1, dims=1)), lambda losses: (losses[:, :-1].float().sum(), count, {})


def _called(chunk: nn.Module, ids: Tensor, labels: Tensor | None) -> Tensor:
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)  # True: not attended to
    return chunk(ids, positions, mask, labels=labels)


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
