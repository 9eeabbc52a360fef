"""The scales of a KV cache: one number each, for the keys and the values of an attention both, or for neither."""

from math import prod

from .checkpoint_view import View
from .verdict import Findings


def check_kv_scales(view: View, findings: Findings, pairs: bool = True) -> None:
    """Scales of several numbers, such as one for each head; with `pairs`, attentions that have a scale of keys or of values alone.

    The engine's table has the rules "kv shape", and with `pairs` "kv pair" and "kv half".
    """
    for name, header in view.tensors.items():
        if name.endswith((".k_scale", ".v_scale")) and prod(header.shape) != 1:
            why = f"it is {list(header.shape)}, and the engine takes one number for all heads"
            findings.add("kv shape", why, name, way="export with --kv-cache fp8, or take all KV scales out")
    if not pairs:
        return
    keys, values = ({at for spelled in view.kv if spelled.endswith(end) for at in view.kv[spelled]} for end in _ENDS)
    if alone := values - keys:
        findings.add("kv pair", "it has a v_scale and no k_scale", *alone, way="export with --kv-cache fp8")
    if alone := keys - values:
        findings.add("kv half", "it has no v_scale: the scale of the keys is taken for the values too", *alone,
                     way="export with --kv-cache fp8")  # fmt: skip


_ENDS = ("k_scale", "v_scale")
