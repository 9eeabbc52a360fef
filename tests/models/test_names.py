"""Tables and dialects: every parameter has one rule, one shape and one cut; both layer specs come to one name."""

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.engines.checkpoint_view import CheckpointView
from megatron_export.models import ARCHITECTURES, architecture_of, canonical, parameters_of, rope_of, shape_of
from megatron_export.models.megatron_parameters import PARAMETERS

from ..support.models import EXAMPLE, read_json

FIRST, SECOND, MTP = "decoder.layers.0", "decoder.layers.1", "mtp.layers.0"


def config(**changes: object) -> dict:
    return read_json(EXAMPLE / "config.json") | changes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_rule_has_a_shape_and_a_cut(name: str) -> None:
    assert set(ARCHITECTURES[name].rules) <= set(PARAMETERS)


def test_no_two_parameters_become_the_same_hf_tensor() -> None:
    names = [name for source in parameters_of(config()).values() for name in source.names().values()]
    assert len(names) == len(set(names)) == 2 + 4 * 11


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("decoder.final_norm.weight", "decoder.final_layernorm.weight"),
        (f"{FIRST}.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        (f"{FIRST}.self_attention.linear_q_up_proj.layer_norm_weight", "decoder.layers.3.self_attention.q_layernorm.weight"),
        (f"{SECOND}.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.7.input_layernorm.weight"),
        (f"{SECOND}.mlp.linear_fc1.weight", "decoder.layers.7.mlp.linear_fc1.weight"),
        (f"{SECOND}.mlp.experts.local_experts.1.linear_fc1.weight", "decoder.layers.7.mlp.experts.5.linear_fc1.weight"),
        (f"{SECOND}.mlp.experts.linear_fc2.weight0", "decoder.layers.7.mlp.experts.4.linear_fc2.weight"),
        (f"{SECOND}.mlp.shared_experts.linear_fc1.weight", "decoder.layers.7.mlp.shared_experts.linear_fc1.weight"),
        (f"{MTP}.eh_proj.weight", "decoder.layers.9.eh_proj.weight"),
        (f"{MTP}.transformer_layer.mlp.experts.linear_fc1.weight1", "decoder.layers.9.mlp.experts.5.linear_fc1.weight"),
        (f"{MTP}.mtp_model_layer.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.9.input_layernorm.weight"),
    ],
)  # fmt: skip
def test_every_spec_and_any_stage_come_to_one_name(name: str, expected: str) -> None:
    assert canonical(name, {"decoder": [3, 7], "mtp": [9]}, [4, 5]) == expected


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExportError, match="Did you mean 'LlamaForCausalLM'.*Qwen2ForCausalLM, Qwen3ForCausalLM"):
        architecture_of({"architectures": ["LlamaForCausalLm"]})


def test_a_variant_that_the_rules_are_wrong_for_is_refused() -> None:
    with pytest.raises(ExportError, match="attention_bias = True is not supported"):
        architecture_of(config(attention_bias=True))


def test_rope_is_read_in_both_spellings() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    old = {"rope_theta": 5e5, "rope_scaling": llama3}
    new = {"rope_parameters": llama3 | {"rope_theta": 5e5}}
    assert rope_of(old) == rope_of(new)
    assert rope_of(old).arguments == {"position_embedding_type": "rope", "rotary_base": 5e5}
    assert rope_of(old).llama3 == {name: value for name, value in llama3.items() if name != "rope_type"}
    with pytest.raises(ExportError, match="yarn"):  # which Megatron computes of whole heads alone
        rope_of({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "partial_rotary_factor": 0.5})
    with pytest.raises(ExportError, match="longrope"):
        rope_of({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}})


@pytest.mark.parametrize(("outer", "inner", "tied"), [(True, False, True), (False, True, False), (None, True, True)])
def test_the_outer_of_two_models_says_whether_the_output_layer_is_tied(outer: bool, inner: bool, tied: bool) -> None:
    """As transformers reads it; only where the outer one is silent does the inner one count."""
    text = config(tie_word_embeddings=inner)
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text | {"num_experts_per_tok": 1}}
    whole |= {} if outer is None else {"tie_word_embeddings": outer}
    assert shape_of(whole).tied is tied
    assert CheckpointView(whole, None, {}).tied is tied


def test_head_dim_need_not_be_hidden_over_heads() -> None:
    shape = shape_of(config())
    assert (shape.head_dim, shape.hidden // shape.heads) == (64, 32)


def test_of_every_two_layers_the_second_has_experts() -> None:
    """As transformers does it: layer i has experts if (i + 1) % decoder_sparse_step is 0."""
    moe = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    names = parameters_of(config(**moe, moe_intermediate_size=64, num_hidden_layers=4, decoder_sparse_step=2))
    assert {name.split(".")[2] for name in names if ".experts." in name} == {"1", "3"}
