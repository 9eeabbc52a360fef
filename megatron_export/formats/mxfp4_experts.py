"""MXFP4 as OpenAI's GPT-OSS has it: the experts of a layer stacked, and nothing else quantized; inputs stay in bfloat16.

On disk, for linears `[out, in]` of `experts`, `in` a multiple of 32, whose stack is called NAME:

    NAME_blocks  uint8 [experts, out, in/32, 16]   element 2c in the low nibble, 2c+1 in the high nibble
    NAME_scales  uint8 [experts, out, in/32]       e8m0: the block's scale is 2^(byte - 127)

The rows of gate and up take turns; biases are as in bfloat16 files. config.json says `quant_method` mxfp4, and there is no
hf_quant_config.json, which TensorRT-LLM would read first.

Scales and codes are those of mxfp4.py, but 0 is code 0, and -0 code 8: bfloat16 has both zeros. What OpenAI's files mean is
written with the bytes that they have, except where several bytes mean the same:

    a block whose largest code is 3 or less   gets a smaller scale, and codes up to 4 or 6
    a block of zeros                          gets the scale 0, whatever it had

Source: openai/gpt-oss-20b; integrations/mxfp4.py of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..common.piece import Amax, Piece
from . import mxfp4, nvfp4
from .e8m0 import MX_BLOCK, pieces, scales_of, spread
from .form import Native, Stacked
from .packing import pack

if TYPE_CHECKING:
    from torch import Tensor

NAME = mxfp4.NAME


def codes_of(scaled: Tensor) -> Tensor:
    """Round float32 values to e2m1 codes, uint8 of the same shape, with the signs of zeros."""
    return mxfp4.codes_of(scaled) & 7 | torch.signbit(scaled).to(torch.uint8) << 3


def encode(weight: Tensor, amax: Amax | None = None) -> dict[str, Piece]:
    """Quantize one linear: `weight` bfloat16 [out, in] -> what an expert has of the tensors above, under the suffixes of mxfp4."""
    blocks = weight.float().unflatten(1, (-1, MX_BLOCK))  # [out, in/32, 32]
    scale = scales_of(blocks.abs().amax(2), nvfp4.E2M1_MAX)
    return pieces(pack(codes_of(blocks / spread(scale)).flatten(1), dim=1), scale)


FORM = replace(
    mxfp4.FORM,
    encode=encode,
    native=Native(
        {"quant_method": "mxfp4"},
        sign="modules_to_not_convert",
        excluded=("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
        alone=True,
    ),
    stack=Stacked({"weight": "_blocks", "weight_scale": "_scales"}, MX_BLOCK // 2),
)
