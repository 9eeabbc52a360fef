"""The tensors of an HF checkpoint: names, shapes and dtypes are checked first, then slices are read."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch

from ..common.dtypes import UNQUANTIZED
from ..common.errors import ExportError, report
from ..common.file_names import CONFIG
from ..common.folder_kinds import HEADLESS, is_headless
from ..common.strips import strips_of
from ..models import Source, copied_prefixes, head_of, parameters_of, shared_tensors
from ..models.layouts import stacked_rows
from ..models.sources import expected_shapes
from ..models.stacked_names import STACK, Slice, stacked_names
from ..planning.tensor_spec import Output
from .dialects import BLOCKS, dialect_of
from .hf_storage import ROTARY, HfStorage, SafetensorsFiles

if TYPE_CHECKING:
    from torch import Tensor

OTHER_CONFIG = "Give the config.json that belongs to these weights"


class SourceWeights:
    """The tensors of an HF checkpoint, by name; slices are read from disk when asked for.

    Quantized weights have the names that they would have without, and are multiplied out as their dialect says (dialects.py);
    where config.json says none, that is blocks of FP8. Experts that were saved in stacks are read one by one. Several threads may
    read at a time.

    homes      name of a tensor on disk -> its file
    files      name of a tensor -> the file that it, or the codes of it, are in
    quantized  the names of the quantized ones
    """

    def __init__(self, place: Path | HfStorage, only: tuple[str, ...] = ("",), config: dict | None = None) -> None:
        """Open what of a folder's safetensors files, or of another storage, has names that begin with one of `only`; stacks are
        those of `config`.
        """
        self.storage = SafetensorsFiles(place, only) if isinstance(place, Path) else place
        self.folder = self.storage.folder
        self.homes = {name: path for name, path in self.storage.homes.items() if name.startswith(only)}
        self.files = dict(self.homes)
        self.nbytes = 0  # read so far
        self.counting = Lock()
        self.slices = self._stacked(config) if config else {}
        self.dialect = dialect_of(config or {}) or BLOCKS
        self.quantized = self._quantized()

    def _quantized(self) -> frozenset[str]:
        """The names of quantized weights; `files` has these, and none of what they are kept in."""
        sign, codes = self.dialect.sign, self.dialect.codes
        named = (name.removesuffix(sign) for name in self.homes if name.endswith(sign))
        found = frozenset(
            name
            for name in named
            if name + codes in self.homes and (codes or self.storage.dtype(self._stored(name)) == "F8_E4M3")
        )
        own = {name: self.homes[name + codes] for name in found}
        kept = {name + suffix for name in found for suffix in self.dialect.tensors}
        self.files = {name: path for name, path in self.files.items() if name not in kept} | own
        return found

    def _stacked(self, config: dict) -> dict[str, Slice]:
        """The tensors that files have under the names of transformers' memory alone; `files` has them under their own."""
        if not any(name.endswith(f".mlp.experts.{STACK}") for name in self.files):
            return {}
        elsewhere = stacked_names(config).items()
        found = {name: place for name, place in elsewhere if name not in self.files and place.name in self.files}
        own = {name: self.files[place.name] for name, place in found.items()}
        taken = {place.name for place in found.values()}
        self.files = {name: path for name, path in self.files.items() if name not in taken} | own
        return found

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self.storage.close()

    def check_model(self, config: dict, dropped: tuple[str, ...] = ()) -> None:
        """`check` of the model that config.json means; names that begin with one of `dropped` are passed over."""
        sources = parameters_of(config)
        self.check(
            expected_shapes(sources.values()),
            copies={name for source in sources.values() for name in source.copies()},
            others=dropped + copied_prefixes(config),
            spare=head_of(config),
        )

    def check(
        self,
        expected: dict[str, tuple[int, ...]],
        copies: set[str] = frozenset(),
        others: tuple[str, ...] = (),
        spare: str = "",
    ) -> None:
        """Raise `ExportError` unless the checkpoint holds the `expected` names and shapes, not quantized or in its dialect.

        It may also hold rotary buffers (as old files do), the tensor `spare` (the output layer of a tied model), and names that
        begin with one of `others`. Tensors in `copies`, which are copies of other tensors, may be missing.
        """
        found = {name for name in self.files if not name.endswith(ROTARY) and not name.startswith(others)}
        if is_headless(found):
            raise ExportError(f"{self.folder} is {HEADLESS}. Give a model that writes text")
        missing = sorted(expected.keys() - found - copies)
        extra = sorted(found - expected.keys() - {spare})
        problems = [f"{self.folder}: tensor {name} is missing. Fetch the checkpoint again" for name in missing]
        more = "layers that predict one more token, which config.json"
        for names, said in ((missing, f"lack {more} means"), (extra, f"have {more} does not mean")):
            if any(name.endswith("eh_proj.weight") or name.startswith("mtp.") for name in names):
                problems.insert(0, f"these files {said}: --mtp drop")
        for name in extra:
            why = next(
                (f"says that its weight {why}" for s, why in self.dialect.unread.items() if name.endswith(s)), ""
            )
            where = why or "is not part of this architecture"
            problems.append(f"{self.folder}: tensor {name} {where}. Give a model without it")
        for name in sorted(expected.keys() & found):
            if name in self.quantized:
                problems += self._misfits(name, expected[name])
                continue
            problems += self._misshapen(name, self.shape(name), expected[name])
            if self.dtype(name) not in UNQUANTIZED:
                problems.append(
                    f"{self.folder}: tensor {name} is {self.dtype(name)}, not one of {', '.join(UNQUANTIZED)}: quantized "
                    "already? Give the original model"
                )
        report(problems)

    def _misfits(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Why a quantized weight of a model cannot be read."""
        try:
            shapes = self.dialect.shapes(shape)
        except ValueError as error:
            return [f"{self.folder}: tensor {name} {error}. {OTHER_CONFIG}"]
        problems = []
        for (suffix, dtypes), size in zip(self.dialect.tensors.items(), shapes, strict=True):
            if name + suffix not in self.homes:
                problems.append(f"{self.folder}: tensor {name}{suffix} is missing. Fetch the checkpoint again")
                continue
            problems += self._misshapen(name + suffix, self.storage.shape(name + suffix), size)
            if (dtype := self.storage.dtype(name + suffix)) not in dtypes:
                said = f"{self.folder}: tensor {name}{suffix} is {dtype}, not {' or '.join(dtypes)}"
                problems.append(f"{said}. Fetch the checkpoint again")
        return problems

    def _misshapen(self, name: str, has: list[int], means: tuple[int, ...]) -> list[str]:
        said = f"{self.folder}: tensor {name} is {tuple(has)}, but config.json means {means}. {OTHER_CONFIG}"
        return [] if tuple(has) == means else [said]

    def check_shared(self, config: dict, index: int, count: int) -> None:
        """Raise `ExportError` if a tensor is not equal to the one that Megatron takes for it, as `differing` sees it."""
        ways_out = {
            head_of(config): "config.json ties the two; transformers 5 computes with the first all the same. Set "
            f"tie_word_embeddings to false in {self.folder / CONFIG} to export it, or take it out of the files"
        }
        of_mtp = (
            "Megatron-Core's layers that predict one more token share it with the model. Leave them out with --mtp drop"
        )
        pairs = shared_tensors(config)
        report(
            [
                f"{self.folder}: tensor {name} is not equal to {pairs[name]}, which would take its place: "
                f"{ways_out.get(name, of_mtp)}"
                for name in self.differing(pairs, index, count)
            ]
        )

    def differing(self, pairs: dict[str, str], index: int = 0, count: int = 1) -> list[str]:
        """The first tensors of pairs that are there and not equal to the second, both rounded to bfloat16.

        They are compared in strips of rows. Of `count` ranks, that of number `index` reads every `count`th strip.
        """
        return [
            one
            for one, other in pairs.items()
            if one in self.files and (self.shape(one) != self.shape(other) or self._differ(one, other, index, count))
        ]

    def _differ(self, one: str, other: str, index: int, count: int) -> bool:
        strips = islice(strips_of(self.shape(one)), index, None, count)
        values = ([self.read(name, (rows,), torch.bfloat16) for name in (one, other)] for rows in strips)
        return any(not torch.equal(*both) for both in values)

    def shape(self, name: str) -> list[int]:
        if name in self.quantized:
            return [*self.dialect.whole(tuple(self.storage.shape(name + self.dialect.codes)))]
        whole = self.storage.shape(self._stored(name))
        return self.slices[name].shape(whole) if name in self.slices else whole

    def dtype(self, name: str) -> str:
        """As safetensors spells it; of a quantized weight, of its codes."""
        return self.storage.dtype(name + self.dialect.codes if name in self.quantized else self._stored(name))

    def read(self, name: str, where: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The part of tensor `name` that `where` selects, in `dtype`; `ExportError` for codes that contradict their shape."""
        if name in self.quantized:
            try:
                return self.dialect.read(partial(self._take, name), tuple(self.shape(name)), where).to(dtype)
            except ValueError as error:
                raise ExportError(f"{self.folder}: tensor {name} {error}. Fetch the checkpoint again") from error
        place = self.slices.get(name)
        if place is None or not place.experts:
            return self._take(name, "", where).to(dtype)
        rows = self.storage.shape(self._stored(name))[1]
        return self._take(name, "", (*place.where(rows, where[0]), *where[1:]))[0].to(dtype)

    def _take(self, name: str, suffix: str, where: tuple[slice, ...]) -> Tensor:
        """A part of a tensor as it is on disk."""
        part = self.storage.part(self._stored(name + suffix), tuple(slice(cut.start, cut.stop) for cut in where))
        part = part[tuple(slice(None, None, cut.step) for cut in where)]
        with self.counting:
            self.nbytes += part.nbytes
        return part

    def _stored(self, name: str) -> str:
        """The name on disk of a tensor that is not quantized, or of what a quantized one is kept in."""
        return self.slices[name].name if name in self.slices else name

    def read_part(self, source: Source, part: str, where: tuple[slice, ...]) -> Tensor:
        """What `where` selects of a layout part of a parameter, [out, in] or [out], from its own tensor or from a stack."""
        stack = source.stack
        if stack is None:
            return self.read(source.names()[part], where, source.torch_dtype)
        parts = list(source.names())
        size = self.shape(stack.name)[-1] // len(parts)
        rows = slice(*where[0].indices(size)[:2])
        columns = stacked_rows(rows, size, parts.index(part), len(parts), stack.woven)
        place = (slice(stack.index, stack.index + 1), *where[1:], columns)
        if len(place) < len(self.shape(stack.name)):
            place = (place[0], slice(None), columns)
        found = self.read(stack.name, place, source.torch_dtype)[0]
        return found.T if found.dim() == 2 else found

    def copied(self) -> tuple[Output, ...]:
        """All tensors, for a plan that copies them; `ExportError` for a quantized one."""
        dtypes = {name: self.dtype(name) for name in self.files}
        if odd := [name for name, dtype in dtypes.items() if dtype not in UNQUANTIZED]:
            raise ExportError(
                f"{self.folder}: tensor {odd[0]} is {dtypes[odd[0]]}, not one of {', '.join(UNQUANTIZED)}"
            )
        return tuple(Output(name, dtypes[name], tuple(self.shape(name))) for name in sorted(dtypes))

    def whole(self, name: str) -> Tensor:
        """A tensor as it is. Not one of a stack."""
        return self.storage.part(name, ())


def copied_tensors(place: Path | HfStorage, prefixes: tuple[str, ...]) -> tuple[Output, ...]:
    """The tensors of a checkpoint whose names begin with one of `prefixes`; `ExportError` if a prefix has none."""
    if not prefixes:
        return ()
    with SourceWeights(place, only=prefixes) as weights:
        lacking = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in weights.files)]
        why = "which is copied from the original model. Fetch the checkpoint again"
        report([f"{weights.folder}: no tensor {prefix}*, {why}" for prefix in lacking])
        return weights.copied()
