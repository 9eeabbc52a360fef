"""What AWQ does to each parameter of a plan: which weights a vector divides, and what takes it over."""

from dataclasses import replace

from ..formats import Form, Smoothing
from ..formats.awq import SEARCHES, SHARED
from ..models import Source, feeders_of, is_linear_weight, other_readers_of, reads_heads, vector_home
from ..models.layouts import Fused
from ..models.segment_layouts import Heads, Segments
from ..models.statistic_names import codes_key, ratio_key, vector_key
from .smoothed import Smoothed


def smoothing(sources: dict[str, Source], forms: dict[str, Form]) -> dict[str, Smoothed]:
    """Canonical name -> what AWQ does to it, in a model whose linears have these formats, at most one of them AWQ's.

    Linears that read the same input share one vector. What feeds them takes it over, if that is exact: no linear that the user left
    alone does, and everything that reads a norm is divided by the vector, quantized or not. A vector that nothing takes over is
    written as `pre_quant_scale`; if the format has none, its linears are not smoothed.
    """
    how, smoothed = next((form.smoothing for form in forms.values() if form.smoothing), None), {}
    if how is None:
        return smoothed
    left_alone = {name for name in sources if name not in forms or not forms[name].smoothing}
    readers: dict[str, list[str]] = {}
    for name in sources:
        if is_linear_weight(name):
            readers.setdefault(vector_home(name.removesuffix(".weight")), []).append(name)
    for home, names in readers.items():
        quantized = [name for name in names if name not in left_alone]
        feeders = [
            [(f, part) for f, part in feeders_of(name) if f in sources and part in sources[f].layout.parts]
            for name in names
        ]
        folded = all(found and _takes_over(found, left_alone, how) for found in feeders)
        search = how.search
        if reads_heads(names[0]) and (how.done or _queries_per_group(sources, feeders[0]) > 1):
            folded = folded and not how.keeps
            search += SHARED if folded else ""
        if not quantized or not (folded or how.keeps):
            continue
        vector = vector_key(home, search)
        for name in quantized:
            clipped = _clipped(smoothed.get(name, Smoothed()), sources[name], how, search)
            smoothed[name] = replace(clipped, columns=vector, kept=not folded)
        taken = {feeder for found in feeders for feeder in found} if folded else set()
        for feeder, part in sorted(taken):
            was = smoothed.get(feeder, Smoothed())
            smoothed[feeder] = replace(was, rows=(*was.rows, (part, vector)))
        others = {other for feeder, _ in taken for other in other_readers_of(feeder) if other in sources}
        for name in others | (set(names) - set(quantized) if folded else set()):
            smoothed[name] = replace(smoothed.get(name, Smoothed()), columns=vector)
    return smoothed


def _takes_over(feeders: list[tuple[str, str]], left_alone: set[str], how: Smoothing) -> bool:
    return all(not is_linear_weight(name) or (how.folds and name not in left_alone) for name, _ in feeders)


def _clipped(was: Smoothed, source: Source, how: Smoothing, search: str) -> Smoothed:
    """The same with the statistics of a linear's clipping."""
    module = source.canonical.removesuffix(".weight")
    if not how.clip:
        return was
    if SEARCHES[how.search].per_tensor:
        return replace(was, ratio=ratio_key(module, search))
    return replace(was, codes=tuple((part, codes_key(module, search, part)) for part in source.layout.parts))


def _queries_per_group(sources: dict[str, Source], feeders: list[tuple[str, str]]) -> int:
    return sources[feeders[0][0]].layout.queries_per_group if feeders else 1


def clip_problems(sources: dict[str, Source], forms: dict[str, Form]) -> list[str]:
    """Why the groups of a linear cannot be clipped one by one."""
    smoothed = {name: form.smoothing for name, form in forms.items() if form.smoothing}
    groups = (name for name, how in smoothed.items() if how.clip and not SEARCHES[how.search].per_tensor)
    of_segments = [name for name in groups if isinstance(sources[name].layout, Segments | Heads | Fused)]
    return [
        f"--awq-clip: the rows of {name} lie otherwise in HF, where groups are clipped one by one. Leave --awq-clip out, or its "
        "linears in bfloat16 with --exclude"
        for name in of_segments[:1]
    ]
