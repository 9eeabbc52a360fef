"""What a finished checkpoint is: by its tensors, which are believed, by hf_quant_config.json, and by config.json's
`quantization_config`. Where a config says something else than the tensors, that is a problem of the config.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from ..common.file_names import CONFIG, QUANT_CONFIG
from ..engines.quant_configs import MIXED, layers_of
from ..formats import (
    ALGORITHMS,
    KV_FORMATS,
    PRE_QUANT_SCALE,
    PUBLISHED,
    SCALES,
    SUFFIXES,
    VARIANTS,
    Form,
    Options,
    module_of,
)
from ..models import Architecture, known
from ..models.statistic_names import experts_module
from ..writing.quantized_modules import lists_in
from .folder import Finished, json_of

# quant_algo -> the first one whose tensors are the same and mean the same: all that can be told from tensors
_PLAIN = {
    algorithm: next(a for a, form in ALGORITHMS.items() if (form.decode, form.stored) == (mine.decode, mine.stored))
    for algorithm, mine in ALGORITHMS.items()
}
_CODES = {form.stored["weight"].dtype for form in ALGORITHMS.values()}
_SECOND = {*SUFFIXES} - {*SCALES, PRE_QUANT_SCALE}  # what a format may have beside codes and the scales of blocks


@dataclass(frozen=True)
class Variant:
    """A format with its options, and the HF modules, or stacks of experts, whose codes or scales are its."""

    options: Options
    form: Form
    modules: frozenset[str]


@dataclass(frozen=True)
class Described:
    """What a checkpoint is.

    algorithm   as the tensors show it, None for a checkpoint that is not quantized, MIXED for one with several
    variants    its formats; none for a checkpoint that is not quantized
    kv          name of the KV cache's format
    kv_scale    the scale that engines take for it, if the checkpoint has none and they can; else None
    excludes    by file, the modules that it names as not quantized; not of a file that lists the quantized ones alone
    unlisted    whether config.json is in a native dialect, and names no module as not quantized, as DeepSeek's own
    problems    where configs and tensors contradict one another
    """

    algorithm: str | None
    variants: tuple[Variant, ...]
    kv: str
    kv_scale: float | None
    excludes: dict[str, list[str]] = field(default_factory=dict)
    unlisted: bool = False
    problems: list[str] = field(default_factory=list)

    @cached_property
    def forms(self) -> dict[str, Form]:
        """Quantized HF module, or stack of experts -> its format."""
        return {module: one.form for one in self.variants for module in one.modules}

    @property
    def quantized(self) -> frozenset[str]:
        """HF modules, or stacks of experts, that have codes or scales."""
        return frozenset(self.forms)


def described(found: Finished) -> Described:
    """Read what a checkpoint is off its headers and its two configs."""
    whole = json_of(found.folder, CONFIG)
    config, architecture = whole.get("quantization_config"), known(whole)
    inner, outer = _table(config), _table(json_of(found.folder, QUANT_CONFIG).get("quantization"))
    quantized = _quantized(found)
    claims = {CONFIG: _claimed(inner.get("quant_algo") or native_in(inner))}
    if outer:  # older releases of ModelOpt write this file alone: config.json then claims nothing
        claims = (claims if config is not None else {}) | {QUANT_CONFIG: _claimed(outer.get("quant_algo"))}
    if MIXED in claims.values():
        algorithm, variants, problems = (
            MIXED,
            *_mixed(found, quantized, {CONFIG: inner, QUANT_CONFIG: outer}, architecture),
        )
    else:
        algorithm = _algorithm(found, quantized, {_PLAIN.get(claim, claim) for claim in claims.values()})
        variants, problems = _one(found, quantized, algorithm, {*claims.values()}), []
    problems += [
        f"{file} says quant_algo {claim}, but the tensors are those of {algorithm or 'a model that is not quantized'}"
        for file, claim in claims.items()
        if _PLAIN.get(claim, claim) != algorithm
    ]
    caches = {file: _cache(said) for file, said in ((CONFIG, inner), (QUANT_CONFIG, outer)) if said}
    kv = next((cache for cache in caches.values() if cache), None)
    if len(set(caches.values())) > 1:
        told = " but ".join(f"{cache or 'none'} in {file}" for file, cache in caches.items())
        problems.append(f"the KV cache is {told}")
    scaled = sorted(name for name in found if name.endswith((".k_scale", ".v_scale")))
    if scaled and kv is None:
        problems.append(f"{scaled[0]} is there, but no config says that the KV cache is quantized")
    return Described(
        algorithm=algorithm,
        variants=variants,
        kv=kv or (next(cache.name for cache in KV_FORMATS.values() if cache) if scaled else "none"),
        kv_scale=None if scaled or not (cache := KV_FORMATS.get(kv or "none")) else cache.implied,
        excludes=_excludes(inner, outer),
        unlisted=bool(native_in(inner)) and "modules_to_not_convert" not in inner,
        problems=problems,
    )


def claim_of(layers: dict[str, str], module: str) -> str | None:
    """The algorithm that `layers_of` names for a module, or for the experts of its layer."""
    return layers.get(module) or layers.get(experts_module(module))


def _one(
    found: Finished, quantized: dict[str, dict[str, str]], algorithm: str | None, claims: set[str | None]
) -> tuple[Variant, ...]:
    if algorithm is None:
        return ()
    return (Variant(*_variant(found, quantized, algorithm, claims), frozenset(quantized)),)


def _mixed(
    found: Finished,
    quantized: dict[str, dict[str, str]],
    sections: dict[str, dict],
    architecture: Architecture | None,
) -> tuple[tuple[Variant, ...], list[str]]:
    """The formats of a checkpoint that lists an algorithm for each module, and where the lists and the tensors differ."""
    lists = {file: layers for file, section in sections.items() if (layers := layers_of(section))}
    layers = next(iter(lists.values()), {})
    apart = any(other != layers for other in lists.values())
    problems = [f"{CONFIG} and {QUANT_CONFIG} list other quantized_layers"] if apart else []
    groups: dict[str | None, dict[str, dict[str, str]]] = {}
    for module, tensors in quantized.items():
        groups.setdefault(claim_of(layers, module), {})[module] = tensors
    there = {
        *quantized,
        *(names for one in quantized for names in _of_experts(one, architecture)),
        *(module.rpartition(".")[0] for module in quantized),
    }
    problems += [
        f"{module} is in quantized_layers, and it is not quantized" for module in layers if module not in there
    ]
    variants = []
    for claim, group in groups.items():
        algorithm = _algorithm(found, group, {_PLAIN.get(claim, claim)})
        if _PLAIN.get(claim, claim) != algorithm:
            said = f"is {claim} in quantized_layers" if claim else "is not in quantized_layers"
            problems.append(
                f"{next(iter(group))} (of {len(group)} such) {said}, but its tensors are those of {algorithm}"
            )
        variants += _one(found, group, algorithm, {claim})
    return tuple(variants), problems


def _of_experts(module: str, architecture: Architecture | None) -> tuple[str, ...]:
    """What lists of formats call the experts of a layer, from a module in one of them."""
    experts = experts_module(module)
    return architecture.names(experts) if architecture else (experts,)


def _quantized(found: Finished) -> dict[str, dict[str, str]]:
    """Module -> name in it -> tensor, of every module that has codes or scales."""
    modules: dict[str, dict[str, str]] = {}
    for name in found:
        module, local = module_of(name)
        modules.setdefault(module, {})[local] = name
    return {
        module: tensors
        for module, tensors in modules.items()
        if module and (len(tensors) > 1 or ("weight" in tensors and found.spelled(tensors["weight"]) in _CODES))
    }


def _algorithm(found: Finished, quantized: dict[str, dict[str, str]], claims: set[str | None]) -> str | None:
    """The algorithm whose signs most modules bear; of two alike, the one that a config names."""
    votes: Counter[str] = Counter()
    for tensors in quantized.values():
        for algorithm in dict.fromkeys(_PLAIN.values()):
            form = ALGORITHMS[algorithm]
            scale = form.stored[form.scale]
            votes[algorithm] += (
                ("weight" in tensors and found.spelled(tensors["weight"]) == form.stored["weight"].dtype)
                + (form.scale in tensors and found.spelled(tensors[form.scale]) == scale.dtype)
                + (form.scale in tensors and len(found.shape(tensors[form.scale])) == scale.dims)
                + (_SECOND & tensors.keys() == _SECOND & form.stored.keys())
                + (_group_of(found, tensors, form) == scale.columns)
            )
    return max(votes, key=lambda algorithm: (votes[algorithm], algorithm in claims)) if votes else None


def _variant(
    found: Finished, quantized: dict[str, dict[str, str]], algorithm: str, claims: set[str | None]
) -> tuple[Options, Form]:
    """The format, of those whose tensors are an algorithm's, by what configs call it, by `pre_quant_scale`, by its groups."""
    alike = [(o, form) for o, form in VARIANTS if form.algorithm and _PLAIN[form.algorithm] == algorithm]
    kept = any(name.endswith(PRE_QUANT_SCALE) for name in found)
    groups = {form.tile[1] for _, form in alike}
    group = _group_size(found, quantized, alike[0][1]) if len(groups) > 1 else None

    def fits(variant: tuple[Options, Form]) -> tuple[bool, bool, bool]:
        form = variant[1]
        keeps = form.smoothing is not None and form.smoothing.keeps
        return form.algorithm in claims - {algorithm}, keeps == kept, form.tile[1] == group

    return max(alike, key=fits)


