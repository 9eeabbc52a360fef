"""What a model, live or in a checkpoint, inherits from ModelOpt: the formats of its quantizers, and their statistics."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...checkpoint.torch_dist import MegatronCheckpoint
from ...common.errors import ExportError, report
from ...common.piece import Axis
from ...distributed.collectives import everyone, maximum, spread, together, whole
from ...distributed.topology import Topology
from ...formats import FORMATS, PLAIN, Options
from ...models import HEAD, architecture_of, cut_of, is_linear_weight, parameters_of, pooled, shape_of
from ...models.statistic_names import experts_module
from ...planning.recipe import Line, Recipe
from ...planning.request import Request
from ..lookup import Statistics
from .defaults import supposed
from .quantizers import Inherited, Quantizers, blocks_in, inherited_in, kinds_of, merged_kinds, scalars_in, vectors_in


def inherited_from_model(
    here: Topology,
    quantizers_of: Callable[[], Quantizers],
    weights_of: Callable[[], Mapping[str, Tensor]],
    config: dict,
    request: Request,
    given: Statistics | None,
) -> tuple[Request, Statistics | None]:
    """The request with what a live model that ModelOpt quantized says itself, and its statistics. Collective.

    quantizers_of, weights_of  make this rank's quantizers, and its shards of the linears that have them, by canonical name
    Of a model without quantizers, the request with its defaults, and the statistics that the user gave. `ExportError` if the two
    contradict each other, or if no format here does what its quantizers do.
    """
    with together(here, "read the model's quantizers"):
        quantizers = quantizers_of()
        mine = kinds_of(quantizers)
    everywhere = everyone(here, mine)
    with together(here, "read the model's quantizers"):
        kinds = merged_kinds(everywhere)
        inherited = inherited_in(kinds)
        if inherited is None:
            return request.plain(), given
        report(contradictions(config, inherited, request, given))
        weights = weights_of()
        blocks = blocks_in(quantizers)
        report(stale(name for name, (amax, size) in blocks.items() if blocks_differ(weights[name], amax, size)))
        scalars, vectors = scalars_in(quantizers), vectors_in(quantizers)
    statistics: dict[str, Tensor] = {}
    for theirs in everyone(here, scalars):
        for name, value in theirs.items():
            statistics[name] = torch.tensor(max(value, float(statistics.get(name, 0.0))))
    statistics |= _agreed_vectors(here, vectors, inherited)
    return settled(config, inherited, request), statistics


def inherited_from_checkpoint(
    checkpoint: MegatronCheckpoint, config: dict, request: Request, given: Statistics | None
) -> tuple[Request, Statistics | None]:
    """The same for the model in a checkpoint, which every rank reads for itself."""
    quantizers = _quantizers(checkpoint, request)
    inherited = inherited_in(kinds_of(quantizers))
    if inherited is None:
        return request.plain(), given
    report(contradictions(config, inherited, request, given))
    if checkpoint.adapted:
        raise ExportError(
            f"{checkpoint.folder} has LoRA adapters and ModelOpt's quantizers, which were calibrated without them. Merge the "
            "adapters into the model, calibrate the quantizers again, and export that"
        )
    statistics = {name: torch.tensor(value) for name, value in scalars_in(quantizers).items()}
    columns, odd = _columns(checkpoint), []
    for module, vector in vectors_in(quantizers).items():
        key = inherited.vector_key(module)
        if len(vector) != columns.get(module) or not (vector.isfinite() & (vector > 0)).all():
            each = f"each of its {columns.get(module)} inputs"
            odd.append(f"{module}: its pre_quant_scale is not a positive number for {each}")
        elif not torch.equal(statistics.setdefault(key, vector), vector):
            odd.append(f"{module}: its pre_quant_scale is not that of all that read the same input")
    report(odd)
    return settled(config, inherited, request), statistics


def _quantizers(checkpoint: MegatronCheckpoint, request: Request) -> Quantizers:
    found = checkpoint.quantizers
    return supposed(found, _columns(checkpoint), request.format, request.kv_cache, checkpoint.folder)


def _columns(checkpoint: MegatronCheckpoint) -> dict[str, int]:
    """Linear -> how many inputs it has."""
    return {name.removesuffix(".weight"): one.shape[-1] for name, one in checkpoint.sources.items()}


def check_blocks(here: Topology, checkpoint: MegatronCheckpoint, request: Request) -> None:
    """`ExportError` if blocks of this rank's share of a checkpoint's linears have other amaxes than their weights."""
    found = blocks_in(_quantizers(checkpoint, request))
    names = sorted(name for name in found if f"{name}.weight" in checkpoint.sources)[here.rank :: here.world]

    def differs(name: str) -> bool:
        amax, size = found[name]
        return any(blocks_differ(weight, part, size) for weight, part in checkpoint.as_saved(f"{name}.weight", amax))

    report(stale(filter(differs, names)))


def settled(config: dict, inherited: Inherited, request: Request) -> Request:
    """The request with what a model's quantizers mean."""
    options = replace(request.options, group_size=inherited.group_size)
    if any("awq_output" in FORMATS[name].OPTIONS for name in inherited.forms):
        options = replace(
            options, awq_output="modelopt"
        )  # ModelOpt gives each query its own factors, which v cannot take
    asked = request.kv_scale, request.kv_scale_at_least
    latent = [name for module, name in inherited.formats.items() if ".self_attention." in module]
    risky = shape_of(config).kv_lora and any(not inherited.forms[name].latent for name in latent)
    lines = (
        Line(module, format, f"ModelOpt's quantizers: {module}", False) for module, format in _lines(config, inherited)
    )
    return replace(
        request,
        kv_cache=inherited.kv_cache,
        kv_scale=inherited.kv_scale if asked == (None, None) else request.kv_scale,
        options=options,
        quantize_mla=request.quantize_mla or bool(risky),
        smoothed=inherited.smoothed,
        inherited=True,
    ).settled(Recipe(inherited.format, tuple(lines)))


