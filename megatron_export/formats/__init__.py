"""The table of formats: each a module that makes a `Form`; its docstring is the specification of what is on disk.

NAME     what the user types
OPTIONS  the fields of `Options` that it reads
form     settled options -> Form

A format of the KV cache is a module too, whose FORM is a `KvForm`. docs/add-a-format.md shows how to add a format.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import product
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch

from ..common.dtypes import torch_dtypes
from ..common.errors import ExportError
from ..common.options import flag_of, options_of, told_by
from ..common.piece import Amax, Axis, Piece
from ..common.strips import CUDA_STRIP_ELEMENTS, SHARED_ELEMENTS, at_once, shared_strips
from ..common.text import near
from ..common.threads import each
from . import (
    bf16,
    cpu_kernels,
    cuda_kernels,
    fp8,
    fp8_pb,
    fp8_pc_pt,
    int4_awq,
    kv_fp8,
    kv_nvfp4,
    mxfp4,
    mxfp4_experts,
    mxfp8,
    nvfp4,
    nvfp4_awq,
    w4a8_awq,
    w4a8_mxfp4_fp8,
    w4a8_nvfp4_fp8,
    w4a16_nvfp4,
)
from .cpu import empty
from .form import AS_HF, PRE_QUANT_SCALE, Form, KvForm, Options, Smoothing, Stacked

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        bf16,
        fp8,
        fp8_pb,
        fp8_pc_pt,
        mxfp8,
        nvfp4,
        nvfp4_awq,
        w4a16_nvfp4,
        w4a8_nvfp4_fp8,
        mxfp4,
        w4a8_mxfp4_fp8,
        int4_awq,
        w4a8_awq,
    )
}
PLAIN = bf16.NAME  # what is not quantized
# Formats that publishers of models have experts in, in a dialect of their own, stacked: they stand in for those of their names.
PUBLISHED: dict[str, Form] = {form.name: form for form in (mxfp4_experts.FORM,)}
KV_FORMATS: dict[str, KvForm | None] = {"none": None} | {form.name: form for form in (kv_fp8.FORM, kv_nvfp4.FORM)}


T = TypeVar("T")


def _variants(module: ModuleType) -> list[tuple[Options, Form]]:
    """A format with every choice of its options; the defaults first."""
    choices = [told_by(options_of(Options)[name]).choices or (False, True) for name in module.OPTIONS]
    settled = [Options(**dict(zip(module.OPTIONS, choice, strict=True))) for choice in product(*choices)]
    return [(options, module.form(options)) for options in settled]


def _algorithms() -> dict[str, Form]:
    """`quant_algo` -> the first format that writes it, with its default options if these do; the defaults' algorithm is the last
    of a format.
    """
    found = {}
    for module in FORMATS.values():
        own = {form.algorithm: form for _, form in reversed(_variants(module)) if form.algorithm}
        found |= {algorithm: form for algorithm, form in own.items() if algorithm not in found}
    return found


VARIANTS = [variant for module in FORMATS.values() for variant in _variants(module)]
ALGORITHMS = _algorithms()
SCALES = tuple(dict.fromkeys(form.scale for form in ALGORITHMS.values()))  # suffixes of the scales of blocks
SUFFIXES = (  # of all tensors that a quantized linear may have beside its weight
    *dict.fromkeys(suffix for form in ALGORITHMS.values() for suffix in form.stored if suffix != "weight"),
    PRE_QUANT_SCALE,
)
TAILS = {  # what follows the name of a stack in such a dialect -> the suffix that it stands for
    tail: suffix for form in PUBLISHED.values() for suffix, tail in form.stack.tails.items()
}
_PIECE = re.compile(
    rf"(.+?)(?:[._]({'|'.join(map(re.escape, SUFFIXES))})|(_up_proj|\.down_proj)({'|'.join(map(re.escape, TAILS))}))"
)


def module_of(name: str) -> tuple[str, str]:
    """A tensor's module, or the stack of experts that it belongs to, and its own name in it."""
    if found := _PIECE.fullmatch(name):
        module, suffix, stack, tail = found.groups()
        return (module, suffix) if suffix else (module + stack, TAILS[tail])
    weight = name.endswith((".weight", "_up_proj", ".down_proj"))
    return (name.removesuffix(".weight"), "weight") if weight else ("", name)


def chosen(name: str, options: Options = Options()) -> Form:  # noqa: B008 - frozen
    """The format of that name with these options; `ExportError` for unknown ones, and for one without effect."""
    return chosen_all((name,), options)[name]