def _group_size(found: Finished, quantized: dict[str, dict[str, str]], form: Form) -> int | None:
    """How many inputs share a scale in most linears; None where nothing shows it."""
    sizes = Counter(size for tensors in quantized.values() if (size := _group_of(found, tensors, form)))
    return sizes.most_common(1)[0][0] if sizes else None


def _group_of(found: Finished, tensors: dict[str, str], form: Form) -> int | None:
    """How many inputs share a scale in a linear; None where it has no codes and scales of blocks."""
    scales = found.shape(tensors[form.scale]) if {"weight", form.scale} <= tensors.keys() else ()
    return form.stored["weight"].columns * found.shape(tensors["weight"])[-1] // scales[-1] if len(scales) > 1 else None


def _table(said: object) -> dict:
    return said if isinstance(said, dict) else {}


def native_in(inner: dict) -> str | None:
    """The algorithm that a `quantization_config` means which is in a dialect of its own."""
    natives = [(form.algorithm, form.native) for form in (*ALGORITHMS.values(), *PUBLISHED.values()) if form.native]
    method = inner.get("quant_method")
    return next(
        (
            algorithm
            for algorithm, own in natives
            if method == own.config["quant_method"]
            and inner.get(own.sign)
            and inner[own.sign] == own.config.get(own.sign, inner[own.sign])
        ),
        None,
    )


def _claimed(said: object) -> str | None:
    return said.upper() if isinstance(said, str) else None


def _cache(said: dict) -> str | None:
    """The KV cache's format that one config means."""
    scheme = said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme")
    caches = [*filter(None, KV_FORMATS.values())]
    if isinstance(scheme, dict):
        return next((cache.name for cache in caches if cache.bits == scheme.get("num_bits")), None)
    if not isinstance(scheme, str):
        return None
    return next((cache.name for cache in caches if cache.algorithm == scheme.upper()), scheme.lower())


def _excludes(inner: dict, outer: dict) -> dict[str, list[str]]:
    lists, sections = lists_in(inner, outer), {CONFIG: inner, QUANT_CONFIG: outer}
    return {
        file: [str(entry) for entry in said] if isinstance(said, list) else []
        for file, said in lists.items()
        if said or not layers_of(sections[file])  # ModelOpt writes mixed models of Hugging Face without a list
    }
