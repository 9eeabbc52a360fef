"""What ModelOpt's quantizers mean: which format they round to, and which of our statistics they hold.

A quantizer is a dict of its attributes and buffers under ModelOpt's own names (`_num_bits`, `_block_sizes`, `_disabled`,
`_amax`, ...), of a live module or read from a checkpoint. Its name is that of its canonical module, and `weight_quantizer`
(`weight_quantizer.0` and `.1` where one follows the other), `input_quantizer`, or, of attention, `k_bmm_quantizer` and
`v_bmm_quantizer`. Nothing of ModelOpt is imported.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from torch import Tensor

from ...checkpoint.torch_dist_addons import Attributes, has_blocks
from ...common.errors import ExportError, report
from ...formats import FORMATS, Form, Options, chosen_all, groups_of
from ...models import HEAD, is_expert, is_linear_weight, pooled, vector_home
from ...models.statistic_names import input_key, kv_keys, vector_key, weight_key
from .blocks import STATIC, Blocks
from .settings import CACHES, FOUR_OVER_SIX, LINEARS, NVFP4, SCALES, grouped, words

Quantizers = dict[str, Attributes]

_CACHE = "KV cache "  # begins the kind of an attention
_CONSTANT_AMAX = 448.0  # of a cache that ModelOpt does not measure: its scale is 1
_CONSTANT = " with a scale of 1"  # ends the kind of such an attention


# How weights are rounded, how inputs are, whether inputs are multiplied by a vector before -> format, and its group size or scales
_KINDS = {
    (", then ".join(words(grouped(one, group)) for one in its.weights), words(its.inputs or {}), its.smoothed): (
        f"{name} {group}".rstrip()
    )
    for name, its in LINEARS.items()
    for group in groups_of(name) or ("",)
}
_KINDS |= {
    (words(weights), words(its.inputs or {}), False): f"{name} {scales}"
    for name, its in LINEARS.items()
    if its.weights == (NVFP4,) and not its.smoothed
    for scales, weights in SCALES.items()
}
_PLAIN = _KINDS["", "", False]  # of what is not quantized
_KINDS_OF_CACHES = {words(settings): name for name, settings in CACHES.items()}


@dataclass(frozen=True)
class Inherited:
    """What a model's quantizers mean: `formats` of canonical linears, a layer's experts as one; one format if ModelOpt smoothed the
    model. `kv_scale` is that of a cache of which ModelOpt measured nothing, `scales` the one of --nvfp4-scales that gives NVFP4's.
    """

    formats: dict[str, str]
    kv_cache: str
    group_size: int
    kv_scale: float | None = None
    scales: str = "max"

    @property
    def format(self) -> str:
        """The formats in words."""
        return " and ".join(dict.fromkeys(self.formats.values()))

    @property
    def forms(self) -> dict[str, Form]:
        """The formats by name."""
        return chosen_all(dict.fromkeys(self.formats.values()), Options(group_size=self.group_size))

    @property
    def smoothed(self) -> bool:
        """Whether ModelOpt has multiplied the smoothing factors into the weights, and nothing has taken over their inverse."""
        return any(LINEARS[name].smoothed for name in self.forms)

    def vector_key(self, module: str) -> str:
        """The statistic that a linear's `pre_quant_scale` is."""
        return vector_key(vector_home(module), self.forms[self.format].smoothing.search)


def by_module(quantizers: Quantizers) -> dict[str, dict[str, Attributes]]:
    """Module -> its quantizers by the rest of their names; those of core attention under the name of the attention."""
    found: dict[str, dict[str, Attributes]] = {}
    for name, attributes in quantizers.items():
        head, _, tail = name.rpartition("_quantizer")
        owner, _, kind = head.rpartition(".")
        found.setdefault(owner.removesuffix(".core_attention"), {})[f"{kind}_quantizer{tail}"] = attributes
    return found


