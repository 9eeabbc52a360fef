"""Which linears are quantized and which are left alone: what the user excluded, and what engines cannot load."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..common.text import some
from ..formats import PLAIN, PUBLISHED, Form
from ..models import (
    HEAD,
    Architecture,
    Source,
    architecture_of,
    copied_prefixes,
    head_of,
    is_expert,
    is_linear_weight,
    pooled,
    shape_of,
)
from ..models.statistic_names import experts_module
from .loadable import loadable
from .recipe import Line
from .request import Request
from .tensor_spec import Output

_DOWN = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")


@dataclass(frozen=True)
class Policy:
    """What is decided about every linear.

    forms       canonical weight -> the format that it is quantized to
    left_alone  canonical weights that are not quantized
    excluded    HF modules that the configs must name, as engines would take them for quantized; sorted
    fused       canonical weights that engines join into one, so that they share their scales
    stacked     whether experts that HF stacks are written so, and not one by one
    remarks     what the user did not ask for, with the reason
    problems    why the request cannot be met
    """

    forms: dict[str, Form]
    left_alone: frozenset[str]
    excluded: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]
    stacked: bool
    remarks: tuple[str, ...]
    problems: tuple[str, ...]


def modules(source: Source, stacked: bool = False) -> tuple[str, ...]:
    """The HF modules whose weights a parameter becomes, or the stack that it becomes a part of."""
    if stacked and source.stack:
        return (source.stack.name,)
    return tuple(name.removesuffix(".weight") for name in source.names().values())


def _linears(sources: dict[str, Source], stacked: bool) -> dict[str, tuple[str, ...]]:
    """Linear -> the HF modules that it becomes."""
    return {name: modules(source, stacked) for name, source in sources.items() if is_linear_weight(name)}


def settle(
    config: dict, sources: dict[str, Source], request: Request, forms: dict[str, Form], copied: tuple[Output, ...]
) -> Policy:
    """Decide about every linear: `request` says which format it has, and whether latent attention is quantized; `forms` are these
    formats by name; `copied` are tensors that stay as they are. What each engine does with the result is said in engines/.
    """
    architecture = architecture_of(config)
    forms = {name: PUBLISHED[name] if name == architecture.published else form for name, form in forms.items()}
    quantizing = {name: form for name, form in forms.items() if form.quantization}
    stacks = [name for name, source in sources.items() if source.stack and is_linear_weight(name)]
    stacked = bool(stacks) and (architecture.stacked or not quantizing)
    linears = _linears(sources, stacked)
    matrices = (source for name, source in sources.items() if name not in linears and len(source.shape) > 1)
    head = head_of(config).removesuffix(".weight")  # engines build one for tied models too
    plain = [head, *(module for source in matrices for module in modules(source)), *_copied_modules(config, copied)]
    never = tuple(dict.fromkeys(plain))
    naming = [line for line in request.recipe_lines if _names_head(line, head)]
    if not quantizing:
        flags = [
            flag for flag, given in (("--exclude", request.exclude), ("--quantize-mla", request.quantize_mla)) if given
        ]
        problems = tuple(f"{flag} has no effect with --format {request.format}" for flag in flags)
        return Policy({}, frozenset(linears), (), (), stacked, (), problems)
    others = tuple(line for line in request.recipe_lines if line not in naming)
    named, problems = named_formats(linears, never, others)
    if stacked and not all(forms[named[name]].stack for name in stacks if named[name] in forms):
        stacked, linears = False, _linears(sources, False)
        named, problems = named_formats(linears, never, others)
    found = {name: quantizing[format] for name, format in named.items() if format in quantizing}
    if naming and naming[-1].format in quantizing:
        form, never = quantizing[naming[-1].format], tuple(module for module in never if module != head)
        problems += _head_problems(naming[-1], form, sources.get(HEAD))
        found[HEAD] = form
    of_experts = {form for name, form in found.items() if is_expert(name)}
    for form in dict.fromkeys(found.values()):
        problems += _refused(architecture, form, form in of_experts)
    if request.quantize_mla and not shape_of(config).kv_lora:
        problems.append("--quantize-mla has no effect: this model has no latent attention")
    found, remarks = loadable(config, found, request.quantize_mla, _insisted(linears, others))
    found, said, odd = _as_published(architecture, request, found, linears)
    remarks, problems = remarks + said, problems + odd
    left_out = {module for name in linears.keys() - found.keys() for module in linears[name]}
    experts = {module for module in left_out if ".experts." in module}
    left_out |= {experts_module(module) for module in experts}
    left_out -= experts if stacked else set()
    return Policy(
        forms=found,
        left_alone=frozenset(linears.keys() - found.keys()),
        excluded=tuple(sorted({name for module in (*never, *left_out) for name in architecture.names(module)})),
        fused=tuple(
            together
            for together in [*_pairs(linears), *_stacks(stacks if stacked else ())]
            if found.keys() >= set(together)
        ),
        stacked=stacked,
        remarks=tuple(remarks),
        problems=tuple(problems),
    )


def _as_published(
    architecture: Architecture, request: Request, found: dict[str, Form], linears: Iterable[str]
) -> tuple[dict[str, Form], list[str], list[str]]:
    """The same formats, where one of them is the publisher's own: in that, experts alone are quantized, all of them, and nothing in
    another format. And what the user should know; and what is wrong.
    """
    own = PUBLISHED.get(architecture.published)
    if own not in found.values():
        return found, [], []
    kept = {name: form for name, form in found.items() if form is not own or is_expert(name)}
    mine, others = f"this architecture's own {own.name}", sorted({form.name for form in kept.values()} - {own.name})
    problems = [f"{mine} and {' and '.join(others)}: no config says both. Choose one"] if others else []
    if any(is_expert(name) and name not in kept for name in linears):
        problems.append(f"some experts in {mine} and others not: engines read all of them so. Quantize all")
    if request.kv_cache != "none":
        problems.append(
            f"--kv-cache {request.kv_cache}: no engine reads scales of a cache beside {mine}. Leave it out, and start the engine "
            "with its own FP8 KV cache"
        )
    said = [f"all but experts stays in bfloat16: files of this architecture in {own.name} have experts alone in it"]
    return kept, said if len(kept) < len(found) else [], problems


def _names_head(line: Line, head: str) -> bool:
    """Whether a line is about the output layer. One for many modules, such as `*`, is not: its last word must be the layer's."""
    return line.glob.endswith(head.rpartition(".")[2]) and fnmatchcase(head, line.glob)


