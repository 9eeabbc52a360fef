"""The kernels in Triton's interpreter, which runs them on the CPU: prints what differs from plain torch, then how much ran.

Run as a module of its own, as the interpreter must be asked for before Triton is imported.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from megatron_export.common.piece import Amax  # noqa: E402
from megatron_export.formats import awq, awq_gram, cuda_gram, cuda_kernels, triton_scales  # noqa: E402

from .kernel_cases import (  # noqa: E402
    FORMS,
    cases,
    changed,
    decided,
    outputs,
    searched_cases,
    smoothings,
    wrong,
    wrongly_rounded,
)
from .models import same  # noqa: E402

DTYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
ALL_NUMBERS = 510 * 128  # finite ones of bfloat16
NUMPY = {
    tl.float64: np.float64,
    tl.float32: np.float32,
    tl.float16: np.float16,
    tl.bfloat16: np.uint16,
    tl.float8e4nv: np.uint8,
}


def fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """float32(x * y + z), rounded once, as GPUs do; the interpreter's rounds twice.

    The product is exact in float64. The sum is rounded to odd there, which a second rounding does not notice.
    """
    product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    even = total.view(np.int64) % 2 == 0
    odd = np.where(even & (lost != 0) & np.isfinite(total), np.nextafter(total, np.copysign(np.inf, lost)), total)
    return TensorHandle(odd.astype(np.float32), z.dtype.scalar)


def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, mode: object = None) -> TensorHandle:
    """To nearest even, and to 448 beyond it, as GPUs do; the interpreter rounds halves up."""
    numbers = torch.from_numpy(np.ascontiguousarray(source.data)).view(DTYPES[source.dtype.scalar])
    if target.scalar == tl.float8e4nv:
        numbers = numbers.clamp(-448, 448)
    made = numbers.to(DTYPES[target.scalar])
    return TensorHandle(made.view(torch.uint8).numpy().view(NUMPY[target.scalar]), target.scalar)


def by_size(judge: Callable, case: tuple, *rest: Any) -> str:
    """What `judge` says, with few large programs for weights of all numbers, several small ones for others.

    The interpreter takes nearly as long for a program of few elements as for one of thousands. Those of fp8_pc_pt take a row each.
    """
    large = case[2].numel() >= ALL_NUMBERS
    cuda_kernels.LANES, cuda_kernels.TILE, cuda_kernels.SMOOTHED_ROWS = (
        (1024, 1 << 14, 512) if large else (256, 4096, 32)
    )
    if case[1] is FORMS["fp8_pc_pt"]:
        cuda_kernels.TILE = 128
    return judge(case, *rest)


def main() -> None:
    """Run all cases."""
    InterpreterBuilder.create_fma = fma
    for name in ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast)
    with np.errstate(all="ignore"):
        said = [by_size(wrong, case, cuda_kernels.made_for(case[1]), "cpu") for case in cases(seed=0, count=3)]
        said += [by_size(wrongly_rounded, smoothed, "cpu") for smoothed in smoothings(seed=0)]
        cuda_kernels.LANES = 1 << 14
        amaxes = torch.tensor([0.0, 7.0, 0.1, 2.0**-133, 3.0e38])
        said += [wrong(case, cuda_kernels.made_for(case[1]), "cpu") for case in searched_cases(0, amaxes)]
        cuda_kernels.LANES = 32
        label, form, weight, amax = decided()
        few = (weight * 100).round() / 128  # whose errors are often equal
        for numbers, ratio in ((weight, 0.3), (weight, 0.6), (few, 1.0)):  # as clipping does
            case = f"{label}, amax times {ratio}", form, numbers, Amax(numbers.abs().amax().float() * ratio, amax.input)
            said.append(wrong(case, cuda_kernels.made_for(form), "cpu"))
        triton_scales.loss_of = None  # no block of this weight needs it
        said.append(wrong(decided(), cuda_kernels.made_for(form), "cpu"))
        for pair in outputs(seed=0):
            equal = same(cuda_kernels.squares(*pair), awq.squares(*pair))
            said.append("" if equal else f"squares of {tuple(pair[0].shape)}")
    for weights, product, start in changed(seed=0):
        made = cuda_gram.changes(*weights, torch.float16)
        said.append("" if same(made, awq_gram.changes(*weights, torch.float16)) else f"changes of {tuple(made.shape)}")
        equal = same(cuda_gram.dot(product, made, start), awq_gram.dot(product.clone(), made, start))
        said.append("" if equal else f"dot of {tuple(product.shape)}")
    print(*filter(None, said), f"{len(said)} cases", sep="\n")


if __name__ == "__main__":
    main()
