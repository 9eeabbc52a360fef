"""What AWQ does to one parameter, and what calibration says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Smoothed:
    """What AWQ does to one parameter. Vectors (float32 [in] of some linear), ratio and codes are names of statistics.

    columns  the vector that the parameter's own columns are divided by
    rows     (layout part, vector that its rows are multiplied with, as it feeds the linear of that vector)
    kept     whether `pre_quant_scale` is written, because nothing before the parameter took its vector over
    ratio    what the weight's amax is clipped to, or None
    codes    (layout part, what the amaxes of its groups are clipped to)
    """

    columns: str | None = None
    rows: tuple[tuple[str, str], ...] = ()
    kept: bool = False
    ratio: str | None = None
    codes: tuple[tuple[str, str], ...] = ()

    @property
    def vectors(self) -> set[str]:
        """The names of all vectors."""
        return {vector for _, vector in self.rows} | ({self.columns} if self.columns else set())


UNSMOOTHED = Smoothed()


@dataclass(frozen=True)
class Measured:
    """What calibration says of one item: the same on every rank, on this rank's device.

    input    amax of the linear's input, after smoothing; float32 []
    kv       amax of the keys and of the values, if the item has the scales of the cache
    vectors  name -> smoothing vector that the item names, float32 [in] of some linear
    ratio    what the weight's amax is clipped to, float32 []
    codes    layout part -> codes of its groups' ratios, uint8 [out, in/group]
    scales   layout part -> scales of the blocks of this rank's shard, of an item that keeps them
    """

    input: Tensor
    kv: tuple[Tensor, ...] = ()
    vectors: dict[str, Tensor] = field(default_factory=dict)
    ratio: Tensor | None = None
    codes: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
