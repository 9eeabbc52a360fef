"""Dialects of quantized originals: how each keeps a weight, what of it is read, and how it is multiplied out.

A quantized weight NAME is kept as tensors that are called NAME and a suffix:

    fp8, in blocks of 128 x 128 (DeepSeek)
        NAME             e4m3 [out, in]
        NAME_scale_inv   [ceil(out/128), ceil(in/128)]   float32(value) x scale of its block, in float32
    mxfp4 (GPT-OSS); NAME itself is [experts, in, out], as bfloat16 files have it
        NAME_blocks      uint8 [experts, out, in/32, 16]
        NAME_scales      uint8 [experts, out, in/32]     e2m1(code) x 2^(scale - 127): exact in bfloat16
    compressed-tensors, format pack-quantized (Kimi K2 Thinking)
        NAME_packed      int32 [out, in/8]
        NAME_scale       [out, in/group]                 (code - 8) x scale, in the dtype of the scale
        NAME_shape       [2]                             out, in
    compressed-tensors, format mxfp4-pack-quantized
        NAME_packed      uint8 [out, in/2]
        NAME_scale       uint8 [out, in/32]              as mxfp4

Codes of four bits lie along the inputs, the first in the lowest bits. An int32 is little-endian, so its bytes are as those of the
others. Sources: DeepSeek-V3's inference code; OCP Microscaling 1.0 and integrations/mxfp4.py of transformers 5.23;
compressors/pack_quantized and quantization/lifecycle/forward_helpers.py of compressed-tensors 0.17, whose order of operations
this is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..common.dtypes import UNQUANTIZED
from ..common.safe_files import shown
from ..formats import e8m0
from ..formats.e8m0 import MX_BLOCK
from ..formats.nvfp4 import E2M1
from ..models import Source, is_expert, is_linear_weight

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Take = Callable[[str, tuple[slice, ...]], "Tensor"]  # (suffix, where) -> what is there of that tensor

BLOCK = 128  # outputs, and inputs, that share a scale in blocks of FP8
CODES = {"fp4": (*E2M1, *(-value for value in E2M1)), "int4": tuple(range(-8, 8))}
PLAIN = tuple(UNQUANTIZED)
NIBBLES = 3  # `copied` of codes of four bits: an int32 for each byte, and the values, which may be in float32


@dataclass(frozen=True)
class Dialect:
    """One way to keep quantized weights.

    tensors  suffix -> dtypes that it may have, of what a weight is kept in; the codes first
    sign     the suffix by which a quantized weight is known
    shapes   shape of a weight -> those of its tensors; `ValueError`: why it cannot be kept so
    whole    shape of the codes -> that of the weight
    read     (take, shape of the weight, where) -> that part of it; `ValueError`: what is wrong with what is kept
    unread   suffix -> what a tensor of that suffix means, because of which the weight is not read
    powers   whether every value is an e2m1 code times a power of two that 32 inputs share
    holds    whether a parameter is kept so, as far as config.json says
    ratio    bytes that are kept for each byte of bfloat16
    copied   bytes that reading copies for each byte of bfloat16, at most
    """

    tensors: dict[str, tuple[str, ...]]
    sign: str
    shapes: Callable[[Shape], tuple[Shape, ...]]
    whole: Callable[[Shape], Shape]
    read: Callable[[Take, Shape, tuple[slice, ...]], Tensor]
    unread: dict[str, str]
    powers: bool
    holds: Callable[[Source], bool]
    ratio: float
    copied: int

    @property
    def codes(self) -> str:
        """The suffix of the codes."""
        return next(iter(self.tensors))


def dialect_of(config: dict) -> Dialect | None:
    """The dialect that `quantization_config` of config.json means, None for none. `ValueError`: which it is, if it is not read."""
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method")
    if method not in ("fp8", "mxfp4", "compressed-tensors"):
        raise ValueError(f"quant_method {shown(method)}")
    try:
        return DIALECTS[method](said)
    except ValueError as error:
        raise ValueError(f"quant_method {shown(method)}{error}") from None


def _fp8(said: dict) -> Dialect:
    if said.get("weight_block_size") != [BLOCK, BLOCK]:
        raise ValueError(", not in blocks of 128 x 128" if "weight_block_size" in said else "")
    return BLOCKS


def _compressed_tensors(said: dict) -> Dialect:
    """Weights of four bits alone, with symmetric scales of groups of inputs in their order."""
    packed, groups = said.get("format"), said.get("config_groups")
    if packed not in ("pack-quantized", "mxfp4-pack-quantized"):
        raise ValueError(f", format {shown(packed)}")
    if not isinstance(groups, dict) or not groups or not all(isinstance(one, dict) for one in groups.values()):
        raise ValueError(f", config_groups {shown(groups)}")
    for part in ("transform_config", "sparsity_config"):
        if said.get(part):
            raise ValueError(f", {part} {shown(said[part])}")
    if any(one.get("input_activations") for one in groups.values()):
        raise ValueError(", inputs are quantized too")
    number = "int" if packed == "pack-quantized" else "float"
    sizes = sorted({_group_size(one.get("weights"), number) for one in groups.values()})
    if len(sizes) > 1:
        raise ValueError(f", group_size {' and '.join(map(str, sizes))}")
    return _int4(sizes[0]) if number == "int" else _microscaled()


def _group_size(weights: object, number: str) -> int:
    """How many inputs share a scale, of the settings of a group of modules."""
    if not isinstance(weights, dict):
        raise ValueError(f", weights {shown(weights)}")
    asked = {"num_bits": 4, "type": number, "strategy": "group", "symmetric": True}
    odd = [f"{key} {shown(weights.get(key))}" for key, value in asked.items() if weights.get(key) != value]
    size, order = weights.get("group_size"), weights.get("actorder")
    if type(size) is not int or size < 8 or size % 8 or (number == "float" and size != MX_BLOCK):
        odd.append(f"group_size {shown(size)}")
    if order not in (None, False, "weight", "static"):  # "group" has groups of inputs in another order
        odd.append(f"actorder {shown(order)}")
    if odd:
        raise ValueError(f", {', '.join(odd)}")
    return size


def _int4(group: int) -> Dialect:
    def shapes(shape: Shape) -> tuple[Shape, ...]:
        return (shape[0], shape[1] // 8), (shape[0], _groups_in(shape[1], group)), (2,)

    def read(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
        said = tuple(take("_shape", ()).tolist())
        if said != shape:
            raise ValueError(f"is {shape}, but its weight_shape says {said}")
        rows, columns = all_of(where, shape)
        packed = take("_packed", (rows, _spanned(columns, group, group // 8)))
        scales = take("_scale", (rows, _spanned(columns, group)))
        return _decoded(packed.contiguous().view(torch.uint8), scales, CODES["int4"])[:, _within(columns, group)]

    unread = {
        "_zero_point": "has zero points, so its codes are not symmetric",
        "_g_idx": "has groups of inputs in another order (actorder)",
    }
    return Dialect(
        tensors={"_packed": ("I32",), "_scale": PLAIN, "_shape": ("I32", "I64")},
        sign="_packed",
        shapes=shapes,
        whole=lambda codes: (codes[0], codes[1] * 8),
        read=read,
        unread=unread,
        powers=False,
        holds=_is_expert,
        ratio=0.25 + 1 / group,
        copied=NIBBLES,
    )


def _microscaled() -> Dialect:
    def shapes(shape: Shape) -> tuple[Shape, ...]:
        return (shape[0], shape[1] // 2), (shape[0], _groups_in(shape[1], MX_BLOCK))

    def read(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
        rows, columns = all_of(where, shape)
        packed = take("_packed", (rows, _spanned(columns, MX_BLOCK, MX_BLOCK // 2)))
        scales = _powers(take("_scale", (rows, _spanned(columns, MX_BLOCK))))
        return _decoded(packed, scales, CODES["fp4"])[:, _within(columns, MX_BLOCK)]

    tensors, whole = {"_packed": ("U8",), "_scale": ("U8",)}, lambda codes: (codes[0], codes[1] * 2)
    return replace(MXFP4, tensors=tensors, sign="_packed", shapes=shapes, whole=whole, read=read)


def _mxfp4_shapes(shape: Shape) -> tuple[Shape, ...]:
    experts, inputs, outputs = shape
    scales = (experts, outputs, _groups_in(inputs, MX_BLOCK))
    return (*scales, MX_BLOCK // 2), scales


def _mxfp4_read(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
    experts, inputs, outputs = all_of(where, shape)
    place = (experts, outputs, _spanned(inputs, MX_BLOCK))
    values = _decoded(take("_blocks", place).flatten(2), _powers(take("_scales", place)), CODES["fp4"])
    return values[..., _within(inputs, MX_BLOCK)].transpose(1, 2)


def _fp8_shapes(shape: Shape) -> tuple[Shape, ...]:
    return shape, tuple(-(-size // BLOCK) for size in shape)


def _fp8_read(take: Take, shape: Shape, where: tuple[slice, ...]) -> Tensor:
    cuts = all_of(where, shape)
    return in_blocks(take("", cuts), take("_scale_inv", tuple(_spanned(cut, BLOCK) for cut in cuts)), cuts)


def in_blocks(codes: Tensor, scales: Tensor, cuts: tuple[slice, ...]) -> Tensor:
    """What `cuts` select of a weight, float32, from its codes there and the scales of the blocks that they touch."""
    scales = scales.float()
    for dim, cut in enumerate(cuts):
        scales = scales.index_select(dim, torch.arange(cut.start, cut.stop, cut.step) // BLOCK - cut.start // BLOCK)
    return codes.float() * scales


def _is_expert(source: Source) -> bool:
    return is_linear_weight(source.canonical) and is_expert(source.canonical)


def _groups_in(inputs: int, group: int) -> int:
    if inputs % group:
        raise ValueError(f"has {inputs} inputs, which groups of {group} do not divide")
    return inputs // group


def all_of(where: tuple[slice, ...], shape: Shape) -> tuple[slice, ...]:
    """A slice of every dim, with its start and stop."""
    whole = (*where, *[slice(None)] * (len(shape) - len(where)))
    return tuple(slice(*cut.indices(size)) for cut, size in zip(whole, shape, strict=True))


def _spanned(cut: slice, group: int, each: int = 1) -> slice:
    """The entries of the groups that a slice touches, of which each group has `each`."""
    return slice(cut.start // group * each, -(-cut.stop // group) * each)


def _within(cut: slice, group: int) -> slice:
    """The slice of what is in these groups."""
    first = cut.start // group * group
    return slice(cut.start - first, cut.stop - first)


def _powers(scales: Tensor) -> Tensor:
    """What e8m0 bytes stand for, bfloat16 of the same shape: exact, as the products with codes are."""
    return e8m0.values_of(scales).to(torch.bfloat16)


def _decoded(packed: Tensor, scales: Tensor, codes: tuple[float, ...]) -> Tensor:
    """uint8 [..., n/2], two codes in a byte, times scales [..., groups] of equal groups: [..., n] in the dtype of the scales."""
    values, byte = torch.tensor(codes, dtype=scales.dtype), torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), dim=1)
    found = torch.nn.functional.embedding(packed.int(), pairs).flatten(-2)  # [..., n]
    return found.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1)).flatten(-2)


BLOCKS = Dialect(
    tensors={"": ("F8_E4M3",), "_scale_inv": PLAIN},
    sign="_scale_inv",
    shapes=_fp8_shapes,
    whole=lambda codes: codes,
    read=_fp8_read,
    unread={},
    powers=False,
    holds=lambda source: is_linear_weight(source.canonical),
    ratio=0.5,
    copied=6,  # value, scale and product are in float32
)
MXFP4 = Dialect(
    tensors={"_blocks": ("U8",), "_scales": ("U8",)},
    sign="_blocks",
    shapes=_mxfp4_shapes,
    whole=lambda codes: (codes[0], MX_BLOCK * codes[2], codes[1]),
    read=_mxfp4_read,
    unread={},
    powers=True,
    holds=_is_expert,
    ratio=17 / 64,
    copied=NIBBLES,
)
DIALECTS: dict[str, Callable[[dict], Dialect]] = {
    "fp8": _fp8,
    "mxfp4": lambda said: MXFP4,
    "compressed-tensors": _compressed_tensors,
}
