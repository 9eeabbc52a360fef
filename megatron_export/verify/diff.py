"""What differs between two checkpoints of whatever tool: names, dtypes, shapes, configs, and how far decoded values are apart.

Each weight is decoded as its own checkpoint says (`detect_format.py`), so formats may differ. Smoothing is not undone here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.file_names import CONFIG, GENERATION_CONFIG, QUANT_CONFIG
from ..common.piece import Piece
from ..common.progress import Progress, quiet
from ..common.strips import strips_of
from ..formats import SUFFIXES, TAILS, Form, module_of
from .detect_format import Described, described
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
    """Compare two folders. `ExportError` if one of them is no checkpoint."""
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
    sides = [(side, described(side)) for side in (mine, theirs)]
    compared = [name for name in both if module_of(name)[1] in ("weight", name)]  # all but scales of weights
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


def _apart(name: str, sides: list[tuple[Finished, Described]]) -> Apart | None:
    shapes = [_shape(*side, name) for side in sides]
    if shapes[0] != shapes[1]:
        return None  # told by their kinds
    signal = noise = largest = 0.0
    forms = [_form(*side, name) for side in sides]
    for rows in strips_of(shapes[0], math.lcm(STRIP_ROWS, *(form.tile[0] for form in forms if form))):
        mine, theirs = (_decoded(*side, name, rows) for side in sides)
        difference = mine - theirs
        signal += float(mine.square().sum(dtype=torch.float64))
        noise += float(difference.square().sum(dtype=torch.float64))
        largest = max(largest, float(difference.abs().max())) if difference.numel() else largest
    return Apart(name, decibels(signal, noise), largest, _same(name, *(side for side, _ in sides)))


def _same(name: str, one: Finished, other: Finished) -> bool:
    """Whether a weight and its scales are the same to the bit."""
    mine, theirs = _tensors(one, name), _tensors(other, name)
    if mine.keys() != theirs.keys():
        return False
    strips = ((one.strips(mine[suffix]), other.strips(theirs[suffix])) for suffix in mine)
    pairs = (pair for each in strips for pair in zip(*each, strict=False))
    return all(a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensors(side: Finished, name: str) -> dict[str, str]:
    """Name within its module -> tensor, of a weight and its scales."""
    module, local = module_of(name)
    if local != "weight":
        return {"weight": name}
    joint = "." if name.endswith(".weight") else "_"
    found = {suffix: f"{module}{joint}{suffix}" for suffix in SUFFIXES}
    found |= {suffix: module + tail for tail, suffix in TAILS.items() if module + tail in side}
    return {"weight": name} | {suffix: tensor for suffix, tensor in found.items() if tensor in side}


def _form(side: Finished, said: Described, name: str) -> Form | None:
    """The format that decodes a weight; None for one that is not quantized, or stacked."""
    module, local = module_of(name)
    return said.forms.get(module) if local == "weight" and len(side.shape(name)) == 2 else None


def _shape(side: Finished, said: Described, name: str) -> tuple[int, ...]:
    """Of a weight before it was encoded."""
    shape, form = side.shape(name), _form(side, said, name)
    if form is None:
        return shape
    codes = form.stored["weight"]
    return (shape[0] * codes.rows, shape[1] * codes.columns)


def _decoded(side: Finished, said: Described, name: str, rows: slice) -> Tensor:
    form = _form(side, said, name)
    if form is None:
        return side.read(name, rows).float()
    pieces, count = {}, _shape(side, said, name)[0]
    for suffix, tensor in _tensors(side, name).items():
        shape, each = side.shape(tensor), form.stored[suffix].rows if suffix in form.stored else None
        whole = each is None or not shape or shape[0] != -(-count // each)
        part = () if whole else (slice(rows.start // each, -(-rows.stop // each)),)
        pieces[suffix] = Piece(side.read(tensor, *part), ())
    return form.decode(pieces)


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
