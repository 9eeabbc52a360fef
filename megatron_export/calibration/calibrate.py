"""Runs calibration data through a model: once for maxima, once more where an AWQ format searches, and again for clipping.

Statistics are tensors on the CPU, the same on every rank; models/statistic_names.py lists their names.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.piece import Axis
from ..common.progress import Progress, quiet
from ..distributed.collectives import everyone, together
from ..distributed.topology import Topology
from ..formats import FORMATS, Form, Options, chosen
from ..formats.awq import SHARED, search_of
from ..formats.int4 import CLIP_RATIOS
from ..models import cut_of, is_expert, reads_heads
from .amax import Maxima
from .awq_clip import Clips
from .awq_search import Alphas
from .lookup import Statistics
from .memory import CLIP_BYTES
from .observer import Observer
from .sensitivity import Sensitivities
from .subject import Model, Subject, Weights, subject_of


def calibrate(
    model: Model,
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
    """Measure what `format`, or each of several, needs of a live Megatron-Core or transformers model; the model is left as it was.

    model       a `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or not; or a transformers
                model, in one process, or whole or cut by FSDP2 on several ranks, which are replicas then
    batches     int64 token ids [batch, tokens] each; the ranks of one data-parallel replica pass the same batches, and
                replicas may each pass a share
    group_size  of int4_awq and w4a8_awq
    awq_clip    search the clipping of AWQ formats too
    all_experts measure every expert on all tokens, and not on those that are routed to it
    head        measure the input of the output layer too, for a recipe that quantizes it
    sensitivities  formats, or `Form`s with options, whose cost in every linear is measured too, as `effective_bits` chooses by it:
                one more pass, with gradients, which keeps the activations of all layers (calibration/sensitivity.py)
    Every result serves fp8, nvfp4 and every KV cache too; bf16 alone needs nothing and gives {}. Memory on a rank: the input of one
    linear, and twice its output in float32 or, of many tokens, its square [in, in], four copies of its weight (the whole linear's,
    where a shard's inputs are gathered), 44 bytes for every input channel and search, and, when clipping, at most 1 GiB (or one
    linear's) of losses.
    Collective: all ranks call it. `ExportError` for tokens outside the (padded) vocabulary, and for NaN or Inf in activations,
    naming the module. An exception of the model itself is raised on its rank alone, as in training.
    """
    forms = _forms((format,) if isinstance(format, str) else tuple(format), group_size, awq_clip)
    tried = _tried(sensitivities)
    if all(not form.quantization for form in (*forms, *tried)):
        return {}
    smoothings = {form.smoothing.search: form.smoothing.folds for form in forms if form.smoothing}
    subject = subject_of(model)
    with subject.world() as here:
        with together(here, "check the calibration data"):
            batches = list(batches)
            subject.check(here, batches, bool(smoothings))
        run = partial(_run, here, subject, batches, progress)
        with subject.measured(here, batches) as of, torch.no_grad():
            maxima = Maxima(here, bool(smoothings), of.experts, of.repeats, of.groups)
            run("calibrate", maxima, all_experts=all_experts, head=head)
            statistics, means = maxima.agreed()
            if tried:
                tokens = sum(map(torch.numel, batches))
                found = Sensitivities(here, tried, statistics, of.layouts, of.held_whole, tokens, of.repeats)
                run("sensitivities", found, gradients=True)
                statistics |= found.agreed()
            if not smoothings:
                return statistics
            searches = partial(_searches, smoothings, of.heads.queries_per_group)
            alphas = Alphas(here, means, searches, of.heads.same_in_group, of.weights, of.topk, of.held_whole)
            run("search", alphas, all_experts=all_experts)
            statistics |= alphas.agreed()
            for group in _clipped_together(here, of.weights, searches) if awq_clip else ():
                clips = Clips(here, statistics, lambda n, group=group: group.get(n, ()), of.layouts, of.held_whole)
                run("clip", clips, all_experts=all_experts)
                statistics |= clips.agreed()
        return statistics


def _run(
    here: Topology,
    subject: Subject,
    batches: list[Tensor],
    progress: Progress,
    stage: str,
    observer: Observer,
    **how: bool,
) -> None:
    """Run all batches through the model once more, and show `observer` its calls."""
    steps = iter(progress(stage, batches))
    here.pulse.at(stage)
    subject.run(here, batches, steps, observer, **how)
    next(steps, None)


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
    here: Topology, weights: Weights, searches: Callable[[str], tuple[str, ...]]
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