def _insisted(linears: dict[str, tuple[str, ...]], lines: tuple[Line, ...]) -> set[str]:
    """Linears that a line of `--set` quantizes by name, not with all of a layer: whoever writes one knows the engine it is for."""
    own = [
        line
        for line in lines
        if line.said.startswith("--set ") and line.format != PLAIN and line.glob.rpartition(".")[2].strip("*")
    ]
    return {name for name, found in linears.items() for line in own for module in found if _is_named(module, line.glob)}


def _head_problems(line: Line, form: Form, source: Source | None) -> list[str]:
    """Why the output layer cannot have this format; [] if it can."""
    if source is None:
        return [
            f"{line.said}: this model's output layer is its embedding (tie_word_embeddings), which stays in bfloat16"
        ]
    if source.copies():
        return [
            f"{line.said}: layers that predict one more token have a copy of the output layer. Add --mtp drop, or leave it in bf16"
        ]
    if form.smoothing:
        return [f"{line.said}: AWQ has no vector for the output layer. Choose a format without AWQ for it"]
    return []


def _pairs(linears: Iterable[str]) -> list[tuple[str, str]]:
    """The two projections down to latents, which read the same input."""
    queries = [name for name in linears if name.endswith(_DOWN[0])]
    return [(name, name.removesuffix(_DOWN[0]) + _DOWN[1]) for name in queries]


