"""The names of calibration statistics, made from canonical parameter names."""

from .megatron_parameters import pooled


def input_key(canonical: str) -> str:
    """The statistic of a linear weight's input."""
    return pooled(canonical).removesuffix("weight") + "input_amax"


def weight_key(canonical: str) -> str:
    """The amax that a linear weight is quantized with, where it is not to be taken from the weight itself."""
    return canonical.removesuffix("weight") + "weight_amax"


def experts_module(canonical: str) -> str:
    """The module of all experts of a layer that a parameter of one is in."""
    return canonical.partition(".experts.")[0] + ".experts"


def kv_keys(canonical: str) -> tuple[str, str]:
    """The statistics of the keys and the values that a fused qkv weight makes."""
    attention = canonical.rsplit(".", 2)[0]
    return f"{attention}.k_amax", f"{attention}.v_amax"


def channels(key: str) -> str:
    """The statistic by channel whose maximum `key` is: `x_amax` -> `x_channel_amax`."""
    return key.removesuffix("amax") + "channel_amax"
