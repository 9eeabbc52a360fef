"""The safetensors files of an HF checkpoint: names, shapes and dtypes are checked first, then slices are read."""

from itertools import islice
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.dtypes import UNQUANTIZED
from ..common.errors import ExportError, report
from ..common.file_names import CONFIG, INDEX
from ..common.folder_kinds import HEADLESS, is_headless
from ..common.piece import Axis
from ..common.safe_files import opened, read_index
from ..common.strips import strips_of
from ..models import Source, head_of, is_linear_weight, shared_tensors
from ..models.hf_config import text_of
from ..models.layouts import Identity, stacked_rows
from ..models.stacked_names import STACK, Slice, stacked_names
from ..planning.tensor_spec import Output
from .hf_folder import weights_in

if TYPE_CHECKING:
    from safetensors import safe_open

_BLOCK = 128  # inputs and outputs that share a scale, in checkpoints that DeepSeek publishes
_SCALE, _FP8 = "_scale_inv", "F8_E4M3"
_ROTARY = "rotary_emb.inv_freq"  # which old files have, and everybody computes
MULTIPLIED = 6  # bytes that `_multiplied` takes for each byte of bfloat16: value, scale and product are in float32


class SourceWeights:
    """The tensors of an HF checkpoint folder, by name; slices are read from disk when asked for.

    A weight in float8 with a `weight_scale_inv` beside it, as DeepSeek publishes its models, is multiplied out: float32
    value x scale of its block of 128 x 128, rounded to bfloat16. Experts that were saved in stacks are read one by one.
    Several threads may read at a time.
    """

    def __init__(self, folder: Path, only: tuple[str, ...] = ("",), config: dict | None = None) -> None:
        """Open the files of `folder` that hold tensors whose names begin with one of `only`; stacks are those of `config`."""
        self.folder, files = folder, files_of(folder)
        self.files = {name: path for name, path in files.items() if name.startswith(only)}
        self.open, self.sizes = {}, {}
        self.nbytes = 0  # read so far
        self.counting = Lock()
        for path in sorted(set(self.files.values())):
            self.open[path] = opened(path)
            self.sizes[path] = path.stat().st_size
        seen: dict[str, Path] = {}
        for path, file in self.open.items():
            for name in file.keys():  # noqa: SIM118 - not a dict
                if seen.setdefault(name, path) is not path:
                    both = f"{seen[name].name} and in {path.name}"
                    raise ExportError(f"{folder}: tensor {name} is in {both}. Fetch both again")
        lost = ((name, path) for name, path in sorted(self.files.items()) if seen.get(name) != path)
        said = [f"{path}: the index says that {name} is here. Fetch file and index again" for name, path in lost]
        odd = ((name, seen[name]) for name in sorted(seen.keys() - files.keys()) if not name.endswith(_ROTARY))
        report(
            said + [f"{path}: {name} is here, and the index does not say so. Fetch both again" for name, path in odd]
        )
        self.slices = self._stacked(config) if config else {}

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

    def __enter__(self) -> "SourceWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.open.clear()

    def check(
        self,
        expected: dict[str, tuple[int, ...]],
        copies: set[str] = frozenset(),
        others: tuple[str, ...] = (),
        spare: str = "",
    ) -> None:
        """Raise `ExportError` unless the checkpoint holds the `expected` names and shapes, not quantized or in float8 blocks.

        It may also hold rotary buffers (as old files do), the tensor `spare` (the output layer of a tied model), and names that
        begin with one of `others`. Tensors in `copies`, which are copies of other tensors, may be missing.
        """
        found = {name for name in self.files if not name.endswith(_ROTARY) and not name.startswith(others)}
        in_blocks = [name for name in expected.keys() & found if name + _SCALE in found and self.dtype(name) == _FP8]
        expected = expected | {name + _SCALE: tuple(-(-n // _BLOCK) for n in expected[name]) for name in in_blocks}
        if is_headless(found):
            raise ExportError(f"{self.folder} is {HEADLESS}. Give a model that writes text")
        missing = sorted(expected.keys() - found - copies)
        extra = sorted(found - expected.keys() - {spare})
        problems = [f"{self.folder}: tensor {name} is missing. Fetch the checkpoint again" for name in missing]
        if any(name.endswith("eh_proj.weight") for name in missing):
            lacks = "these files lack layers that predict one more token, which config.json means: --mtp drop"
            problems.insert(0, lacks)
        if any(name.endswith("eh_proj.weight") for name in extra):
            problems.insert(
                0, "these files have layers that predict one more token, which config.json does not mean: --mtp drop"
            )
        where = "is not part of this architecture. Give a model without it"
        problems += [f"{self.folder}: tensor {name} {where}" for name in extra]
        for name in sorted(expected.keys() & found):
            if tuple(self.shape(name)) != expected[name]:
                problems.append(
                    f"{self.folder}: tensor {name} is {tuple(self.shape(name))}, but config.json means {expected[name]}. "
                    "Give the config.json that belongs to these weights"
                )
            if self.dtype(name) not in UNQUANTIZED and not (self.dtype(name) == _FP8 and name + _SCALE in found):
                problems.append(
                    f"{self.folder}: tensor {name} is {self.dtype(name)}, not one of {', '.join(UNQUANTIZED)}: quantized "
                    "already? Give the original model"
                )
        report(problems)

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
        place = self.slices.get(name)
        whole = self.open[self.files[name]].get_slice(place.name if place else name).get_shape()
        return place.shape(whole) if place else whole

    def dtype(self, name: str) -> str:
        """As safetensors spells it."""
        place = self.slices.get(name)
        return self.open[self.files[name]].get_slice(place.name if place else name).get_dtype()

    def read(self, name: str, where: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The part of tensor `name` that `where` selects, in `dtype`."""
        place = self.slices.get(name)
        whole = self._mapped(name).get_slice(place.name if place else name)
        stacked = place is not None and place.experts > 0
        part = whole[*place.where(whole.get_shape()[1], where[0]), *where[1:]][0] if stacked else whole[where]
        self._count(part)
        return (self._multiplied(name, part, where) if part.dtype is torch.float8_e4m3fn else part).to(dtype)

    def read_part(self, source: Source, part: str, where: tuple[slice, ...]) -> Tensor:
        """What `where` selects of a layout part of a parameter, [out, in] or [out], from its own tensor or from a stack."""
        stack = source.stack
        if stack is None:
            return self.read(source.names()[part], where, source.dtype)
        parts = list(source.names())
        size = self.shape(stack.name)[-1] // len(parts)
        rows = slice(*where[0].indices(size)[:2])
        columns, taken = stacked_rows(rows, size, parts.index(part), len(parts), stack.woven)
        place = (slice(stack.index, stack.index + 1), *where[1:], columns)
        if len(place) < len(self.shape(stack.name)):
            place = (place[0], slice(None), columns)
        found = self.read(stack.name, place, source.dtype)[0][..., taken]
        return found.T if found.dim() == 2 else found

    def copied(self) -> tuple[Output, ...]:
        """All tensors, for a plan that copies them; `ExportError` for a quantized one."""
        dtypes = {name: self.dtype(name) for name in self.files}
        if odd := [name for name, dtype in dtypes.items() if dtype not in UNQUANTIZED]:
            raise ExportError(
                f"{self.folder}: tensor {odd[0]} is {dtypes[odd[0]]}, not one of {', '.join(UNQUANTIZED)}"
            )
        return tuple(Output(name, UNQUANTIZED[dtypes[name]], tuple(self.shape(name))) for name in sorted(dtypes))

    def whole(self, name: str) -> Tensor:
        """A tensor as it is. Not one of a stack."""
        return self._mapped(name).get_tensor(name)

    def _mapped(self, name: str) -> "safe_open":
        """The open file that holds a tensor. Files are mapped: if one got shorter, a read behind its end would kill the process."""
        path = self.files[name]
        size = path.stat().st_size if path.exists() else 0
        if size != self.sizes[path]:
            raise ExportError(
                f"{path} changed while it was read: it has {size:,} bytes now, it had {self.sizes[path]:,}. Start again when "
                "nobody writes there"
            )
        return self.open[path]

    def _count(self, part: Tensor) -> None:
        with self.counting:
            self.nbytes += part.nbytes

    def _multiplied(self, name: str, part: Tensor, where: tuple[slice, ...]) -> Tensor:
        """A part of a weight in float8, each value times the scale of its block; float32."""
        cuts = [cut.indices(size) for cut, size in zip((*where, slice(None)), self.shape(name), strict=False)]
        blocks = tuple(slice(start // _BLOCK, -(-stop // _BLOCK)) for start, stop, _ in cuts)
        scales = self._mapped(name + _SCALE).get_slice(name + _SCALE)[blocks].float()
        self._count(scales)
        for dim, (start, stop, _) in enumerate(cuts):
            index = torch.arange(start, stop) // _BLOCK - start // _BLOCK
            scales = scales.index_select(dim, index)
        return part.float() * scales


def mapped_bytes(config: dict, source: Source, shard: int) -> int:
    """Bytes of a file's pages that a rank touches when it reads a shard of `shard` bytes."""
    across = Axis.OUT if source.stack else Axis.IN  # a cut along it takes a part of every row, so it touches all pages
    nbytes = prod(source.shape) * source.dtype.itemsize if source.cut is across else shard
    if _in_float8(config, source):
        return nbytes // 2
    return nbytes * 2 if _in_float32(config) else nbytes


def reading_bytes(config: dict, source: Source, shard: int) -> int:
    """Bytes that a rank copies while it reads a shard of `shard` bytes: it casts or multiplies parts, and joins them."""
    joined = 0 if isinstance(source.layout, Identity) and not source.stack else shard
    if _in_float8(config, source):
        return MULTIPLIED * shard + joined
    return joined + (shard if _in_float32(config) else 0)


def _in_float8(config: dict, source: Source) -> bool:
    return bool(config.get("quantization_config")) and is_linear_weight(source.canonical)


def _in_float32(config: dict) -> bool:
    text = text_of(config)
    return (text.get("dtype") or text.get("torch_dtype")) == "float32"


def copied_tensors(folder: Path, prefixes: tuple[str, ...]) -> tuple[Output, ...]:
    """The tensors of a checkpoint whose names begin with one of `prefixes`; `ExportError` if a prefix has none."""
    if not prefixes:
        return ()
    with SourceWeights(folder, only=prefixes) as weights:
        lacking = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in weights.files)]
        why = "which is copied from the original model. Fetch the checkpoint again"
        report([f"{folder}: no tensor {prefix}*, {why}" for prefix in lacking])
        return weights.copied()


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file, by the index of a folder or its only safetensors file; `ExportError` if it has neither."""
    home = weights_in(folder)
    return read_index(folder) if home.name == INDEX else dict.fromkeys(opened(home).keys(), home)