def chosen_all(names: Iterable[str], options: Options) -> dict[str, Form]:
    """The formats of these names, each with those of the options that it reads; `ExportError` for one that none of them reads."""
    modules = {name: _found(FORMATS, name) for name in names}
    for field in fields(Options):
        value, choices, flag = getattr(options, field.name), told_by(field).choices, flag_of(field)
        if choices and value not in choices:
            raise ExportError(f"{flag} must be one of {', '.join(map(str, choices))}, not {value!r}")
        if value != field.default and not any(field.name in module.OPTIONS for module in modules.values()):
            users = ", ".join(other.NAME for other in FORMATS.values() if field.name in other.OPTIONS)
            raise ExportError(f"{flag} has no effect with --format {', '.join(modules)}; it is for {users}")
    own = {name: {option: getattr(options, option) for option in module.OPTIONS} for name, module in modules.items()}
    return {name: module.form(Options(**own[name])) for name, module in modules.items()}


def groups_of(name: str) -> tuple[int, ...]:
    """The group sizes that the format of that name may have, the default first; none where that is no option of it."""
    return told_by(options_of(Options)["group_size"]).choices if "group_size" in FORMATS[name].OPTIONS else ()


def chosen_kv(name: str, scale: float | None = None, least: float = 0.0) -> KvForm | None:
    """The KV cache format of that name, None for "none"; `ExportError` with the known ones when there is none.

    With `scale`, that is the scale of all keys and values, whatever they are; otherwise none is below `least`.
    """
    form = _found(KV_FORMATS, name)
    if form is None or (scale is None and not least):
        return form
    scales = () if scale is not None and scale == form.implied else form.scales
    return replace(form, scales=scales, encode=partial(_given, form, scale, least), calibrated=scale is None)


def _given(form: KvForm, scale: float | None, least: float, k_amax: Tensor, v_amax: Tensor) -> dict[str, Tensor]:
    scales = form.encode(k_amax, v_amax)
    if scale is None:
        return {name: one.clamp(min=least) for name, one in scales.items()}
    return {} if scale == form.implied else {name: torch.full_like(one, scale) for name, one in scales.items()}


def encode(form: Form, weight: Tensor, amax: Amax) -> dict[str, Piece]:
    """`form.encode` in strips of whole tiles; by a kernel with the same result, where there is one."""
    kernel = cuda_kernels.kernel_of(form, weight, amax) or cpu_kernels.kernel_of(form, weight)
    made = (kernel or partial(_in_strips, form))(weight, amax)
    if form.input_scale is not None:
        made["input_scale"] = Piece(torch.full_like(made["input_scale"].data, form.input_scale), ())
    return made


def _in_strips(form: Form, weight: Tensor, amax: Amax) -> dict[str, Piece]:
    strips = list(shared_strips(weight, form.tile[0]))
    if len(strips) == 1:
        return form.encode(weight, amax.strip(strips[0], form.tile[0]))
    shape, dtypes = tuple(weight.shape), torch_dtypes()
    whole = {
        suffix: Piece(empty(one.shape(shape), dtypes[one.dtype], weight.device), one.axes)
        for suffix, one in form.stored.items()
    }

    def put(number: int) -> None:
        rows = strips[number]
        for suffix, piece in form.encode(weight[rows], amax.strip(rows, form.tile[0])).items():
            dim = piece.axes.index(Axis.OUT) if Axis.OUT in piece.axes else None
            if dim is None:
                whole[suffix].data.copy_(piece.data)  # the same of every strip
                continue
            size, rest = whole[suffix].data.shape[dim], piece.data.shape[dim]
            start = size - rest if number == len(strips) - 1 else number * rest
            whole[suffix].data.narrow(dim, start, rest).copy_(piece.data)

    each(put, range(len(strips)), at_once(prod(weight[strips[0]].shape)))
    return whole


def encode_bytes(form: Form, shape: Sequence[int], device: str) -> int:
    """Memory that `encode` takes beside a part of this shape and its pieces: 24 bytes for each weight of the strips that are
    encoded side by side, of which there is one where a tile's rows are more.
    """
    together = max(CUDA_STRIP_ELEMENTS if device == "cuda" else SHARED_ELEMENTS, form.tile[0] * prod(shape[1:]))
    return 24 * min(prod(shape), together)


def _found(table: dict[str, T], name: str) -> T:
    if name not in table:
        meant = near(name, table)
        hint = f" Did you mean {meant!r}?" if meant else ""
        raise ExportError(f"unknown format {name!r}.{hint} Known: {', '.join(table)}")
    return table[name]
