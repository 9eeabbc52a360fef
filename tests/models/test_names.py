"""Tables and dialects: every parameter has one rule, one shape and one cut; both layer specs come to one name."""

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.engines.checkpoint_view import CheckpointView
from megatron_export.models import (
    ARCHITECTURES,
    architecture_of,
    canonical,
    parameters_of,
    rope_of,
    settings_of,
    shape_of,
)
from megatron_export.models.awq_mappings import other_readers_of
from megatron_export.models.megatron_parameters import PARAMETERS

from ..support.models import EXAMPLE, read_json
from ..support.plans import plan_of

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
        (f"{MTP}.mtp_model_layer.layers.1.mlp.linear_fc2.weight", "decoder.layers.10.mlp.linear_fc2.weight"),
        (f"{MTP}.final_layernorm.weight", "decoder.layers.10.final_layernorm.weight"),
        (f"{SECOND}.norm.weight", "decoder.layers.7.input_layernorm.weight"),
        (f"{SECOND}.mixer.in_proj.layer_norm_weight", "decoder.layers.7.input_layernorm.weight"),
        (f"{SECOND}.mixer.conv1d_bias", "decoder.layers.7.mixer.conv1d.bias"),
        (f"{SECOND}.self_attention.in_proj.layer_norm_weight", "decoder.layers.7.input_layernorm.weight"),
    ],
)  # fmt: skip
def test_every_spec_and_any_stage_come_to_one_name(name: str, expected: str) -> None:
    assert canonical(name, {"decoder": [3, 7], "mtp": [9], "last": [10]}, [4, 5]) == expected


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


GLM = {"architectures": ["GlmMoeDsaForCausalLM"], "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 16}
GLM |= {
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_hidden_layers": 8,
    "num_nextn_predict_layers": 1,
    "index_topk": 64,
}
GLM |= {
    "index_n_heads": 2,
    "index_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ({}, [*range(9)]),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, [0, 1, 2, 6, 8]),  # as GLM 5.2, whose list says the same
        ({"index_topk_freq": 4}, [0, 1, 5, 8]),
        ({"index_topk_pattern": "FFSSFSSS", "index_topk_freq": 4}, [0, 1, 4, 8]),
        ({"indexer_types": ["full"] + ["shared"] * 7, "index_topk_pattern": "F" * 8}, [0, 8]),
    ],
)
def test_layers_with_an_indexer_are_those_that_glms_code_builds(said: dict, layers: list[int]) -> None:
    """And those that predict one more token."""
    names = parameters_of(config(**GLM, **said))
    assert [int(name.split(".")[2]) for name in names if name.endswith("indexer.linear_wk.weight")] == layers


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"indexer_types": ["full"] * 7},
            "indexer_types is .*, not 'full' or 'shared' for each of num_hidden_layers 8",
        ),
        ({"index_topk_pattern": "FFFFFFFX"}, "not 'full' or 'shared'"),
        ({"index_topk": -1}, "index_topk is -1, not a whole number above 0"),
        ({"index_head_dim": None}, "lacks index_head_dim"),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 7}, "mlp_layer_types is .*, and first_k_dense_replace 0"),
    ],
)
def test_a_wrong_indexer_is_told(said: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        settings_of(config(**GLM | said))


def test_all_that_reads_a_norm_takes_the_factors_of_an_awq_vector_the_indexer_too() -> None:
    layer, indexer = "decoder.layers.1", "decoder.layers.1.self_attention.core_attention.indexer"
    assert other_readers_of(f"{layer}.input_layernorm.weight") == (
        f"{indexer}.linear_wk.weight",
        f"{indexer}.linear_weights_proj.weight",
        f"{layer}.self_attention.in_proj_ba.weight",
    )
    assert other_readers_of(f"{layer}.self_attention.q_layernorm.weight") == (f"{indexer}.linear_wq_b.weight",)
    gate = f"{layer}.mlp.shared_experts.gate_weight"
    assert other_readers_of(f"{layer}.pre_mlp_layernorm.weight") == (f"{layer}.mlp.router.weight", gate)


def test_what_an_original_has_in_float32_stays_so_where_its_rule_says_so() -> None:
    sizes, name = config(**GLM), "model.layers.0.self_attn.indexer.k_norm.weight"
    plan = plan_of(sizes, format="bf16", wide=frozenset({name, "model.norm.weight"}))
    dtypes = {output.name: output.dtype for outputs in plan.files.values() for output in outputs}
    assert {one for one, dtype in dtypes.items() if dtype == "F32"} == {
        name,
        *(one for one in dtypes if one.endswith("e_score_correction_bias")),
    }