def _copied_modules(config: dict, copied: tuple[Output, ...]) -> Iterable[str]:
    """What configs call the copied matrices: a glob for all, and each module for engines that know no globs."""
    yield from (prefix.rstrip(".") + "*" for prefix in copied_prefixes(config) if prefix)
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


def named_formats(
    linears: dict[str, tuple[str, ...]], never: tuple[str, ...], lines: tuple[Line, ...]
) -> tuple[dict[str, str], list[str]]:
    """Canonical linear -> the name of its format, by the last of `lines` that matches its HF modules; what is wrong with the lines.

    `never` are modules that are not quantized. Linears that engines join have one format.
    """
    joined: dict[str, list[str]] = {}
    for name, found in linears.items():
        joined.setdefault(fused_with(name), []).extend(found)
    known = [module for found in joined.values() for module in found]
    plain = any(_is_plain(line.glob) for line in lines)
    own = _named_by(known) if plain else {}

    def matched(glob: str) -> set[str]:
        if _is_plain(glob):
            return set(own.get(glob, ()))
        return set(known) if glob == "*" else {module for module in known if _is_named(module, glob)}

    hits = [matched(line.glob) for line in lines]
    problems = [
        f"{line.said} matches no module; they are named like {known[0]}"
        for line, hit in zip(lines, hits, strict=True)
        if line.needed and not hit and not (line.format == PLAIN and any(_is_named(m, line.glob) for m in never))
    ]
    tried = {line.format for line, hit in zip(lines, hits, strict=True) if hit} | {PLAIN}
    lost = {line.format: line for line in lines if not line.needed and line.format not in tried}
    problems += [
        f"{line.said}: neither it nor another line of {format} matches a module" for format, line in lost.items()
    ]
    counts: dict[str, Line] = {}
    for line, hit in zip(lines, hits, strict=True):
        counts |= dict.fromkeys(hit, line)
    formats, apart = {}, []
    for key, fused in joined.items():
        mine = {module: counts[module].format if module in counts else PLAIN for module in fused}
        formats[key] = mine[fused[0]]
        if len(set(mine.values())) > 1:
            apart.append(_apart(mine, counts))
    problems += [f"{first}, and {len(apart) - 1} more such" if len(apart) > 1 else first for first in apart[:1]]
    return {name: formats[fused_with(name)] for name in linears}, problems


def _is_plain(glob: str) -> bool:
    return not any(letter in glob for letter in "*?[")


def _named_by(modules: list[str]) -> dict[str, list[str]]:
    """A name -> the modules that it names: itself, or the experts of a layer."""
    own: dict[str, list[str]] = {}
    for module in modules:
        own.setdefault(module, []).append(module)
        if ".experts." in module:
            own.setdefault(experts_module(module), []).append(module)
    return own


def _apart(formats: dict[str, str], counts: dict[str, Line]) -> str:
    """Linears that engines join with several formats: which have which, and by which line."""
    some_of: dict[str, list[str]] = {}
    for module, format in formats.items():
        some_of.setdefault(format, []).append(module)
    said = "; ".join(
        f"{some(found)} {format}" + (f" ({counts[found[0]].said})" if found[0] in counts else "")
        for format, found in some_of.items()
    )
    return f"engines fuse these linears, so they must have one format: {said}"


def _is_named(module: str, glob: str) -> bool:
    """Whether a glob matches a module (which may be a glob itself, of what is copied), or all experts of its layer."""
    return fnmatchcase(module, glob) or (".experts." in module and fnmatchcase(experts_module(module), glob))


def _refused(architecture: Architecture, form: Form, of_experts: bool) -> list[str]:
    """Why this architecture cannot be exported in this format; [] if it can. `of_experts`: experts have it."""
    if of_experts and form.no_experts:
        return [form.no_experts]
    if architecture.formats and form.name not in architecture.formats:
        why = architecture.unsmoothed if form.smoothing and form.smoothing.folds else "no engine loads it"
        *first, last = architecture.formats
        return [f"--format {form.name}: {why}. For this architecture there are {', '.join(first)} and {last}"]
    return []
