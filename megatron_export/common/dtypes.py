"""The dtypes of tensors in a checkpoint, by the names that safetensors gives them. Source: safetensors file format 0.3."""

import torch

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I64": torch.int64,
    "F64": torch.float64,
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
UNQUANTIZED = {name: DTYPES[name] for name in ("BF16", "F16", "F32")}  # of the weights of an original