def kinds_of(quantizers: Quantizers) -> dict[str, str]:
    """What each module is quantized to: linear -> format, a layer's experts as one; attention -> that of its cache.

    `ExportError` for what no format here does, naming modules and settings.
    """
    problems: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for module, parts in by_module(quantizers).items():
        rounding = {name: text for name, attributes in parts.items() if (text := words(attributes))}
        smoothed = _vector(parts.get("input_quantizer", {})) is not None
        kind, problem = _kind(module, rounding, smoothed)
        if (
            kind
            and kind.startswith(_CACHE)
            and rounding
            and all(parts[name].get("_use_constant_amax") for name in rounding)
        ):
            kind += _CONSTANT
        if kind and found.setdefault(pooled(module), kind) != kind:
            problem = f"it is quantized to {kind}, and another expert of its layer to {found[pooled(module)]}"
        if problem:
            problems.setdefault(problem, []).append(module)
    report([f"{some[0]} ({len(some)} such): {problem}" for problem, some in problems.items()])
    return found


def merged_kinds(everywhere: Iterable[dict[str, str]]) -> dict[str, str]:
    """What `kinds_of` found on every rank, put together; other ranks may have other experts of a layer."""
    found: dict[str, str] = {}
    for module, kind in (item for kinds in everywhere for item in kinds.items()):
        if found.setdefault(module, kind) != kind:
            raise ExportError(f"{module} is quantized to {found[module]} on one rank and to {kind} on another")
    return found


def inherited_in(kinds: dict[str, str], static: str = "mse") -> Inherited | None:
    """What `kinds_of` a whole model mean; None where nothing is quantized. `static`: how static scales of NVFP4 were made.
    `ExportError` for several formats of which one is AWQ's, for several caches, and for scales that were made in several ways.
    """
    formats: dict[str, list[str]] = {}
    caches: dict[str, list[str]] = {}
    for module, kind in kinds.items():
        some = caches if kind.startswith(_CACHE) else formats
        some.setdefault(kind.removeprefix(_CACHE).removesuffix(_CONSTANT), []).append(module)
    formats.pop(_PLAIN, None)
    smoothed = any(LINEARS[kind.split()[0]].smoothed for kind in formats)
    for what, some in (("with AWQ and without", formats if smoothed else {}), ("to several caches", caches)):
        if len(some) > 1:
            said = ", ".join(f"{kind} ({modules[0]}, {len(modules)} in all)" for kind, modules in some.items())
            raise ExportError(f"ModelOpt quantized modules of this model {what}, which no checkpoint here has: {said}")
    cache = next(iter(caches), "none")
    if not formats:
        if cache == "none":
            return None
        raise ExportError(
            f"ModelOpt quantized nothing of this model but its KV cache ({cache}), which vLLM refuses. Disable those "
            "quantizers, and serve with the engine's own FP8 KV cache"
        )
    more = {kind: kind.partition(" ")[2] for kind in formats}
    groups = {int(text) if text.isdecimal() else 128 for text in more.values()}
    ways = {kind: static if more[kind] == STATIC else more[kind] or "max" for kind in formats if _searches(kind)}
    if len(set(ways.values())) > 1:
        said = ", ".join(f"{ways[kind]} ({formats[kind][0]}, {len(formats[kind])} in all)" for kind in ways)
        raise ExportError(
            f"ModelOpt made the scales of this model's NVFP4 weights in several ways, and --nvfp4-scales is one for all: {said}"
        )
    names = {module: kind.split()[0] for kind, modules in formats.items() for module in modules}
    constant = {kind.endswith(_CONSTANT) for kind in kinds.values() if kind.startswith(_CACHE)} == {True}
    return Inherited(names, cache, min(groups), 1.0 if constant else None, next(iter(ways.values()), "max"))


def _searches(kind: str) -> bool:
    return "nvfp4_scales" in FORMATS[kind.split()[0]].OPTIONS


