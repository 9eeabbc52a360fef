"""Both sides of a comparison: what a checkpoint's tensors decode to, and the original's weights under the same smoothing.

AWQ divides weights by vectors that norms or other weights take over. The vectors are read off the checkpoint:

    pre_quant_scale      is the vector, where it is written
    a norm took it over  exported norm / original norm, both bfloat16, and 1 more of zero-centred ones; columns where the original
                         multiplies by 0 are not compared
    v or up took it over row by row, the factor that brings the reference nearest to what is decoded (least squares);
                         o_proj or down_proj, divided by the same vector, shows whether the length of these rows was right

The linears that read a norm show whether it took the right vector over.
"""

from collections.abc import Iterator
from functools import partial
from math import lcm, prod

import torch
from torch import Tensor

from ..checkpoint.hf_weights import SourceWeights
from ..common.piece import Axis, Piece
from ..common.strips import STRIP_ELEMENTS, strips_of
from ..common.threads import MOST, Each
from ..formats import PRE_QUANT_SCALE
from ..models import feeders_of, is_linear_weight
from ..planning.parameter import Item
from ..planning.plan import Plan
from ..planning.tensor_spec import Output
from .block_sums import block_sums
from .folder import Finished

STRIP_ROWS = 128  # a strip's rows are a multiple of it
CUDA_WEIGHTS = (
    16 * STRIP_ELEMENTS
)  # that a GPU compares at once: each operation costs the host as long, whatever its size
CUDA_THREADS = 4  # that give it work; each holds a dozen float32 copies of its strips there


