"""INT4_AWQ: four-bit integer weights in groups, smoothed by AWQ; activations stay bfloat16.

On disk, for a linear `[out, in]`, `out` even, `in` a multiple of the group (128, or 64):

    weight           uint8 [out/2, in]         see int4.py
    weight_scale     float32 [out, in/group]   see int4.py
    pre_quant_scale  bfloat16 [in]             the input is multiplied by it; absent where a norm before it was scaled

The quantized weight is bfloat16(float32(w) / p), where p is the float32 vector that the search chose and
`pre_quant_scale` its bfloat16. q, k, v share one vector, and gate, up share one: it is folded into the norm that they
all read. o_proj and down_proj keep theirs, which TensorRT-LLM requires; no other engine reads this format.
Source: ModelOpt 0.47 unified checkpoint, quant_algo W4A16_AWQ; AWQ is arXiv 2306.00978.
"""

from functools import cache, partial

from . import int4
from .form import Arithmetic, Form, Options, not_rounded

NAME = "int4_awq"
OPTIONS = ("group_size", "awq_clip")


@cache
def form(options: Options) -> Form:
    """The format for groups of `options.group_size`."""
    return int4.awq_form(
        NAME,
        "W4A16_AWQ",
        options,
        encode=partial(int4.encode, group=options.group_size),
        decode=int4.decode,
        requantize=int4.requantize,
        arithmetic=Arithmetic(not_rounded, "BF16"),
    )
