"""Which ranks of a topology hold a parameter, told from config.json alone, and which topologies cannot be."""

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.planning.plan import assumed
from megatron_export.planning.rank_placement import grid_of

from ..support.configs import LLAMA, MIXTRAL, SMALL_V3

LAST = "decoder.layers.5.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("config", "sizes", "parameter", "ranks"),
    [
        (LLAMA, {"tp": 2}, LAST, (0, 1)),
        (LLAMA, {"tp": 2, "world": 8}, LAST, (0, 1)),
        (LLAMA, {"tp": 2, "pp": 2}, LAST, (2, 3)),
        (LLAMA, {"tp": 2, "pp": 2, "world": 8}, LAST, (4, 5)),  # tp fastest, then dp, then pp
        (LLAMA, {"pp": 4}, "decoder.layers.2.mlp.linear_fc2.weight", (1,)),  # of 1, 2, 1 and 2 layers
        (LLAMA, {"pp": 2, "vpp": 3}, "decoder.layers.2.mlp.linear_fc2.weight", (0,)),  # stages of a layer, in turn
        (LLAMA, {"pp": 3, "pp_layout": "E|t*5|tL"}, "decoder.layers.0.mlp.linear_fc2.weight", (1,)),
        (LLAMA, {"pp": 3}, "embedding.word_embeddings.weight", (0,)),
        (LLAMA, {"pp": 3}, "decoder.final_layernorm.weight", (2,)),
        (LLAMA, {"tp": 2, "pp": 3}, "output_layer.weight", (4, 5)),
        (MIXTRAL, {"ep": 4}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (3,)),
        (MIXTRAL, {"ep": 4}, "decoder.layers.0.mlp.experts.1.linear_fc1.weight", (0,)),  # two neighbours on each
        (MIXTRAL, {"ep": 4}, "decoder.layers.0.mlp.experts.2.linear_fc1.weight", (1,)),
        (MIXTRAL, {"tp": 2, "ep": 2}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (2, 3)),
        (MIXTRAL, {"tp": 4, "etp": 1, "ep": 4}, "decoder.layers.0.mlp.experts.7.linear_fc1.weight", (3,)),
        (MIXTRAL, {"pp": 2, "ep": 2, "world": 8}, "decoder.layers.5.mlp.experts.7.linear_fc1.weight", (5,)),
        (SMALL_V3, {"pp": 2}, "decoder.layers.4.eh_proj.weight", (1,)),  # predicts one more token
        (SMALL_V3, {"pp": 2, "pp_layout": "Etttt|mL"}, "decoder.final_layernorm.weight", (0,)),
    ],
)
def test_parameters_live_where_megatron_puts_them(config: dict, sizes: dict, parameter: str, ranks: tuple) -> None:
    assert assumed(config, **{"tp": 1, **sizes})[parameter].ranks == ranks


def test_the_smallest_world_is_that_which_holds_all() -> None:
    assert grid_of(LLAMA, 2, pp=3).world == 6
    assert grid_of(MIXTRAL, 2, 1, pp=2, ep=8).world == 16
    assert grid_of(MIXTRAL, 2, pp=2, ep=2, world=24).world == 24


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (LLAMA, {"tp": 2, "pp": 2, "world": 6}, "size 6 is no multiple of --tp 2 x --pp 2 = 4 .*Give 4, or a multiple"),
        (LLAMA, {"tp": 3}, "num_attention_heads 8 does not divide by --tp 3"),
        (LLAMA, {"tp": 1, "ep": 2}, "no experts"),
        (LLAMA, {"tp": 1, "pp": 7}, "7 stages for num_hidden_layers 6"),
        (LLAMA, {"tp": 1, "pp": 2, "pp_layout": "Ettt|tttx"}, "has 'x', no letter of Megatron's"),
        (LLAMA, {"tp": 1, "pp": 2, "pp_layout": "Ettt|ttL"}, "this model is EttttttL"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(config: dict, sizes: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        grid_of(config, **sizes)
