"""What feeds a linear's input: the parameters whose rows can take over the factors of its input channels, exactly.

A linear whose input is divided by a vector gives the same product if what makes that input is divided instead: the
norm before q, k, v or gate, up, which nothing else reads; up, which multiplies into down's input row by row; v, whose
weighted sums are what o reads, head by head.
"""

from .parameters import pooled

_FEEDERS: dict[str, tuple[tuple[str, str], ...]] = {
    "self_attention.linear_qkv.weight": (("input_layernorm.weight", ""),),
    "self_attention.linear_proj.weight": (
        ("self_attention.linear_qkv.weight", "v"),
        ("self_attention.linear_qkv.bias", "v"),
    ),
    "mlp.linear_fc1.weight": (("pre_mlp_layernorm.weight", ""),),
    "mlp.linear_fc2.weight": (("mlp.linear_fc1.weight", "up"),),
}


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
    module = pooled(module)
    prefix = ".".join(module.split(".")[:3])
    local = module.removeprefix(f"{prefix}.")
    return f"{prefix}.{_SAME_INPUT.get(local, local)}"


def feeders_of(canonical: str) -> tuple[tuple[str, str], ...]:
    """The canonical parameters that feed a linear weight, each with the layout part of it that does."""
    prefix = ".".join(canonical.split(".")[:3])
    local = canonical.removeprefix(f"{prefix}.")
    return tuple((f"{prefix}.{name}", part) for name, part in _FEEDERS[local])


def reads_heads(canonical: str) -> bool:
    """Whether a linear reads the heads of attention, of which those of one group share a head of v."""
    return canonical.endswith("self_attention.linear_proj.weight")
