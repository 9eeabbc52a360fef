"""What every engine demands of a model whose layers several GPUs share (tensor parallelism): each gets whole heads and whole groups
of what shares a scale. Experts in one tensor are not checked: their shapes do not say how they are cut.
"""

from typing import NamedTuple

from .checkpoint_view import CheckpointView, View, is_quantized
from .exclude_lists import Partly
from .hybrids import NEXT, rows_of_parts, states_fit
from .quant_configs import AlgorithmOf, Reading, group_size_in
from .tensor_specs import size_of, unit_of
from .verdict import Findings

_LARGEST = 1024  # size that is proposed
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3")
_BY_INPUTS = ("o_proj", "out_proj", "down_proj", "w2")


class _Cut(NamedTuple):
    """How a linear is dealt out: `total` rows or inputs (`what`), in multiples of `unit`. GPUs beyond `most` get copies."""

    what: str
    total: int
    unit: int
    most: int
    expert: bool

    def whole(self, tp: int) -> bool:
        """Whether each GPU has whole units."""
        return self.total % (min(tp, self.most) * self.unit) == 0


def check_shared(
    checkpoint: CheckpointView, view: View, algorithm_of: AlgorithmOf, reading: Reading, tp: int, findings: Findings
) -> None:
    """Heads and linears against `tp` GPUs."""
    if tp == 1:
        return  # nothing is cut
    cuts = _cuts(checkpoint, view, algorithm_of, reading)

    def fits(size: int) -> bool:
        return _heads_fit(checkpoint, size) and all(cut.whole(size) for cut in cuts)

    if fits(tp):
        return
    fitting = next((size for size in range(min(tp - 1, _LARGEST), 1, -1) if fits(size)), 1)
    smaller = "no smaller size would do" if fitting == 1 else f"a size of {fitting} would do"
    at = f"at a tensor-parallel size of {tp}"
    if not _heads_fit(checkpoint, tp):
        findings.add("heads", f"{at} it cannot deal out {_heads(checkpoint)}", way=smaller)
        return
    for cut, names in cuts.items():
        if not cut.whole(tp):
            part = f"a GPU has {cut.total / min(tp, cut.most):.5g} of its {cut.total} {cut.what}"
            units = "" if cut.unit == 1 else f", no multiple of {cut.unit}"
            ways = [smaller, "expert parallelism" if cut.expert else "", "--format fp8" if cut.unit > 1 else ""]
            findings.add("shared", f"{at} {part}{units}", *names, way=", or ".join(filter(None, ways)))


def _heads_fit(checkpoint: CheckpointView, tp: int) -> bool:
    heads, groups = checkpoint.number("num_attention_heads"), checkpoint.number("num_key_value_heads")
    whole = checkpoint.latent or not groups or groups % tp == 0 or tp % groups == 0
    return heads % tp == 0 and whole and states_fit(checkpoint, tp)


def _heads(checkpoint: CheckpointView) -> str:
    """Its heads, in words."""
    heads, groups = checkpoint.number("num_attention_heads"), checkpoint.number("num_key_value_heads")
    linear = [checkpoint.number(f"linear_num_{kind}_heads") for kind in ("value", "key")]
    more = f"; of linear attention {linear[0]}, of keys {linear[1]}" if any(linear) else ""
    if mamba := checkpoint.number("mamba_num_heads"):
        more = f"; of Mamba {mamba} in {checkpoint.number('n_groups')} groups"
    return f"{heads} heads, of keys {groups}{more}"


def _cuts(checkpoint: CheckpointView, view: View, algorithm_of: AlgorithmOf, reading: Reading) -> dict[_Cut, list[str]]:
    """Every way in which linears are dealt out -> their names."""
    found: dict[_Cut, list[str]] = {}
    groups = checkpoint.number("num_key_value_heads")
    for group in view.groups:
        if group.mtp or group.kind not in ("linear", "experts"):
            continue
        try:
            algorithm = algorithm_of(group)
        except Partly:
            continue
        group_size = group_size_in(reading, group, algorithm)
        for name, module in group.members.items():
            last = name.rpartition(".")[2]
            codes = algorithm if is_quantized(module) else None
            (rows, inputs), (row_unit, input_unit) = size_of(module, codes), unit_of(codes, group_size)
            parts = rows_of_parts(checkpoint, name)
            if parts:  # Qwen3-Next has those of a head beside each other
                for index, part in enumerate((rows,) if checkpoint.architecture == NEXT else parts):
                    most = groups if last == "qkv_proj" and index and groups > 0 else part
                    found.setdefault(_Cut("rows", part, row_unit, max(most, 1), False), []).append(name)
                continue
            if last in _BY_ROWS:
                most = groups if last in ("k_proj", "v_proj") and groups > 0 else rows
                what, total, unit = "rows", rows, row_unit
            elif last in _BY_INPUTS:
                what, total, most, unit = "inputs", inputs, inputs, input_unit
            else:
                continue
            cut = _Cut(what, total, unit, max(most, 1), group.kind == "experts")
            found.setdefault(cut, []).append(name)
    return found
