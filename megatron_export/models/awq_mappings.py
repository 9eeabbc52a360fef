"""What feeds a linear's input: the parameters whose rows can take over the factors of its input channels, exactly.

A linear whose input is divided by a vector gives the same product if what makes that input is divided instead: the
norm before q, k, v or gate, up, if all that read it are divided by one vector; up, which multiplies into down's input row
by row; v, whose weighted sums are what o reads, head by head.
"""

import re

from .megatron_parameters import pooled

_INPUT_NORM, _MLP_NORM = ("input_layernorm.weight", ""), ("pre_mlp_layernorm.weight", "")
_FEEDERS: dict[str, tuple[tuple[str, str], ...]] = {
    "self_attention.linear_qkv.weight": (_INPUT_NORM,),
    "self_attention.linear_q_proj.weight": (_INPUT_NORM,),
    "self_attention.linear_q_down_proj.weight": (_INPUT_NORM,),
    "self_attention.linear_kv_down_proj.weight": (_INPUT_NORM,),
    "self_attention.linear_q_up_proj.weight": (("self_attention.q_layernorm.weight", ""),),
    "self_attention.linear_kv_up_proj.weight": (("self_attention.kv_layernorm.weight", ""),),
    "self_attention.linear_proj.weight": (
        ("self_attention.linear_qkv.weight", "v"),
        ("self_attention.linear_qkv.bias", "v"),
    ),
    "mlp.linear_fc1.weight": (_MLP_NORM,),
    "mlp.linear_fc2.weight": (("mlp.linear_fc1.weight", "up"),),
    "mlp.experts.{e}.linear_fc1.weight": (_MLP_NORM,),
    "mlp.experts.{e}.linear_fc2.weight": (("mlp.experts.{e}.linear_fc1.weight", "up"),),
    "mlp.shared_experts.linear_fc1.weight": (_MLP_NORM,),
    "mlp.shared_experts.linear_fc2.weight": (("mlp.shared_experts.linear_fc1.weight", "up"),),
}
# What else reads a norm, and is not a linear that a format quantizes.
_OTHER_READERS = {"pre_mlp_layernorm.weight": ("mlp.router.weight",)}

# Linears that read what another one reads, and so are divided by its vector: module -> that other one.
_SAME_INPUT = {
    "mlp.shared_experts.linear_fc1": "mlp.experts.linear_fc1",
    "self_attention.linear_q_down_proj": "self_attention.linear_kv_down_proj",
    "self_attention.linear_q_proj": "self_attention.linear_kv_down_proj",
}


def vector_home(module: str) -> str:
    """The canonical module that a linear's smoothing vector is named after: itself, or one that reads the same input.

    The experts of a layer share their vectors: those of their inputs because one norm feeds all of them, those of
    `linear_fc2` so that an expert without a token has one too.
    """
    prefix, local = _split(pooled(module))
    return f"{prefix}.{_SAME_INPUT.get(local, local)}"


def feeders_of(canonical: str) -> tuple[tuple[str, str], ...]:
    """The canonical parameters that feed a linear weight, each with the layout part of it that does."""
    prefix, local = _split(canonical)
    expert = re.search(r"\.experts\.(\d+)\.", local)
    number = expert[1] if expert else ""
    local = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", local)
    return tuple((f"{prefix}.{name.format(e=number)}", part) for name, part in _FEEDERS[local])


def other_readers_of(canonical: str) -> tuple[str, ...]:
    """The canonical parameters, none of them quantized, that read what a norm makes: those of routers."""
    prefix, local = _split(canonical)
    return tuple(f"{prefix}.{name}" for name in _OTHER_READERS.get(local, ()))


def reads_heads(canonical: str) -> bool:
    """Whether a linear reads the heads of attention, of which those of one group share a head of v."""
    return canonical.endswith("self_attention.linear_proj.weight")


def _split(canonical: str) -> tuple[str, str]:
    """A canonical name as its layer's prefix and what comes after it."""
    prefix = ".".join(canonical.split(".")[:3])
    return prefix, canonical.removeprefix(f"{prefix}.")