def contradictions(config: dict, inherited: Inherited, request: Request, given: Statistics | None) -> list[str]:
    """Where the user wants something else than the model's quantizers do."""
    problems = [
        f"{field} is {wanted!r}, but ModelOpt quantized this model to {has!r}. Leave it out, or disable the quantizers"
        for field, wanted, has in (
            ("format", request.format, inherited.format),
            ("recipe", request.recipe, inherited.format),
            ("set", request.set or None, inherited.format),
            ("kv_cache", request.kv_cache, inherited.kv_cache),
            ("group_size", request.options.group_size, inherited.group_size),
        )
        if wanted not in (None, has) and (field, wanted) != ("group_size", Options.group_size)
    ]
    if request.effective_bits is not None:
        problems.append(
            "effective_bits has no effect on a model that ModelOpt quantized. Leave it out, or disable the quantizers"
        )
    if given is not None:
        problems.append(
            "the model has quantizers of ModelOpt that hold its statistics: leave calibration out, or disable the quantizers"
        )
    if inherited.smoothed and request.exclude:
        problems.append(
            "exclude cannot undo what ModelOpt has smoothed: disable those quantizers before they are calibrated"
        )
    if inherited.smoothed and architecture_of(config).turned:
        problems.append(f"ModelOpt smoothed q, k and v, which no engine loads of this model in {inherited.format}")
    return problems


def blocks_differ(weight: Tensor, amax: Tensor, block: tuple[int, int]) -> bool:
    """Whether a weight's blocks have other amaxes than these: clipped ones, or of a model trained since.

    What is written is quantized with the amaxes of the weights' own blocks, so they must be the same.
    """
    rows, columns = block
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    own = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).abs().amax(dim=(1, 3)).flatten().float()
    amax = amax.flatten().float().to(own.device)
    return own.shape != amax.shape or not torch.equal(own, amax)


def stale(linears: Iterable[str]) -> list[str]:
    found = list(linears)
    return [
        f"{first} (of {len(found)} such): its quantizer's amaxes are not those of its weight's blocks, which are what is "
        "exported: ModelOpt clipped them, or the model was trained since. Calibrate the quantizers again, without clipping"
        for first in found[:1]
    ]


def _agreed_vectors(here: Topology, vectors: dict[str, Tensor], inherited: Inherited) -> dict[str, Tensor]:
    """The smoothing vectors of all linears, whole. Collective."""
    mine: dict[str, Tensor] = {}
    odd = []
    for module, vector in sorted(vectors.items()):
        if cut_of(f"{module}.weight") is Axis.IN:
            vector = whole(here.cut(False), vector, 0)
        agreed = maximum(vector.clone(), here.stage_group)
        key = inherited.vector_key(module)
        if not torch.equal(agreed, vector) or not torch.equal(mine.setdefault(key, agreed), agreed):
            odd.append(
                f"{module}: its pre_quant_scale is not the same on all ranks, or of all that read the same input"
            )
    with together(here, "read the model's quantizers"):
        report(odd)
    return spread(here, mine)


def _lines(config: dict, inherited: Inherited) -> Iterable[tuple[str, str]]:
    """The HF modules of linears, a layer's experts as one, and the format that ModelOpt quantized each to."""
    linears = {name: s for name, s in parameters_of(config).items() if is_linear_weight(name) or name == HEAD}
    lines: dict[str, str] = {}
    for name, source in linears.items():
        format = inherited.formats.get(pooled(name).removesuffix(".weight"), PLAIN)
        modules = (hf.removesuffix(".weight") for hf in source.names().values() if hf not in source.copies())
        lines |= {(experts_module(hf) if ".experts." in hf else hf): format for hf in modules}
    return lines.items()
