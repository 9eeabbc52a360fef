"""FP8 KV cache: two float32 scalars a layer, beside the projections that make keys and values.

    self_attn.k_proj.k_scale  float32 []  amax of the keys after rotation / 448
    self_attn.v_proj.v_scale  float32 []  amax of the values / 448

An amax of zero gives scale 1. Scales below 1 are written as they are: ModelOpt's HF route does the same, its Megatron
route raises them to 1. A scale of 1 that is asked for is not written, as with ModelOpt's `use_constant_amax` ("fp8_cast"): engines
take 1 where there is none. Source: ModelOpt 0.47 unified checkpoint, kv_cache_quant_algo FP8; vLLM 0.33 and SGLang 0.5.23,
layers/quantization/kv_cache.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .form import KvForm
from .fp8 import rounded, scale_of

if TYPE_CHECKING:
    from torch import Tensor

SCALES = ("k_proj.k_scale", "v_proj.v_scale")


def encode(k_amax: Tensor, v_amax: Tensor) -> dict[str, Tensor]:
    """Two amax scalars -> the tensors above, by their name under `self_attn`."""
    return dict(zip(SCALES, (scale_of(k_amax), scale_of(v_amax)), strict=True))


FORM = KvForm(
    name="fp8",
    algorithm="FP8",
    scheme={"dynamic": False, "num_bits": 8, "type": "float"},
    bits=8,
    implied=1.0,
    scales=SCALES,
    encode=encode,
    rounded=rounded,
)
