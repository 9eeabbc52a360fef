"""Which linears are quantized and which are left alone: what the user excluded, and what engines cannot load."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..common.text import some
from ..formats import VARIANTS, Form
from ..models import (
    Architecture,
    Source,
    architecture_of,
    copied_prefixes,
    head_of,
    is_expert,
    is_linear_weight,
    makes_keys,
    pooled,
    shape_of,
)
from ..models.statistic_names import experts_module
from .request import Request
from .tensor_spec import Output

_DOWN = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")


@dataclass(frozen=True)
class Policy:
    """What is decided about every linear.

    quantized, left_alone  canonical weights
    excluded  HF modules that the configs must name, as engines would take them for quantized; sorted
    fused     canonical weights that engines join into one, so that they share their scales
    stacked   whether experts that HF stacks are written so, and not one by one
    remarks   what the user did not ask for, with the reason
    problems  why the request cannot be met
    """

    quantized: frozenset[str]
    left_alone: frozenset[str]
    excluded: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    stacked: bool
    remarks: tuple[str, ...]
    problems: tuple[str, ...]


def modules(source: Source, stacked: bool = False) -> list[str]:
    """The HF modules whose weights a parameter becomes, or the stack that it becomes a part of."""
    if stacked and source.stack:
        return [source.stack.name]
    return [name.removesuffix(".weight") for name in source.names().values()]


def settle(
    config: dict, sources: dict[str, Source], form: Form, request: Request, copied: tuple[Output, ...]
) -> Policy:
    """Decide about every linear: `request` says what is excluded, and whether latent attention is quantized; `copied` are tensors
    that stay as they are. What each engine does with the result is said in engines/.
    """
    exclude, quantize_mla = request.exclude, request.quantize_mla
    architecture = architecture_of(config)
    stackable = form.stackable and (not form.quantization or architecture.stacked)
    stacked = stackable and any(source.stack for source in sources.values())
    linears = {name: modules(source, stacked) for name, source in sources.items() if is_linear_weight(name)}
    matrices = (source for name, source in sources.items() if name not in linears and len(source.shape) == 2)
    head = head_of(config).removesuffix(".weight")  # engines build one for tied models too
    plain = [head, *(module for source in matrices for module in modules(source)), *_copied_modules(config, copied)]
    never = tuple(dict.fromkeys(plain))
    if not form.quantization:
        flags = [flag for flag, given in (("--exclude", exclude), ("--quantize-mla", quantize_mla)) if given]
        problems = tuple(f"{flag} has no effect with --format {form.name}" for flag in flags)
        return Policy(frozenset(), frozenset(linears), (), (), stacked, (), problems)
    out, problems = _excluded(linears, never, exclude)
    problems += _refused(config, architecture, form)
    latent = {name for name in linears if ".self_attention." in name} if shape_of(config).kv_lora else set()
    remarks = []
    if quantize_mla and not latent:
        problems.append("--quantize-mla has no effect: this model has no latent attention")
    if latent - out and not quantize_mla and not form.latent:
        others = dict.fromkeys(other.name for _, other in VARIANTS if other.latent and other.quantization)
        remarks.append(
            f"attention stays in bfloat16: not every engine loads latent attention in {form.name} "
            f"(--quantize-mla quantizes it, --format {' or '.join(others)} always does)",
        )
        out |= latent
    stacks = [name for name, source in sources.items() if stacked and source.stack and name in linears]
    keys = {name for name in linears if makes_keys(name)} - out if architecture.turned else set()
    if keys and form.by_row:
        remarks.append(
            f"q, k and v stay in bfloat16: engines put the rows of q and k in another order, {form.name}'s scales not"
        )
        out |= keys
    left_out = {module for name in out for module in linears[name]}
    experts = {module for module in left_out if ".experts." in module}
    left_out |= {experts_module(module) for module in experts}
    left_out -= experts if stacked else set()
    return Policy(
        quantized=frozenset(linears.keys() - out),
        left_alone=frozenset(out),
        excluded=tuple(sorted({*never, *left_out})),
        fused=tuple(together for together in [*_pairs(linears), *_stacks(stacks)] if not out & set(together)),
        stacked=stacked,
        remarks=tuple(remarks),
        problems=tuple(problems),
    )


def _pairs(linears: Iterable[str]) -> list[tuple[str, str]]:
    """The two projections down to latents, which read the same input."""
    queries = [name for name in linears if name.endswith(_DOWN[0])]
    return [(name, name.removesuffix(_DOWN[0]) + _DOWN[1]) for name in queries]


def _copied_modules(config: dict, copied: tuple[Output, ...]) -> Iterable[str]:
    """What configs call the copied matrices: a glob for all, and each module for engines that know no globs."""
    yield from (prefix.rstrip(".") + "*" for prefix in copied_prefixes(config))
    matrices = (output.name for output in copied if len(output.shape) > 1 and output.name.endswith(".weight"))
    yield from (name.removesuffix(".weight") for name in matrices)


def _stacks(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The experts of a layer that are one tensor, with one scale."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pooled(name), []).append(name)
    return [tuple(experts) for experts in found.values()]


def fused_with(name: str) -> str:
    """A key that all linears have in common that engines join: the experts of a layer, or its projections to latents."""
    if is_expert(name):
        return name.partition(".experts.")[0]
    return name.rpartition(".self_attention.")[0] if name.endswith(_DOWN) else name


def _excluded(
    linears: dict[str, list[str]], never: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[set[str], list[str]]:
    """The canonical linears that `exclude` takes out, and what is wrong with its globs."""
    joined: dict[str, list[str]] = {}
    for name, found in linears.items():
        joined.setdefault(fused_with(name), []).extend(found)
    known = [*(module for found in joined.values() for module in found), *never]
    problems = [
        f"--exclude {glob!r} matches no module; they are named like {known[0]}"
        for glob in exclude
        if not any(_is_named(module, glob) for module in known)
    ]
    touched = set()
    for key, fused in joined.items():
        kept = [module for module in fused if not any(_is_named(module, glob) for glob in exclude)]
        if len(kept) == len(fused):
            continue
        touched.add(key)
        if kept:
            problems.append(f"--exclude must name all of {some(fused)}, which engines fuse: {some(kept)} left out")
    return {name for name in linears if fused_with(name) in touched}, problems


def _is_named(module: str, glob: str) -> bool:
    """Whether a glob matches a module (which may be a glob itself, of what is copied), or all experts of its layer."""
    return fnmatchcase(module, glob) or (".experts." in module and fnmatchcase(experts_module(module), glob))


def _refused(config: dict, architecture: Architecture, form: Form) -> list[str]:
    """Why this architecture cannot be exported in this format; [] if it can."""
    if shape_of(config).experts and form.no_experts:
        return [form.no_experts]
    if architecture.formats and form.name not in architecture.formats:
        why = architecture.unsmoothed if form.smoothing and form.smoothing.folds else "no engine loads it"
        *first, last = architecture.formats
        return [f"--format {form.name}: {why}. For this architecture there are {', '.join(first)} and {last}"]
    return []
