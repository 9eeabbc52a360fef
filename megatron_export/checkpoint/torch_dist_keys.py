"""Where parameters lie in the tensors of a `torch_dist` checkpoint, and which names the tensors' keys mean.

Layers that are all alike share a tensor with an axis for them, `decoder.layers.mlp...`; else each has its own. So do experts. Gate
and up may have a tensor each, `..._w` and `..._v`; so have the segments of linear attention and of Mamba, `in_proj.weight.query`
and so on.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from ..common.safe_files import shown
from ..models.sources import MOST_PARAMETERS
from .torch_dist_metadata import Stored

TRAINING = ("optimizer.", "chained_", "opt_param_scheduler", "rng_state", "rerun_state_machine")  # which nobody reads
_ALIKE = re.compile(r"decoder\.layers\.(?=[a-z])")
_ORDER = ("", "w", "v", "query", "key", "value", "z", "beta", "alpha", "x", "B", "C", "dt")
UNKNOWN_DELTA_NET = re.compile(r"\.self_attention\.(?:in_proj\.weight|in_proj_qkvz\.weight|conv1d\.weight)$")
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(?=linear_fc[12]\.)")


@dataclass(frozen=True)
class Home:
    """Where some rows of a parameter lie: rows `start` to `stop` of the entry at index `lead` of a tensor's first axes."""

    tensor: Stored
    lead: tuple[int, ...]
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.tensor.shape[len(self.lead) + 1 :])


def home(tensor: Stored, lead: tuple[int, ...]) -> Home:
    """All rows of an entry."""
    return Home(tensor, lead, 0, tensor.shape[len(lead)])


def part_of(key: str) -> tuple[str, str]:
    """The key of a whole, and which part of it a key is: w (gate), v (up), a segment's name, or "" for all of it."""
    whole, _, part = key.rpartition(".")
    if part in _ORDER and whole.rpartition(".")[0].endswith((".in_proj", ".conv1d")):
        ours = (
            f"{whole.removesuffix('.weight')}_ba.weight" if part in ("beta", "alpha") else whole
        )  # as canonical names part it
        return ours, part
    whole, _, part = key.rpartition("_")
    return (whole, part) if part in ("w", "v") and ".linear_fc1." in whole else (key, "")


def in_order(parts: dict[str, Home]) -> tuple[Home, ...]:
    """Gate before up, and segments as Megatron-Core has them."""
    return tuple(parts[part] for part in sorted(parts, key=_ORDER.index))


def named(key: str, lead: tuple[int, ...]) -> str:
    """The name that a model alone on its rank has for the entry at index `lead` (or a longer one) of the tensor `key`."""
    layers = _ALIKE.match(key)
    if layers:
        key, lead = f"{layers[0]}{lead[0]}.{key[layers.end() :]}", lead[1:]
    return _EXPERTS.sub(lambda found: f"mlp.experts.local_experts.{found[1] or ''.join(map(str, lead[:1]))}.", key)


def entries(
    key: str, shape: tuple[int, ...], least: int = 1, experts: int = 0
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters in a tensor: names as a model alone on its rank has them, and the index of each in the first axes.

    An entry has at least `least` axes. The `experts` of a layer may share an entry, which then has no axis for them.
    """
    layers, found = _ALIKE.match(key), _EXPERTS.search(key)
    stacked = bool(found and found[1] is None)
    axes = bool(layers) + stacked
    shared = stacked and experts and (len(shape) - axes < least or shape[axes - 1] != experts)
    stacks = shape[: axes - bool(shared)]
    if len(shape) - len(stacks) < least or prod(stacks) > MOST_PARAMETERS:  # nothing that a model has
        yield key, ()
        return
    for lead in product(*map(range, stacks)):
        for expert in range(experts) if shared else [None]:
            yield named(key, lead if expert is None else (*lead, expert)), lead


def spans(homes: tuple[Home, ...], cut: slice) -> Iterator[tuple[Home, slice]]:
    """Where the rows `cut` of a parameter lie: in which tensors, and in which rows of their entries."""
    first = 0
    for one in homes:
        size = one.stop - one.start
        start, stop = max(cut.start - first, 0), min(cut.stop - first, size)
        if start < stop:
            yield one, slice(one.start + start, one.start + stop)
        first += size


def by_rank(one: Home) -> tuple[Home, ...]:
    """Gates before ups, of rows that were saved rank by rank, each rank's gates before its ups."""
    axis = len(one.lead)
    parts = sorted({(chunk.offsets[axis], chunk.sizes[axis] // 2) for chunk in one.tensor.at(one.lead)})
    gates = [Home(one.tensor, one.lead, start, start + size) for start, size in parts]
    ups = [Home(one.tensor, one.lead, start + size, start + 2 * size) for start, size in parts]
    return (*gates, *ups)


def alike(names: Iterable[str]) -> list[str]:
    """Of names that differ only in numbers, the first one, and how many more there are."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "0", name), []).append(shown(name)[1:-1])
    return [first if not more else f"{first} (and {len(more)} more like it)" for first, *more in found.values()]