def scalars_in(quantizers: Quantizers) -> dict[str, float]:
    """The statistics that are one number: amaxes of inputs, of keys and values, and of weights that have one for all."""
    found: dict[str, float] = {}
    for module, parts in by_module(quantizers).items():
        k_amax, v_amax = kv_keys(module)
        keys = {
            "input_quantizer": input_key(module),
            "weight_quantizer": weight_key(module),
            "weight_quantizer.1": weight_key(module),
            "k_bmm_quantizer": k_amax,
            "v_bmm_quantizer": v_amax,
        }
        for name in keys.keys() & parts.keys():
            value = _amax(parts[name])
            if value is None:
                continue
            if not isfinite(value) or value < 0:
                raise ExportError(f"{module}.{name}._amax is {value}. Calibrate the model again")
            found[keys[name]] = max(found.get(keys[name], 0.0), value)
    return found


def vectors_in(quantizers: Quantizers) -> dict[str, Tensor]:
    """Linear -> its `pre_quant_scale`, float32 [in], of the shard if the quantizer is one's."""
    parts = {module: parts.get("input_quantizer", {}) for module, parts in by_module(quantizers).items()}
    vectors = {module: _vector(attributes) for module, attributes in parts.items()}
    return {module: vector.flatten().float() for module, vector in vectors.items() if vector is not None}


def blocks_in(quantizers: Quantizers) -> dict[str, Blocks]:
    """Linear -> the amaxes that it has of each block of its weight."""
    found = {}
    for module, parts in by_module(quantizers).items():
        first = parts.get("weight_quantizer.0") or parts.get("weight_quantizer", {})
        amax, sizes = first.get("_amax"), first.get("_block_sizes") or {}
        if words(first) and has_blocks(first) and amax is not None:
            searched = words(first) in map(words, SCALES.values())
            scales = (FOUR_OVER_SIX if sizes.get(FOUR_OVER_SIX) else STATIC) if searched else ""
            found[module] = Blocks(amax, (sizes.get(-2, 1), sizes[-1]), scales, _amax(first) or 0.0)
    return found


def _kind(module: str, rounding: dict[str, str], smoothed: bool) -> tuple[str | None, str]:
    """What a module is quantized to by quantizers that round as `rounding` say; or None and why that cannot be exported."""
    if module.endswith(".self_attention"):
        keys, values = rounding.get("k_bmm_quantizer", ""), rounding.get("v_bmm_quantizer", "")
        if keys == values and keys in _KINDS_OF_CACHES and not rounding.keys() - {"k_bmm_quantizer", "v_bmm_quantizer"}:
            return _CACHE + _KINDS_OF_CACHES[keys], ""
    elif not (is_linear_weight(f"{module}.weight") or f"{module}.weight" == HEAD):
        if not rounding and not smoothed:
            return _PLAIN, ""
    else:
        chain = [rounding.get(f"weight_quantizer{number}", "") for number in ("", ".0", ".1")]
        weights = ", then ".join(text for text in chain if text)
        kind = _KINDS.get((weights, rounding.get("input_quantizer", ""), smoothed))
        known = {"input_quantizer", "weight_quantizer", "weight_quantizer.0", "weight_quantizer.1"}
        if kind and smoothed and is_expert(module):
            return None, (
                "ModelOpt gave each expert a pre_quant_scale of its own, and here a layer's experts share one. Quantize them "
                "without AWQ"
            )
        if kind and not rounding.keys() - known:
            return kind, ""
    said = [f"{name} is {text}" for name, text in sorted(rounding.items())]
    said += ["inputs are multiplied by a pre_quant_scale"] if smoothed else []
    return None, (
        f"ModelOpt's {'; '.join(said)}: no format here does that. Quantize it otherwise, or disable its quantizers before "
        "they are calibrated"
    )


def _amax(attributes: Attributes) -> float | None:
    """The one amax of a quantizer that rounds; None for one that has more, or was shown nothing."""
    if not words(attributes):
        return None
    if has_blocks(attributes):
        whole = attributes.get("_global_amax")
        return None if whole is None else float(whole)
    if attributes.get("_use_constant_amax"):
        return _CONSTANT_AMAX
    amax = attributes.get("_amax")
    return float(amax) if amax is not None and amax.numel() == 1 else None


def _vector(attributes: Attributes) -> Tensor | None:
    """What a quantizer multiplies its input with, whether it rounds it or not."""
    return attributes.get("_pre_quant_scale") if attributes.get("_enable_pre_quant_scale", True) else None
