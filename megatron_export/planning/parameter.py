"""One Megatron parameter on its way to HF tensors: split on the shard, smoothed, encoded, sent, joined.

What ranks send and receive is known from what layouts and formats say of shapes; they are asked once for each kind of item.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from .. import formats
from ..common.piece import Amax, Axis, Piece, join
from ..common.threads import torchs_own
from ..formats import AS_HF, PRE_QUANT_SCALE, Form, KvForm, Stacked
from ..formats.mxfp4_to_nvfp4 import cast_of
from ..models import Source
from ..models.layouts import even_cut, stacked
from .part_specs import axes_of, encode_specs, plain, split_specs, whole_specs
from .smoothed import UNSMOOTHED, Measured, Smoothed
from .tensor_spec import Output

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One canonical parameter and the HF tensors it becomes.

    ranks         those that hold the shards, in order
    form          the format that it is quantized with; None if it stays bfloat16
    kv            the format of the cache, if the cache's scales stand beside this parameter
    gather_first  a tile of the format lies on two shards: they travel to the first rank in bfloat16 and are encoded there
    stacked       it becomes slices of the tensors of all experts
    cast          it comes from MXFP4, and its format keeps the values to the bit
    kept          its codes and scales are those that the parameter holds (kept_codes.py)
    rows          of each part of every shard, first and end, if it is one strip of a parameter (row_strips.py); None for all
    first         the first item of the same kind, whose sizes are its own; None for that one
    """

    source: Source
    ranks: tuple[int, ...]
    shard_shape: tuple[int, ...]
    form: Form | None
    kv: KvForm | None
    gather_first: bool
    smoothed: Smoothed = UNSMOOTHED
    stacked: bool = False
    cast: bool = False
    kept: bool = False
    rows: tuple[int, int] | None = None
    first: Item | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it becomes; of a strip, of what it is of them."""
        return (self.first or self)._nbytes[0]

    @property
    def source_nbytes(self) -> int:
        """Bytes of its HF tensors before they are encoded."""
        return (self.first or self)._nbytes[1]

    @cached_property
    def _nbytes(self) -> tuple[int, int]:
        made = self.outputs if self.rows is None else chain(*(self.message(index) for index in range(len(self.ranks))))
        return sum(output.nbytes for output in made), sum(part.nbytes for part in self.parts)

    @property
    def smoothing_done(self) -> bool:
        """Whether its columns are divided by the vector already, as those of a model that ModelOpt calibrated are."""
        return bool(self.form and self.form.smoothing and self.form.smoothing.done)

    @property
    def stacking(self) -> Stacked:
        """How it lies in the tensors of all experts, if it is stacked."""
        return self.form.stack if self.form else AS_HF

    @property
    def splits(self) -> bool:
        """Whether a shard can be split into parts by itself; else it travels unsplit, and the whole is split."""
        return self.source.layout.splits(self.shard_shape[0])

    def split(self, shard: Tensor, index: int, measured: Measured) -> dict[str, Piece]:
        """HF name -> smoothed part of shard `index`, in the source's dtype; canonical name -> shard, if it cannot be split."""
        with torchs_own() if self.smoothed.vectors else nullcontext():
            return self._split(shard, index, measured)

    def _split(self, shard: Tensor, index: int, measured: Measured) -> dict[str, Piece]:
        dtype, vectors = self.source.torch_dtype, measured.vectors
        if not self.splits:
            smoothed = self._smooth_rows(self._smooth_columns(shard.to(dtype), index, vectors), index, vectors)
            return {self.source.canonical: plain(smoothed, dtype)}
        names, parts = self.source.names(), {}
        for part, tensor in self.source.layout.split(shard, index, len(self.ranks)).items():
            mine = tensor if self.rows is None else tensor[slice(*self.rows)]
            smoothed = self._smooth_columns(mine.to(dtype), index, vectors)
            if part in dict(self.smoothed.rows):
                smoothed = self.source.scaled(smoothed, self._mine(self._row_factors(part, vectors), index, Axis.OUT))
            parts[names[part]] = plain(smoothed, dtype)
        return parts

    def opened(self, whole: dict[str, Piece]) -> dict[str, Piece]:
        """HF name -> whole part, from what the shards that travelled make together."""
        if self.splits:
            return whole
        names, fused = self.source.names(), whole[self.source.canonical].data
        fused = self.source.layout.gathered(fused, len(self.ranks)) if self.source.cut else fused
        parts = self.source.layout.split(fused, 0, 1)
        return {names[part]: plain(tensor, fused.dtype) for part, tensor in parts.items()}

    def _smooth_columns(self, tensor: Tensor, index: int, vectors: dict[str, Tensor]) -> Tensor:
        if self.smoothed.columns is None or self.smoothing_done:
            return tensor
        return tensor.float() / self._mine(vectors[self.smoothed.columns], index, Axis.IN)

    def _smooth_rows(self, tensor: Tensor, index: int, vectors: dict[str, Tensor]) -> Tensor:
        """The rows of a shard that cannot be split into parts."""
        if not self.smoothed.rows:
            return tensor
        layout, rows = self.source.layout, self.source.shape[0]
        factors = layout.split(torch.ones(rows, device=tensor.device), 0, 1)
        factors |= {part: self._row_factors(part, vectors) for part, _ in self.smoothed.rows}
        joined = layout.join(factors, rows)
        mine = layout.rows(rows, index, len(self.ranks), self.shard_shape[0])
        return self.source.scaled(tensor, torch.cat([joined[cut] for cut in mine]) if self.source.cut else joined)

    def _row_factors(self, part: str, vectors: dict[str, Tensor]) -> Tensor:
        vector = vectors[dict(self.smoothed.rows)[part]]
        return self.source.layout.first_queries(vector) if part == "v" else vector

    def _mine(self, whole: Tensor, index: int, axis: Axis) -> Tensor:
        """What shard `index` holds of a tensor whose first dim follows `axis`."""
        if self.source.cut is not axis:
            return whole
        size, count = whole.shape[0], len(self.ranks)
        along_rows = axis is Axis.OUT and self.splits
        return whole[self.source.layout.source(size, index, count, 0) if along_rows else even_cut(size, index, count)]

    def encode(
        self, parts: dict[str, Piece], index: int, weight_amax: Tensor | None, measured: Measured
    ) -> dict[str, Piece]:
        """HF parts (of shard `index`, or whole if gathered first) -> the tensors of the checkpoint, by name."""
        encoded = {}
        for part, name in self.source.names().items():
            if self.form is None:
                encoded[name] = parts[name]
                continue
            prefix, weight = name.removesuffix("weight"), parts[name].data
            amax = Amax(weight_amax, measured.input, self._codes(part, index, measured), measured.scales.get(part))
            form = cast_of(self.form) if self.cast else self.form
            for suffix, piece in formats.encode(form, weight, amax).items():
                encoded[prefix + suffix] = piece
            if self.smoothed.kept:
                vector = measured.vectors[self.smoothed.columns].to(torch.bfloat16)
                mine = vector if self.gather_first else self._mine(vector, index, Axis.IN)
                encoded[f"{prefix}{PRE_QUANT_SCALE}"] = Piece(mine, (Axis.IN,))
        if self.kv is not None:
            attention = next(iter(parts)).rsplit(".", 2)[0]
            for name, scale in self.kv.encode(*measured.kv).items():
                encoded[f"{attention}.{name}"] = Piece(scale, ())
        return encoded

    def _codes(self, part: str, index: int, measured: Measured) -> Tensor | None:
        """The clip codes of this rank's part of the weight."""
        codes = measured.codes.get(part)  # [out, in/group]
        if codes is None or self.gather_first:
            return codes
        return self._mine(self._mine(codes, index, Axis.OUT).T, index, Axis.IN).T

    def join(self, shards: list[dict[str, Piece]]) -> dict[str, Piece]:
        """Name -> whole tensor, from what the ranks sent, in shard order."""
        return {name: join([shard[name] for shard in shards if name in shard], self.source.cut) for name in shards[0]}

    def raw_message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the first rank when the item is gathered first."""
        if not self.splits:
            return (Output(self.source.canonical, self.source.dtype, self.shard_shape, axes_of(self.shard_shape)),)
        return self._named(self._specs(index))

    def _specs(self, index: int) -> tuple:
        """Layout part, shape and axes of each that shard `index` has, or of its rows that are in this strip."""
        specs = split_specs(self.source.layout, self.shard_shape, index, len(self.ranks))
        if self.rows is None:
            return specs
        first, end = self.rows
        return tuple((part, (max(min(end, n) - first, 0), *rest), axes) for part, (n, *rest), axes in specs)

    def message(self, index: int) -> tuple[Output, ...]:
        """What shard `index` sends to the writer; what has no rows of its own comes from shard 0, or the first strip, alone."""
        if self.gather_first:
            return self.pieces if index == 0 else ()
        sent = (output for output in self._encoded(self._specs(index)) if index == 0 or self.source.cut in output.axes)
        return tuple(output for output in sent if not (self.rows and self.rows[0]) or Axis.OUT in output.axes)

    @cached_property
    def parts(self) -> tuple[Output, ...]:
        """The HF tensors of this item, whole, before they are encoded."""
        return self._named((self.first or self)._whole)

    @cached_property
    def _whole(self) -> tuple:
        """Layout part, shape and axes of each."""
        return whole_specs(self.source.layout, self.shard_shape, self.source.cut, len(self.ranks))

    def _named(self, specs: tuple) -> tuple[Output, ...]:
        names = self.source.names()
        return tuple(Output(names[part], self.source.dtype, shape, axes) for part, shape, axes in specs)

    @cached_property
    def pieces(self) -> tuple[Output, ...]:
        """The encoded tensors of the whole parts."""
        return self._encoded((self.first or self)._whole)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors of the checkpoint that this item becomes, or slices of them."""
        return self._slices if self.stacked else self.pieces

    @cached_property
    def _slices(self) -> tuple[Output, ...]:
        stack, made = self.source.stack, []
        for suffix, pieces in self._alike({output.name: output for output in self.pieces}):
            first, name = pieces[0], self.stacking.name(stack.name, suffix)
            if first.axes:
                rows = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
                shape = self.stacking.slice_shape(rows, suffix)
                made.append(Output(name, first.dtype, shape, (), stack.index, stack.count))
            elif stack.index == 0:  # one number for all experts
                made.append(Output(name, first.dtype, ()))
        return tuple(made)

    def _alike(self, whole: dict[str, Any]) -> list[tuple[str, list]]:
        """Suffix -> what `whole` has by that suffix of each part, of an expert."""
        prefixes = [name.rpartition(".")[0] for name in self.source.names().values()]
        suffixes = [name.rpartition(".")[2] for name in whole if name.startswith(f"{prefixes[0]}.")]
        return [(suffix, [whole[f"{prefix}.{suffix}"] for prefix in prefixes]) for suffix in suffixes]

    def assembled(self, whole: dict[str, Piece]) -> list[tuple[Output, Tensor]]:
        """The tensors of the checkpoint, or this expert's slices of them, from whole encoded parts."""
        if not self.stacked:
            planned = {output.name: output for output in self.pieces}
            return [(planned[name], piece.data) for name, piece in whole.items()]
        made = []
        for suffix, pieces in self._alike(whole):
            if pieces[0].axes:
                rows = stacked([piece.data for piece in pieces], self.source.stack.woven)
                made.append(self.stacking.slice(rows, suffix))
            elif self.source.stack.index == 0:
                made.append(pieces[0].data)
        return list(zip(self._slices, made, strict=True))

    def _encoded(self, specs: tuple) -> tuple[Output, ...]:
        """The tensors that parts become, of each of which there is the layout's name, shape and axes."""
        encoded: list[Output] = []
        names = self.source.names()
        for part, shape, _ in specs if self.form else ():
            prefix = names[part].removesuffix("weight")
            encoded += [one.named(prefix + suffix) for suffix, one in encode_specs(self.form, shape)]
            if self.smoothed.kept:
                encoded.append(Output(f"{prefix}{PRE_QUANT_SCALE}", "BF16", shape[1:], (Axis.IN,)))
        encoded += self._named(specs) if self.form is None else ()
        if self.kv is not None:
            attention = names[specs[0][0]].rsplit(".", 2)[0]
            encoded += [Output(f"{attention}.{name}", "F32", (), ()) for name in self.kv.scales]
        return tuple(encoded)
