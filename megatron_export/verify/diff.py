"""What differs between two checkpoints of whatever tool: names, dtypes, shapes, configs, and how far decoded values are apart.

Each weight is decoded as its own checkpoint says (`diff_sides.py`), so formats may differ. Smoothing is not undone here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..common.errors import ExportError
from ..common.file_names import CONFIG, GENERATION_CONFIG, QUANT_CONFIG
from ..common.progress import Progress, quiet
from ..common.storage import bytes_of
from ..common.strips import strips_of
from .diff_sides import Side, side_of
from .folder import Finished, json_of
from .snr import decibels, finite
from .weight_pairs import STRIP_ROWS

CONFIGS = (CONFIG, QUANT_CONFIG, GENERATION_CONFIG)
SHOWN = 10  # of a kind in the table
HEADS = ("weight", "signal to noise", "largest difference")


@dataclass(frozen=True)
class Apart:
    """Two versions of a weight: dB of the first over their difference, the largest difference, whether all bytes are the same."""

    name: str
    snr: float
    largest: float
    same: bool


@dataclass
class Differences:
    """`only` names tensors of one alone, by folder; `kinds` tensors of another dtype or shape; `configs` keys that differ."""

    only: tuple[list[str], list[str]]
    kinds: list[str] = field(default_factory=list)
    configs: list[str] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether anything differs."""
        return any((*self.only, self.kinds, self.configs)) or not all(one.same for one in self.apart)


def differences(one: Path, other: Path, progress: Progress = quiet) -> Differences:
    """Compare two folders. `ExportError` if one of them is no checkpoint, or in a dialect that is not known."""
    mine, theirs = Finished(one), Finished(other)
    for side in (mine, theirs):
        if side.problems:
            raise ExportError("\n".join(side.problems))
    found = Differences((sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))))
    both = sorted(set(mine) & set(theirs))
    for name in both:
        kinds = [f"{side.spelled(name)} {list(side.shape(name))}" for side in (mine, theirs)]
        if kinds[0] != kinds[1]:
            found.kinds.append(f"{name}: {kinds[0]}, {kinds[1]}")
    for file in CONFIGS:
        found.configs += [f"{file}: {text}" for text in _keys(json_of(one, file), json_of(other, file))]
    sides = [side_of(side) for side in (mine, theirs)]
    compared = sorted(sides[0].names & sides[1].names)
    for name in progress("compare", compared):
        if (apart := _apart(name, sides)) is not None:
            found.apart.append(apart)
    return found


def _keys(mine: object, theirs: object, path: str = "") -> Iterator[str]:
    """Where two JSON values differ, key by key."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted(mine.keys() | theirs.keys()):
            yield from _keys(mine.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif mine != theirs:
        yield f"{path} is {_short(mine)}, {_short(theirs)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _apart(name: str, sides: list[Side]) -> Apart | None:
    shapes = [side.shape(name) for side in sides]
    if shapes[0] != shapes[1]:
        return None  # told by their kinds
    signal = noise = largest = 0.0
    for rows in strips_of(shapes[0], math.lcm(STRIP_ROWS, *(side.tile(name) for side in sides))):
        mine, theirs = (side.decoded(name, rows) for side in sides)
        difference = mine - theirs
        signal += float(mine.square().sum(dtype=torch.float64))
        noise += float(difference.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max())) if difference.numel() else largest
    return Apart(name, decibels(signal, noise), largest, _same(name, *sides))


def _same(name: str, one: Side, other: Side) -> bool:
    """Whether a weight and its scales are the same to the bit."""
    mine, theirs = one.tensors(name), other.tensors(name)
    if mine.keys() != theirs.keys():
        return False
    strips = ((one.found.strips(mine[suffix]), other.found.strips(theirs[suffix])) for suffix in mine)
    pairs = (pair for each in strips for pair in zip(*each, strict=False))
    return all(a.dtype == b.dtype and torch.equal(bytes_of(a), bytes_of(b)) for a, b in pairs)


def rows(found: Differences, one: Path, other: Path) -> list[tuple[str, str]]:
    """The table."""
    other_bytes = [apart for apart in found.apart if not apart.same]
    pairs = [("A", str(one)), ("B", str(other)), ("weights", f"{len(found.apart)} compared, {len(other_bytes)} differ")]
    names = ("only in A", "only in B", "kind", "config")
    for name, lines in zip(names, (*found.only, found.kinds, found.configs), strict=True):
        pairs += [(name, line) for line in lines[:SHOWN]]
        pairs += [(name, f"... and {len(lines) - SHOWN} more")] if len(lines) > SHOWN else []
    return pairs if found.any else [*pairs, ("same", "nothing differs")]


def lines(found: Differences) -> list[list[str]]:
    """Cells of the weights that are furthest apart, under `HEADS`."""
    cells = []
    for apart in sorted((apart for apart in found.apart if not apart.same), key=lambda apart: apart.snr)[:SHOWN]:
        snr = "other bytes, equal values" if apart.snr == math.inf else f"{apart.snr:.1f} dB"
        cells.append([apart.name, snr, f"{apart.largest:.4g}"])
    return cells


def as_json(found: Differences) -> dict:
    """The same for machines; infinite decibels are null."""
    return {
        "kind": "megatron_export diff 1",
        "same": not found.any,
        "only_in_a": found.only[0],
        "only_in_b": found.only[1],
        "kinds": found.kinds,
        "configs": found.configs,
        "weights": {
            apart.name: {"snr": finite(apart.snr), "largest": apart.largest, "same": apart.same}
            for apart in found.apart
        },
    }
