"""What feeds a linear's input: the parameters whose rows can take over the factors of its input channels, exactly.

They are the norm before q, k, v or gate, up, if all its readers are divided by one vector; up, which multiplies into down's input
row by row; and v, whose weighted sums o reads, head by head.
"""

import re

from .megatron_parameters import pooled

_MLPS = ("mlp", "mlp.experts.{e}", "mlp.shared_experts")
_FEEDERS: dict[str, tuple[tuple[str, str], ...]] = {
    **{
        f"self_attention.linear_{name}.weight": (("input_layernorm.weight", ""),)
        for name in ("qkv", "q_proj", "q_down_proj", "kv_down_proj")
    },
    "self_attention.linear_q_up_proj.weight": (("self_attention.q_layernorm.weight", ""),),
    "self_attention.linear_kv_up_proj.weight": (("self_attention.kv_layernorm.weight", ""),),
    "self_attention.linear_proj.weight": (
        ("self_attention.linear_qkv.weight", "v"),
        ("self_attention.linear_qkv.bias", "v"),
    ),
    **{f"{mixer}.in_proj.weight": (("input_layernorm.weight", ""),) for mixer in ("self_attention", "mixer")},
    "self_attention.out_proj.weight": (),  # its norm has one weight for a channel of all heads
    "mixer.out_proj.weight": (("mixer.norm.weight", ""),),
    **{f"{mlp}.linear_fc1.weight": (("pre_mlp_layernorm.weight", ""),) for mlp in _MLPS},
    **{f"{mlp}.linear_fc2.weight": ((f"{mlp}.linear_fc1.weight", "up"),) for mlp in _MLPS},
}
_INDEXER = "self_attention.core_attention.indexer"
_OTHER_READERS = {
    "pre_mlp_layernorm.weight": ("mlp.router.weight", "mlp.shared_experts.gate_weight"),
    "input_layernorm.weight": (
        *(f"{_INDEXER}.linear_wk.weight", f"{_INDEXER}.linear_weights_proj.weight"),
        "self_attention.in_proj_ba.weight",
    ),
    "self_attention.q_layernorm.weight": (f"{_INDEXER}.linear_wq_b.weight",),
}
# Linears that read what another one reads, and so are divided by its vector: module -> that other one.
_SAME_INPUT = {
    "mlp.shared_experts.linear_fc1": "mlp.experts.linear_fc1",
    "self_attention.linear_q_down_proj": "self_attention.linear_kv_down_proj",
    "self_attention.linear_q_proj": "self_attention.linear_kv_down_proj",
}


def vector_home(module: str) -> str:
    """The canonical module that a linear's smoothing vector is named after: itself, or one that reads the same input.

    The experts of a layer share their vectors: one norm feeds all of them, and an expert without a token needs one in `linear_fc2`.
    """
    prefix, local = _split(pooled(module))
    return f"{prefix}.{_SAME_INPUT.get(local, local)}"


def feeders_of(canonical: str) -> tuple[tuple[str, str], ...]:
    """The canonical parameters that feed a linear weight, each with its layout part that does."""
    prefix, local = _split(canonical)
    expert = re.search(r"\.experts\.(\d+)\.", local)
    number = expert[1] if expert else ""
    local = re.sub(r"\.experts\.\d+\.", ".experts.{e}.", local)
    return tuple((f"{prefix}.{name.format(e=number)}", part) for name, part in _FEEDERS[local])


def other_readers_of(canonical: str) -> tuple[str, ...]:
    """The canonical parameters, none of them quantized, that may read the output of a norm."""
    prefix, local = _split(canonical)
    return tuple(f"{prefix}.{name}" for name in _OTHER_READERS.get(local, ()))


def reads_heads(canonical: str) -> bool:
    """Whether a linear reads the heads of attention, where the heads of one query group share a head of v."""
    return canonical.endswith("self_attention.linear_proj.weight")


def _split(canonical: str) -> tuple[str, str]:
    """A canonical name as its layer's prefix and what comes after it."""
    prefix = ".".join(canonical.split(".")[:3])
    return prefix, canonical.removeprefix(f"{prefix}.")
