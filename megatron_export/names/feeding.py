"""What feeds a linear's input: the parameters whose rows can take over the factors of its input channels, exactly.

A linear whose input is divided by a vector gives the same product if what makes that input is divided instead: the
norm before q, k, v or gate, up, which nothing else reads; up, which multiplies into down's input row by row; v, whose
weighted sums are what o reads, head by head.
"""

_FEEDERS: dict[str, tuple[tuple[str, str], ...]] = {
    "self_attention.linear_qkv.weight": (("input_layernorm.weight", ""),),
    "self_attention.linear_proj.weight": (
        ("self_attention.linear_qkv.weight", "v"),
        ("self_attention.linear_qkv.bias", "v"),
    ),
    "mlp.linear_fc1.weight": (("pre_mlp_layernorm.weight", ""),),
    "mlp.linear_fc2.weight": (("mlp.linear_fc1.weight", "up"),),
}


def feeders_of(canonical: str) -> tuple[tuple[str, str], ...]:
    """The canonical parameters that feed a linear weight, each with the layout part of it that does."""
    prefix = ".".join(canonical.split(".")[:3])
    local = canonical.removeprefix(f"{prefix}.")
    return tuple((f"{prefix}.{name}", part) for name, part in _FEEDERS[local])


def reads_heads(canonical: str) -> bool:
    """Whether a linear reads the heads of attention, of which those of one group share a head of v."""
    return canonical.endswith("self_attention.linear_proj.weight")
