"""The dtypes of tensors in a checkpoint, by the names that safetensors gives them. Source: safetensors file format 0.3.

A plan has names, so that who only plans needs no torch.
"""

from __future__ import annotations

from functools import cache

import torch

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I64": 8, "F64": 8}  # bytes of a number
NORMAL = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # the least and the largest normal float32
UNQUANTIZED = ("BF16", "F16", "F32")  # of the weights of an original


@cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """Name -> what torch calls it."""
    return {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F8_E4M3": torch.float8_e4m3fn,
        "U8": torch.uint8,
        "I64": torch.int64,
        "F64": torch.float64,
    }


@cache
def dtype_names() -> dict[torch.dtype, str]:
    """The inverse."""
    return {dtype: name for name, dtype in torch_dtypes().items()}
