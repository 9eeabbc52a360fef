"""Layers of other kinds: each has the parameters of its own kinds, and no others."""

import pytest

from megatron_export.models import parameters_of, shape_of
from megatron_export.models.layer_kinds import Kind

from ..support.configs import SMALL_V3


def locals_of(layer: int, config: dict) -> set[str]:
    prefix = f"decoder.layers.{layer}."
    return {name.removeprefix(prefix) for name in parameters_of(config) if name.startswith(prefix)}


def test_layers_have_the_parameters_of_their_kinds() -> None:
    shape = shape_of(SMALL_V3)
    first, last = locals_of(0, SMALL_V3), locals_of(shape.layers, SMALL_V3)
    assert shape.kinds[0] == (Kind.ATTENTION, Kind.MLP)
    assert shape.kinds[-1] == (Kind.ATTENTION, Kind.EXPERTS, Kind.JOIN, Kind.LAST)
    assert {"mlp.linear_fc1.weight", "self_attention.linear_proj.weight", "input_layernorm.weight"} <= first
    assert {"mlp.router.weight", "eh_proj.weight", "final_layernorm.weight"} <= last
    assert not {"mlp.router.weight", "eh_proj.weight", "final_layernorm.weight"} & first
    assert "mlp.linear_fc1.weight" not in last
    assert shape.having(Kind.MLP) == tuple(range(shape.layers + 1))[: len(shape.having(Kind.MLP))]


@pytest.mark.parametrize("step", [1, 2])
def test_experts_are_in_the_layers_that_the_config_says(step: int) -> None:
    config = SMALL_V3 | {"first_k_dense_replace": 0, "decoder_sparse_step": step, "num_nextn_predict_layers": 2}
    shape = shape_of(config)
    sparse = shape.having(Kind.EXPERTS)
    assert [n for n in range(shape.layers) if n in sparse] == [n for n in range(shape.layers) if (n + 1) % step == 0]
    assert (shape.layers in sparse) == (shape.layers - 1 in sparse) == (shape.layers + 1 in sparse)
