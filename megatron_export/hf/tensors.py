"""A rank's shards of a live transformers model, each made of its HF tensors when it is asked for, so that one is held at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.errors import ExportError, report
from ..common.piece import Axis
from ..common.shards import plain, unreadable
from ..models import Source
from ..models.layouts import chunk, even_cut, pad_rows, stacked_rows
from ..models.stacked_names import Slice
from ..planning.plan import Held
from .compressed import Coded
from .dtensors import Spread, local_of, spread_of
from .names import Places, homes_of


@dataclass
class Live:
    """The tensors of a model by their names in memory.

    held      parameters and persistent buffers
    fetchers  of those that are on meta here and kept elsewhere, what gets them
    codes     of those that are codes, what these are multiplied with
    """

    held: dict[str, Tensor]
    fetchers: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    codes: dict[str, Coded] = field(default_factory=dict)
    _fetched: tuple[str, Tensor] | None = None
    _spreads: dict[str, Spread | None] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, of codes that of what they stand for."""
        shape = tuple(self.held[name].shape)
        return self.codes[name].shape(shape) if name in self.codes else shape

    def spread(self, name: str) -> Spread | None:
        """How a tensor is spread over ranks; None where every rank has it whole."""
        if name not in self._spreads:
            self._spreads[name] = spread_of(name, self.held[name])
        return self._spreads[name]

    def read(self, name: str) -> Tensor:
        """The numbers that this rank has of a tensor, as a plain tensor."""
        if name in self.fetchers:
            if self._fetched is None or self._fetched[0] != name:  # a stack of experts is asked for once an expert
                self._fetched = name, self.fetchers[name]().detach()
            return self._fetched[1]
        tensor = local_of(self.held[name])
        if name in self.codes:
            return self.codes[name].decode(tensor.detach().as_subclass(Tensor))
        return plain(name, tensor)

    def check(self) -> None:
        """One `ExportError` that names the tensors that cannot be read. They may be on several devices, as accelerate puts them."""
        direct = self.held.keys() - self.fetchers.keys() - self.codes.keys()
        mine = {name: local_of(one) for name, one in self.held.items() if name in direct}
        report([why for name, one in mine.items() if (why := unreadable(name, one, one.device))])


