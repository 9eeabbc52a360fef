"""Which weights keep the values that they have in MXFP4, and what the user is told of it."""

from collections import Counter
from collections.abc import Iterable

from ..formats import Form
from ..formats.mxfp4_to_nvfp4 import cast_of
from ..models import Source
from .parameter import Item


def casts(
    sources: dict[str, Source], forms: dict[str, Form], fused: tuple[tuple[str, ...], ...], powers: frozenset[str]
) -> set[str]:
    """The canonical weights that do: of those that share a scale, all or none.

    sources, forms, fused  by canonical name: the parameters, the formats of those that are quantized, and what shares a scale
    powers                 the HF weights that come from MXFP4
    """
    names = {
        name: {sources[name].stack.name} if sources[name].stack else set(sources[name].names().values())
        for name, form in forms.items()
        if powers and cast_of(form)
    }
    found = {name for name, on_disk in names.items() if on_disk <= powers}
    return found - {name for together in fused if not found.issuperset(together) for name in together}


def cast_remarks(items: Iterable[Item]) -> tuple[str, ...]:
    """A sentence for each format that does so."""
    counts = Counter(item.form.name for item in items if item.cast)
    said = (
        "{} weights come from MXFP4, and {} keeps their values to the bit: its scales are powers of two. Blocks that are more than "
        "2^17 times smaller than the largest are rounded"
    )
    return tuple(said.format(count, name) for name, count in sorted(counts.items()))
