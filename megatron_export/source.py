"""The safetensors files of an HF checkpoint, read slice by slice: names, shapes and dtypes are checked before anything."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ExportError, report

_PLAIN = ("BF16", "F16", "F32")
_BLOCK = 128  # inputs and outputs that share a scale, in checkpoints that DeepSeek publishes
_SCALE = "_scale_inv"


class SourceWeights:
    """The tensors of an HF checkpoint folder, by name; slices are read from disk when asked for.

    A weight in float8 with a `weight_scale_inv` beside it, as DeepSeek publishes its models, is multiplied out: float32
    value x scale of its block of 128 x 128, rounded to bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)
        self.open = {}
        self.nbytes = 0  # read so far
        for path in sorted(set(self.files.values())):
            self.open[path] = _opened(path)

    def __enter__(self) -> "SourceWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self.open.clear()

    def check(
        self, expected: dict[str, tuple[int, ...]], copies: set[str] = frozenset(), dropped: tuple[str, ...] = ()
    ) -> None:
        """Raise unless the checkpoint holds the names and shapes that the tables expect, and no number is quantized but in
        blocks.

        Rotary buffers of old files may be there too, the output layer of a tied model, and what `dropped` begins; of
        `copies` of other tensors some may be missing.
        """
        names = {path: set(file.keys()) for path, file in self.open.items()}
        lacking = sorted(name for name, path in self.files.items() if name not in names[path])
        report(
            [f"{self.files[name]}: the index says that {name} is here. Fetch file and index again" for name in lacking]
        )
        found = {
            name for name in self.files if not name.endswith("rotary_emb.inv_freq") and not name.startswith(dropped)
        }
        for name in sorted(expected.keys() & found):
            if name + _SCALE in found:
                expected = expected | {name + _SCALE: tuple(-(-size // _BLOCK) for size in expected[name])}
        missing, extra = sorted(expected.keys() - found - copies), sorted(found - expected.keys() - {"lm_head.weight"})
        problems = [f"{self.folder}: tensor {name} is missing. Fetch the checkpoint again" for name in missing]
        if any(name.endswith("eh_proj.weight") for name in missing):
            problems.insert(
                0, "these files lack layers that predict one more token, which config.json means: --mtp drop"
            )
        problems += [
            f"{self.folder}: tensor {name} is not part of this architecture. Give a model without it" for name in extra
        ]
        for name in sorted(expected.keys() & found):
            if tuple(self.shape(name)) != expected[name]:
                problems.append(
                    f"{self.folder}: tensor {name} is {tuple(self.shape(name))}, but config.json means {expected[name]}. "
                    "Give the config.json that belongs to these weights"
                )
            if self.dtype(name) not in _PLAIN and not (self.dtype(name) == "F8_E4M3" and name + _SCALE in found):
                problems.append(
                    f"{self.folder}: tensor {name} is {self.dtype(name)}, not one of {', '.join(_PLAIN)}: quantized "
                    "already? Give the original model"
                )
        report(problems)

    def shape(self, name: str) -> list[int]:
        return self.open[self.files[name]].get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """As safetensors spells it."""
        return self.open[self.files[name]].get_slice(name).get_dtype()

    def read(self, name: str, where: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The part of tensor `name` that `where` selects, in `dtype`."""
        part = self.open[self.files[name]].get_slice(name)[where]
        self.nbytes += part.nbytes
        return (self._multiplied(name, part, where) if part.dtype is torch.float8_e4m3fn else part).to(dtype)

    def _multiplied(self, name: str, part: Tensor, where: tuple[slice, ...]) -> Tensor:
        """A part of a weight in float8, each value times the scale of its block; float32."""
        cuts = [cut.indices(size) for cut, size in zip((*where, slice(None)), self.shape(name), strict=False)]
        blocks = tuple(slice(start // _BLOCK, -(-stop // _BLOCK)) for start, stop, _ in cuts)
        scales = self.open[self.files[name + _SCALE]].get_slice(name + _SCALE)[blocks].float()
        self.nbytes += scales.nbytes
        for dim, (start, stop, _) in enumerate(cuts):
            index = torch.arange(start, stop) // _BLOCK - start // _BLOCK
            scales = scales.index_select(dim, index)
        return part.float() * scales


def _files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"{index}: not the index of a checkpoint ({type(error).__name__}: {error}). Fetch it again"
            ) from error
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ExportError(
            f"{folder}: no weights: neither {single.name} nor {index.name} is there. Give a checkpoint in safetensors format"
        )
    return dict.fromkeys(_opened(single).keys(), single)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path}: not a readable safetensors file ({error}). Fetch this file again") from error