class Sides:
    """The tensors of `found`, and those of `weights` as a checkpoint of `plan` has them; float32 on `device`.

    Vectors that are fitted to rows are fitted by `each`, strip by strip. Several threads may read, once `prepare` was called.
    """

    def __init__(
        self, plan: Plan, found: Finished, weights: SourceWeights, device: torch.device, each: Each = map
    ) -> None:
        self.plan, self.found, self.weights, self.device, self.each = plan, found, weights, device, each
        self.items = {item.source.canonical: item for item in plan.items}
        self.feeders: dict[str, list[tuple[Item, str]]] = {}
        for item in plan.items:
            for part, vector in item.smoothed.rows:
                self.feeders.setdefault(vector, []).append((item, part))
        self._factors: dict[str, Tensor] = {}

    def comparable(self, item: Item, part: str) -> bool:
        """Whether all tensors of a part are there, as the plan has them; `structure.py` tells those that are not."""
        return all(self._is_there(item, output) for output in self._outputs(item, part))

    def _is_there(self, item: Item, output: Output) -> bool:
        name = self._on_disk(item, output)
        if name not in self.found or self.found.spelled(name) != output.dtype:
            return False
        shape, count = self.found.shape(name), torch.Size(output.shape).numel()
        if item.stacked and output.axes:
            return torch.Size(shape[1:]).numel() == count * len(item.source.names())
        return shape == output.shape or torch.Size(shape).numel() == count == 1

    def _outputs(self, item: Item, part: str) -> list[Output]:
        """The tensors that a part's weight is decoded from."""
        name = item.source.names()[part]
        if not item.form:
            return [output for output in item.parts if output.name == name]
        prefix = name.removesuffix("weight")
        found = [output for output in item.pieces if output.name.startswith(prefix)]
        return [o for o in found if not o.name.endswith((f".{PRE_QUANT_SCALE}", ".k_scale", ".v_scale"))]

    def _on_disk(self, item: Item, output: Output) -> str:
        """The name of the tensor that holds it, or the stack that does."""
        if not item.stacked:
            return output.name
        return item.stacking.name(item.source.stack.name, output.name.rpartition(".")[2])

    def shape(self, item: Item, part: str) -> tuple[int, ...]:
        """Of a part's weight before it is encoded."""
        name = item.source.names()[part]
        return next(output.shape for output in item.parts if output.name == name)

    def strips(self, item: Item, part: str) -> Iterator[tuple[slice, int]]:
        """Rows of a part, and how many strips of whole tiles of the format they are; of several, all have as many rows."""
        strips = list(strips_of(self.shape(item, part), lcm(STRIP_ROWS, item.form.tile[0] if item.form else 1)))
        most = at_once(self.device, prod(self.shape(item, part)) // len(strips)) if strips else 1
        while strips:
            several = [one for one in strips[:most] if one.stop - one.start == strips[0].stop - strips[0].start]
            yield slice(several[0].start, several[-1].stop), len(several)
            strips = strips[len(several) :]

    def pieces(self, item: Item, part: str, rows: slice) -> dict[str, Piece]:
        """What is on disk of some rows of a part, by suffix."""
        return {
            output.name.rpartition(".")[2]: Piece(self._read(item, part, output, rows), output.axes)
            for output in self._outputs(item, part)
        }

    def _read(self, item: Item, part: str, output: Output, rows: slice) -> Tensor:
        name, where = self._on_disk(item, output), [slice(None)] * len(output.shape)
        if Axis.OUT in output.axes:
            dim, suffix = output.axes.index(Axis.OUT), output.name.rpartition(".")[2]
            each = item.form.stored[suffix].rows if item.form else 1  # rows that an entry is about
            where[dim] = slice(rows.start // each, -(-rows.stop // each))
        if not item.stacked or not output.axes:
            data = self.found.read(name, *where).to(self.device)
            return data if output.shape else data.reshape(())
        stack, parts = item.source.stack, list(item.source.names())
        whole = self.found.read(name, slice(stack.index, stack.index + 1))[0].to(self.device)
        whole = item.stacking.rows(whole)
        number, many = parts.index(part), len(parts)
        return (whole[number::many] if stack.woven else whole.chunk(many)[number])[tuple(where)]

    def decoded(self, item: Item, part: str, rows: slice) -> Tensor:
        """Some rows as an engine multiplies with them."""
        pieces = self.pieces(item, part, rows)
        return item.form.decode(pieces) if item.form else next(iter(pieces.values())).data.float()

    def plain(self, item: Item, part: str, rows: slice) -> Tensor:
        """Some rows of the original, not smoothed."""
        source = item.source
        if source.copies() and source.names()[part] not in self.weights.files:
            part = source.layout.parts[0]  # a copy that the original leaves out
        where = (rows, *([slice(None)] * (len(source.shape) - 1)))
        return self.weights.read_part(source, part, where).to(self.device).float()

    def target(self, item: Item, part: str, rows: slice) -> Tensor:
        """Some rows of the original, smoothed as the checkpoint is."""
        made, factors = self._divided(item, part, rows), self.factors(item, part)
        if factors is not None:
            made = item.source.scaled(made, factors[rows])
        return made.to(item.source.torch_dtype).float()

    def prepare(self, item: Item, part: str) -> None:
        """Know the vectors that `target` of a part needs."""
        self.columns(item, part)
        self.factors(item, part)

    def _divided(self, item: Item, part: str, rows: slice) -> Tensor:
        columns, plain = self.columns(item, part), self.plain(item, part, rows)
        return plain if columns is None else plain / columns

    def columns(self, item: Item, part: str) -> Tensor | None:
        """The vector that the columns were divided by; NaN where it cannot be known; None for no smoothing."""
        if item.smoothed.columns is None:
            return None
        kept = f"{item.source.names()[part].removesuffix('weight')}{PRE_QUANT_SCALE}"
        if kept in self.found:
            return self.found.read(kept).to(self.device).float()
        found = self.feeders.get(item.smoothed.columns, [])
        if is_linear_weight(item.source.canonical):
            own = {name for name, _ in feeders_of(item.source.canonical)}
            found = [(feeder, p) for feeder, p in found if feeder.source.canonical in own] or found
        if not found:  # it should be in `kept`, which is missing
            return torch.full(item.source.shape[1:], torch.nan, device=self.device)
        feeder, part = min(found, key=lambda one: is_linear_weight(one[0].source.canonical))
        factors = self.factors(feeder, part)
        if part != "v":
            return factors
        layout = feeder.source.layout
        return factors.view(-1, 1, layout.head_dim).expand(-1, layout.queries_per_group, -1).reshape(-1)

    def factors(self, item: Item, part: str) -> Tensor | None:
        """What the rows of a part were multiplied with, because a linear after it was divided by that; None for nothing."""
        if part not in dict(item.smoothed.rows):
            return None
        name = item.source.names()[part]
        if name not in self._factors:
            self._factors[name] = self._fitted(item, part)
        return self._factors[name]

    def _fitted(self, item: Item, part: str) -> Tensor:
        if not self.comparable(item, part):
            return torch.full(self.shape(item, part)[:1], torch.nan, device=self.device)
        if item.source.canonical.endswith(".bias"):  # of v: as its weight
            return self.factors(self.items[item.source.canonical.removesuffix("bias") + "weight"], part)
        self.columns(item, part)  # not by several at once
        strips = (rows for rows, _ in self.strips(item, part))
        return torch.cat([*self.each(partial(self._fitted_rows, item, part), strips)])

    def _fitted_rows(self, item: Item, part: str, rows: slice) -> Tensor:
        mine, theirs = self.decoded(item, part, rows), self._divided(item, part, rows)
        if mine.dim() == 1:
            return item.source.factors(mine, theirs)
        theirs = theirs.nan_to_num(0)
        length, along = (block_sums(product, 1, mine.shape[1])[:, 0] for product in (theirs * theirs, mine * theirs))
        return torch.where(length == 0, 1.0, along / length)


def at_once(device: torch.device, weights: int) -> int:
    """How many strips of so many weights are compared at once there."""
    return max(CUDA_WEIGHTS // max(weights, 1), 1) if device.type == "cuda" else 1


def threads_for(device: torch.device) -> int:
    """How many threads compare strips there, at most."""
    return CUDA_THREADS if device.type == "cuda" else MOST
