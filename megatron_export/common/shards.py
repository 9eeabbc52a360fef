"""Shards that are not what they say: found before anything is read, and read through their own `dequantize` where they have one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from .blocks import Blocks, blocks_in, scales_in
from .dtypes import dtype_names
from .errors import ExportError, report
from .storage import kind_of, shortage

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = ("BF16", "F16", "F32", "F64", "I64")  # the last numbers tokens, in a draft
_OTHERWISE = "or export from a checkpoint of this model that was saved in bfloat16"


class Shards(Mapping[str, "Tensor"]):
    """This rank's shards by name: the live tensor of each, or what its own `dequantize` gives, made whenever it is asked for, so
    that one is held at a time.

    live  the parameters themselves, whatever they are
    """

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live = live

    def __getitem__(self, name: str) -> Tensor:
        return plain(name, self.live[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.live)

    def __len__(self) -> int:
        return len(self.live)

    def scales(self, name: str, blocks: Blocks) -> Tensor:
        """The scales of the blocks of a parameter that had such blocks when the export was planned; `ExportError` if it has not."""
        if blocks_in(self.live[name]) != blocks:
            raise ExportError(
                f"{name} no longer has the blocks of codes that it had when the export was planned. Plan it again"
            )
        return scales_in(self.live[name])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape. Makes nothing."""
        return {name: tuple(tensor.shape) for name, tensor in self.live.items()}

    def named(self, name_of: Callable[[str], str | None]) -> Shards:
        """The same under other names, without those that have none."""
        return Shards({new: tensor for name, tensor in self.live.items() if (new := name_of(name)) is not None})

    def readable(self, device: torch.device) -> Shards:
        """These, if all can be read by a rank that works on `device`; else one `ExportError` that names those that cannot."""
        report([why for name, tensor in self.live.items() if (why := unreadable(name, tensor, device))])
        return self


def fillable(live: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """These, if weights can be loaded into all of them; else one `ExportError` that names those that are not plain."""
    quantized = [(name, kind) for name, tensor in live.items() if (kind := kind_of(tensor))]
    said = "{} is a {}, and weights are loaded into plain tensors only. Build the model without quantized parameters"
    report([said.format(name, kind) for name, kind in quantized])
    return Shards(live).readable(device).live


def unreadable(name: str, tensor: Tensor, device: torch.device) -> str:
    """Why a rank that works on `device` cannot read a parameter; "" if it can. Reads no number."""
    kind, (there, here) = kind_of(tensor), ((one.type, one.index or 0) for one in (tensor.device, device))
    if kind and type(tensor).dequantize is torch.Tensor.dequantize:
        return (
            f"{name} is a {kind}, which only that class can read, and it has no dequantize() of its own. Give the class one, "
            f"{_OTHERWISE}"
        )
    if there[0] == "meta":
        return f"{name} is on the meta device: it has no numbers. Load the weights before the export"
    if there != here:
        return f"{name} is on {tensor.device}, and this rank works on {device}. Move it there before the export"
    if why := "" if kind else shortage(tensor):
        return f"{name}: {why}. Let what has freed or offloaded it (FSDP, for example) bring it back before the export"
    if not kind and dtype_names().get(tensor.dtype) not in NUMBERS:
        return f"{name} is {tensor.dtype}: codes, whose scales are elsewhere. Export the model that they were made of"
    return ""


def plain(name: str, tensor: Tensor) -> Tensor:
    """The numbers of a parameter, as a plain tensor without gradients: itself, or what its own `dequantize` gives.

    `ExportError` if that fails, or has not the dtype, shape and device that the parameter says.
    """
    kind = kind_of(tensor)
    if not kind:
        return tensor.detach()
    try:
        with torch.no_grad():
            made = tensor.dequantize().detach()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ExportError(f"{name}: dequantize() of {kind} failed ({said}). Mend it, {_OTHERWISE}") from error
    means, gives = ((one.dtype, tuple(one.shape), one.device) for one in (tensor, made))
    if kind_of(made) or means != gives or shortage(made):
        raise ExportError(
            f"{name} is a {kind} that says {means[0]} {means[1]} on {means[2]}, but its dequantize() gives a "
            f"{kind_of(made) or 'Tensor'}, {gives[0]} {gives[1]} on {gives[2]}. Mend it, {_OTHERWISE}"
        )
    return made
