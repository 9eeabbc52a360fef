"""What AWQ does to each parameter of a plan: where the vector of every quantized linear divides, and what takes it over."""

from dataclasses import replace

from .formats import Form
from .formats.awq import SEARCHES, SHARED
from .item import Smoothed
from .names import Source, feeders_of, is_linear_weight, reads_heads


def smoothing(sources: dict[str, Source], left_alone: set[str], form: Form) -> dict[str, Smoothed]:
    """What AWQ does to each parameter: where the vector of every quantized linear divides, and what takes it over.

    A linear that the user left alone takes over nothing. What nothing takes over is written as `pre_quant_scale`, or,
    where the format has none, its linear is not smoothed.
    """
    how, smoothed = form.smoothing, {}
    if how is None:
        return smoothed
    for name in sources:
        if not is_linear_weight(name) or name in left_alone:
            continue
        feeders = [(feeder, part) for feeder, part in feeders_of(name) if feeder in sources]
        folded = all(not is_linear_weight(f) or (how.folds and f not in left_alone) for f, _ in feeders)
        search = how.search
        if reads_heads(name) and _queries_per_group(sources, feeders) > 1:
            folded = folded and not how.keeps
            search += SHARED if folded else ""
        if not folded and not how.keeps:
            continue
        module = name.removesuffix("weight")
        vector = f"{module}pre_quant_scale.{search}"
        own = replace(smoothed.get(name, Smoothed()), columns=vector, kept=not folded)
        if how.clip and SEARCHES[how.search].per_tensor:
            own = replace(own, ratio=f"{module}clip_ratio.{search}")
        elif how.clip:
            parts = sources[name].layout.parts
            own = replace(own, codes=tuple((part, f"{module}clip.{search}.{part}".rstrip(".")) for part in parts))
        smoothed[name] = own
        for feeder, part in feeders if folded else ():
            was = smoothed.get(feeder, Smoothed())
            smoothed[feeder] = replace(was, rows=(*was.rows, (part, vector)))
    return smoothed


def _queries_per_group(sources: dict[str, Source], feeders: list[tuple[str, str]]) -> int:
    return sources[feeders[0][0]].layout.queries_per_group
