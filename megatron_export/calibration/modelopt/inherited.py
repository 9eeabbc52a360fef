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
from ...models.statistic_names import experts_module, weight_key
from ...planning.recipe import Line, Recipe
from ...planning.request import Request
from ..lookup import Statistics
from .blocks import STATIC, Blocks, kept, scales_of, stale
from .defaults import supposed
from .quantizers import Inherited, Quantizers, blocks_in, inherited_in, kinds_of, merged_kinds, scalars_in, vectors_in

_DEFAULTS = (("group_size", Options.group_size), ("nvfp4_scales", Options.nvfp4_scales))


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
        mine, blocks = kinds_of(quantizers), blocks_in(quantizers)
        weights = weights_of() if blocks else {}
        static = next((name for name, one in blocks.items() if one.scales == STATIC), None)
        told = scales_of(weights[static], blocks[static].amax, blocks[static]) if static else ""
    everywhere = everyone(here, (mine, told))
    with together(here, "read the model's quantizers"):
        kinds = merged_kinds(kinds for kinds, _ in everywhere)
        inherited = inherited_in(kinds, next((one for _, one in everywhere if one), ""))
        if inherited is None:
            return request.plain(), given
        report(contradictions(config, inherited, request, given))
        scalars, vectors = scalars_in(quantizers), vectors_in(quantizers)
    statistics: dict[str, Tensor] = {}
    for theirs in everyone(here, scalars):
        for name, value in theirs.items():
            statistics[name] = torch.tensor(max(value, float(statistics.get(name, 0.0))))
    with together(here, "read the model's quantizers"):
        amaxes = {name: float(statistics.get(weight_key(name), 0.0)) for name in blocks}
        report(
            stale(
                name
                for name, one in blocks.items()
                if not kept(weights[name], one.amax, one, inherited.scales, amaxes[name])
            )
        )
    statistics |= _agreed_vectors(here, vectors, inherited)
    return settled(config, inherited, request), statistics


def inherited_from_checkpoint(
    checkpoint: MegatronCheckpoint, config: dict, request: Request, given: Statistics | None
) -> tuple[Request, Statistics | None]:
    """The same for the model in a checkpoint, which every rank reads for itself."""
    quantizers = _quantizers(checkpoint, request)
    inherited = inherited_in(kinds_of(quantizers), _static(checkpoint, blocks_in(quantizers)))
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
    quantizers = _quantizers(checkpoint, request)
    found, amaxes = blocks_in(quantizers), scalars_in(quantizers)
    scales = _static(checkpoint, found)
    names = sorted(name for name in found if f"{name}.weight" in checkpoint.sources)[here.rank :: here.world]

    def differs(name: str) -> bool:
        one = found[name]
        asked = scales if one.scales == STATIC else one.scales, amaxes.get(weight_key(name), 0.0)
        parts = checkpoint.as_saved(f"{name}.weight", one.amax)
        return not all(kept(weight, amax, one, *asked) for weight, amax in parts)

    report(stale(filter(differs, names)))


def _static(checkpoint: MegatronCheckpoint, blocks: dict[str, Blocks]) -> str:
    """How static scales of NVFP4 were made, as the first linear that has them shows; "" for none."""
    name = next(
        (name for name, one in blocks.items() if one.scales == STATIC and f"{name}.weight" in checkpoint.sources), None
    )
    if name is None:
        return ""
    weight, amax = next(checkpoint.as_saved(f"{name}.weight", blocks[name].amax))
    return scales_of(weight, amax, blocks[name])


def settled(config: dict, inherited: Inherited, request: Request) -> Request:
    """The request with what a model's quantizers mean."""
    options = replace(request.options, group_size=inherited.group_size, nvfp4_scales=inherited.scales)
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
            ("nvfp4_scales", request.options.nvfp4_scales, inherited.scales),
        )
        if wanted not in (None, has) and (field, wanted) not in _DEFAULTS
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
