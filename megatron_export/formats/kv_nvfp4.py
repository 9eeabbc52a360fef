"""NVFP4 KV cache: two float32 scalars a layer, beside the projections that make keys and values.

    self_attn.k_proj.k_scale  float32 []  amax of the keys after rotation / 448
    self_attn.v_proj.v_scale  float32 []  amax of the values / 448

The engine makes the scales of blocks of 16 as keys and values come. An amax of zero gives scale 1. A scale that is asked for is
always written, since TensorRT-LLM needs both. ModelOpt's HF route
and TensorRT-LLM's kernels mean amax / 448; ModelOpt's Megatron route writes amax / (6 * 448).
Source: ModelOpt 0.47 unified checkpoint, kv_cache_quant_algo NVFP4.
"""

from .form import KvForm
from .kv_fp8 import SCALES, encode
from .nvfp4 import round_inputs

FORM = KvForm(
    name="nvfp4",
    algorithm="NVFP4",
    scheme="NVFP4",
    bits=4,
    implied=None,
    scales=SCALES,
    encode=encode,
    rounded=round_inputs,
)