@dataclass(frozen=True)
class Spot:
    """Where a parameter is: the ranks that hold its shards, in order, and the axis along which its parts are cut.

    whole  every rank of the world has it whole; else `ranks` alone have it
    """

    ranks: tuple[int, ...]
    cut: Axis | None = None
    whole: bool = False

    @property
    def count(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a weight, from the number of the first of each; and the shape of the whole."""

    data: Tensor
    firsts: tuple[int, int]
    shape: tuple[int, ...]


EVERYWHERE = Spot((0,), whole=True)


def spot_of(source: Source, place: Slice, spread: Spread | None, size: int) -> Spot:
    """Where a layout part of a parameter is, in a tensor that is spread so and has `size` along the dim that is cut."""
    if spread is None:
        return EVERYWHERE
    stack = bool(source.stack) or place.experts > 0
    expert = source.stack.index if source.stack else place.expert
    if stack and spread.dim == 0:
        return Spot((spread.ranks[expert // -(-size // len(spread.ranks))],))
    dim, fits = spread.dim - stack, spread.blocks == (place.parts if stack and spread.dim == 1 else 1)
    if dim > 1 or not fits or source.stack:
        raise ExportError(
            f"{place.name} is cut along dim {spread.dim} in {spread.blocks} blocks: ranks do not have the same rows of each HF "
            "tensor in it. Cut it along its experts, or export from one process"
        )
    return Spot(spread.ranks, (Axis.OUT, Axis.IN)[dim])


class Parameters(Mapping[str, Tensor]):
    """Canonical name -> this rank's shard of the parameter, on the device that the rank works on; of all that it has a shard of.

    smoothed  HF name of a weight -> what its columns are multiplied with and then divided by, as ModelOpt does where linears that
              read one input were smoothed by vectors of their own
    """

    def __init__(
        self,
        sources: dict[str, Source],
        places: Places,
        live: Live,
        here: tuple[int, torch.device],
        smoothed: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.homes = {name: found for name, source in sources.items() if (found := homes_of(source, places))}
        self.sources, self.live, self.smoothed = sources, live, smoothed
        self.rank, self.device = here
        self.spots = {name: self._spot(sources[name], homes) for name, homes in self.homes.items()}

    def __iter__(self) -> Iterator[str]:
        return (name for name, spot in self.spots.items() if spot.whole or self.rank in spot.ranks)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        source, spot = self.sources[name], self.spots[name]
        parts = {part: self.part(source, part, place) for part, place in self.homes[name].items()}
        if spot.cut is not Axis.OUT:
            return source.layout.join(parts, sum(len(part) for part in parts.values())).to(self.device)
        sizes = [-(-shape[0] // spot.count) for shape in self._shapes(name)]
        padded = [pad_rows(part, size) for part, size in zip(parts.values(), sizes, strict=True)]
        return (padded[0] if len(padded) == 1 else torch.cat(padded)).to(self.device)

    def part(self, source: Source, part: str, place: Slice) -> Tensor:
        """What this rank has of a layout part, [out, in] or [out]: smoothed anew where that is called for."""
        spot, first = self.spots[source.canonical], 0
        if place.experts or source.stack:
            spread = self.live.spread(place.name)
            if spread and spread.dim == 0:
                first = chunk(self.live.shape(place.name)[0], spread.ranks.index(self.rank), len(spread.ranks)).start
        found = _cut_out(source, part, place, self.live.read(place.name), first)
        if (vectors := self.smoothed.get(source.names()[part])) is None:
            return found
        if spot.cut is Axis.IN:
            own = even_cut(len(vectors[0]), spot.ranks.index(self.rank), spot.count)
            vectors = tuple(vector[own] for vector in vectors)
        old, new = (vector.to(found.device).float() for vector in vectors)
        return (found.float() * old / new).to(torch.bfloat16)

    def piece(self, linear: str, part: str) -> Piece | None:
        """What this rank has of a layout part of a linear's weight, as it is in the model; None where it has nothing."""
        name = f"{linear}.weight"
        spot, source = self.spots[name], self.sources[name]
        if not (spot.whole or self.rank in spot.ranks):
            return None
        shape = dict(zip(self.homes[name], self._shapes(name), strict=True))[part]
        index = 0 if spot.whole else spot.ranks.index(self.rank)
        firsts = [
            chunk(size, index, spot.count).start if spot.cut is axis else 0
            for size, axis in zip(shape, Axis, strict=True)
        ]
        return Piece(self.part(source, part, self.homes[name][part]), (firsts[0], firsts[1]), shape)

    def held(self, name: str) -> Held:
        """Where a parameter lives. Makes nothing. Ranks that would have nothing but padding are left out."""
        spot, shapes = self.spots[name], self._shapes(name)
        rows, *columns = sum(shape[0] for shape in shapes), *shapes[0][1:]
        if spot.whole:
            return Held(spot.ranks, (rows, *columns))
        if spot.cut is Axis.OUT:
            longest = max(shape[0] for shape in shapes)
            used = spot.ranks[: -(-longest // -(-longest // spot.count))]
            rows = sum(-(-shape[0] // spot.count) for shape in shapes)
            return Held(used, (rows, *columns), by_part=True, cut=spot.cut)
        if spot.cut is Axis.IN:
            odd = (
                f"{name} has {columns[0]} inputs, which {spot.count} ranks cut unevenly"
                if columns[0] % spot.count
                else ""
            )
            return Held(spot.ranks, (rows, columns[0] // spot.count), odd, by_part=True, cut=spot.cut)
        return Held(spot.ranks, (rows, *columns), by_part=True)

    def _shapes(self, name: str) -> list[tuple[int, ...]]:
        """The shape of each part of a parameter, over all ranks."""
        source = self.sources[name]
        return [
            tuple(_cut_out(source, part, place, torch.empty(self.live.shape(place.name), device="meta")).shape)
            for part, place in self.homes[name].items()
        ]

    def _spot(self, source: Source, homes: dict[str, Slice]) -> Spot:
        found = set()
        for place in homes.values():
            spread = self.live.spread(place.name)
            found.add(spot_of(source, place, spread, self.live.shape(place.name)[spread.dim] if spread else 0))
        if len(found) > 1:
            names = ", ".join(sorted(place.name for place in homes.values()))
            raise ExportError(
                f"{names}: engines fuse these, so they must be cut alike. Cut them so, or export from one process"
            )
        return found.pop()


def _cut_out(source: Source, part: str, place: Slice, tensor: Tensor, first: int = 0) -> Tensor:
    """A layout part from the tensor that it is, or that it is in; of a stack, `tensor` begins with expert number `first`."""
    if source.stack and tensor.dim() > 1:
        slab, parts = tensor[source.stack.index - first], source.layout.parts  # [in, all outs] or [all outs]
        size = slab.shape[-1] // len(parts)
        rows = stacked_rows(slice(0, size), size, parts.index(part), len(parts), source.stack.woven)
        return slab[..., rows].T if slab.dim() == 2 else slab[rows]
    if place.experts and tensor.dim() == 3:
        size = tensor.shape[1] // place.parts
        return tensor[place.expert - first, place.part * size : (place.part + 1) * size]
    return tensor
