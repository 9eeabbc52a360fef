"""NVFP4_AWQ: the tensors of NVFP4, after AWQ has smoothed the weights.

On disk, for a linear `[out, in]`, `in` a multiple of 16: the tensors of nvfp4.py, of bfloat16(float32(w) / p), with p
the float32 vector that the search chose. `input_scale` is of the input times p. Where p goes:

    q, k, v; gate, up   folded into the norm that they read
    down_proj           folded into the rows of up_proj
    o_proj              folded into the rows of v_proj (and its bias). With grouped queries several heads of o_proj read
                        one head of v_proj, so the search gives them one vector

Clipping, where it is asked for, is one ratio of a weight's amax: searched before other vectors are folded into its
rows, and applied to the amax after that. Nothing is left to do at run time, and the checkpoint is a plain NVFP4 one,
which every engine loads. With the output "modelopt" o_proj under grouped queries is searched freely instead and keeps
`pre_quant_scale` bfloat16 [in], under quant_algo NVFP4_AWQ, which TensorRT-LLM reads and vLLM refuses.
Source: ModelOpt 0.47 unified checkpoint, quant_algo NVFP4_AWQ; AWQ is arXiv 2306.00978.
"""

from dataclasses import replace
from functools import cache

from . import nvfp4
from .form import Form, Options, Smoothing

NAME = "nvfp4_awq"
OPTIONS = ("awq_output", "awq_clip", *nvfp4.OPTIONS)


@cache
def form(options: Options) -> Form:
    """The format for `options.awq_output`: "folded" or "modelopt"."""
    keeps = options.awq_output == "modelopt"
    plain = nvfp4.form(options)
    smoothing = Smoothing("nvfp4", folds=True, keeps=keeps, clip=options.awq_clip)
    if not keeps:
        return replace(plain, name=NAME, smoothing=smoothing)
    algorithm = {"quant_algo": "NVFP4_AWQ", "has_zero_point": False, "pre_quant_scale": True}
    return replace(plain, name=NAME, smoothing=smoothing, quantization=plain.quantization | algorithm, numbers=None)
