"""Which linears are quantized and which are left alone: what the user excluded, and what engines cannot load."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .formats import Form
from .names import Source, is_expert, is_linear_weight, shape_of

_OUTSIDE_LAYERS = ("lm_head", "model.embed_tokens")
_DOWN = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")


@dataclass(frozen=True)
class Policy:
    """What became of every linear.

    quantized, left_alone  canonical weights
    excluded  HF modules to name to the engines, which would otherwise take them for quantized; sorted
    fused     canonical weights that engines join into one, so that they share their scales
    remarks   what the user did not ask for, with the reason; problems: why it cannot be done
    """

    quantized: frozenset[str]
    left_alone: frozenset[str]
    excluded: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    problems: tuple[str, ...]


def modules(source: Source) -> list[str]:
    """The HF modules that a parameter becomes the weights of."""
    return [name.removesuffix(".weight") for name in source.names().values()]


def settle(
    config: dict, sources: dict[str, Source], form: Form, exclude: tuple[str, ...], quantize_mla: bool, kv: bool
) -> Policy:
    """Settle every linear; `exclude` are globs over HF module names, `quantize_mla` overrides the engines, `kv` says
    whether the scales of a KV cache are written."""
    linears = {name: modules(source) for name, source in sources.items() if is_linear_weight(name)}
    matrices = (source for name, source in sources.items() if name not in linears and len(source.shape) == 2)
    never = tuple(dict.fromkeys([*_OUTSIDE_LAYERS, *(module for source in matrices for module in modules(source))]))
    if not form.quantization:
        return Policy(frozenset(), frozenset(linears), (), (), (), tuple(_without_effect(exclude, quantize_mla)))
    out, problems = _excluded(linears, never, exclude)
    problems += _unloadable(config, form)
    latent = {name for name in linears if ".self_attention." in name} if shape_of(config).kv_lora else set()
    remarks = []
    if kv and config["architectures"][0] == "MixtralForCausalLM":
        remarks.append("SGLang does not load the scales of a KV cache beside Mixtral's keys; vLLM and TensorRT-LLM do")
    if quantize_mla and not latent:
        problems.append("--quantize-mla has no effect: this model has no latent attention")
    if latent - out and not quantize_mla and form.name != "fp8_pb":
        remarks.append(
            f"attention stays in bfloat16: not every engine loads latent attention in {form.name} "
            "(--quantize-mla quantizes it, --format fp8_pb always does)",
        )
        out |= latent
    left_out = (module for name in out for module in linears[name])
    return Policy(
        quantized=frozenset(linears.keys() - out),
        left_alone=frozenset(out),
        excluded=tuple(sorted({*never, *left_out})),
        fused=tuple(pair for pair in _pairs(linears) if not out & set(pair)),
        remarks=tuple(remarks),
        problems=tuple(problems),
    )


def _pairs(linears: Iterable[str]) -> list[tuple[str, str]]:
    """The two projections down to latents, which read the same input."""
    queries = [name for name in linears if name.endswith(_DOWN[0])]
    return [(name, name.removesuffix(_DOWN[0]) + _DOWN[1]) for name in queries]


def _together(name: str) -> str:
    """What is the same for all linears that engines join: their layer's experts, or its projections to latents."""
    if is_expert(name):
        return name.partition(".experts.")[0]
    return name.rpartition(".self_attention.")[0] if name.endswith(_DOWN) else name


def _excluded(
    linears: dict[str, list[str]], never: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[set[str], list[str]]:
    """The canonical linears that `exclude` takes out, and what is wrong with its globs."""
    joined: dict[str, list[str]] = {}
    for name, found in linears.items():
        joined.setdefault(_together(name), []).extend(found)
    known = [*(module for found in joined.values() for module in found), *never]
    problems = [
        f"--exclude {glob!r} matches no module; they are named like {known[0]}"
        for glob in exclude
        if not any(fnmatchcase(module, glob) for module in known)
    ]
    touched = set()
    for key, fused in joined.items():
        kept = [module for module in fused if not any(fnmatchcase(module, glob) for glob in exclude)]
        if len(kept) == len(fused):
            continue
        touched.add(key)
        if kept:
            problems.append(f"--exclude must name all of {_some(fused)}, which engines fuse: {_some(kept)} left out")
    return {name for name in linears if _together(name) in touched}, problems


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) < 6 else [*names[:3], f"... ({len(names)} in all)"])


def _without_effect(exclude: tuple[str, ...], quantize_mla: bool) -> list[str]:
    flags = [flag for flag, given in (("--exclude", exclude), ("--quantize-mla", quantize_mla)) if given]
    return [f"{flag} has no effect with --format bf16" for flag in flags]


def _unloadable(config: dict, form: Form) -> list[str]:
    if shape_of(config).experts and form.name == "fp8_pb" and form.native is None:
        return ["--fp8-pb-spelling modelopt: no engine loads experts in that spelling. Use native"]
    return []
