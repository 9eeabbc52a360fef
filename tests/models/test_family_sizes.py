"""Published models from the values of their config.json: how many parameters, under names that their publishers know; plans."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod
from time import process_time

import pytest

from megatron_export.models import parameters_of
from megatron_export.models.sources import expected_shapes
from megatron_export.planning.plan import assumed

from ..support.configs import DEEPSEEK_V3
from ..support.plans import plan_for

_DENSE = {
    "hidden_act": "silu",
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
MISTRAL = _DENSE | {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 32768,
    "sliding_window": None,
}
MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": _DENSE
    | {
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "vocab_size": 131072,
        "sliding_window": None,
    },
}
GEMMA = {  # which leaves out what transformers fills in
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
MINIMAX = _DENSE | {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_local_experts": 256,
    "rotary_dim": 64,
    "vocab_size": 200064,
}
_INDEXER = {"index_head_dim": 128, "index_topk": 2048}
DEEPSEEK = DEEPSEEK_V3 | _INDEXER | {"architectures": ["DeepseekV32ForCausalLM"], "index_n_heads": 64}
GLM = (
    DEEPSEEK
    | {"architectures": ["GlmMoeDsaForCausalLM"], "hidden_size": 6144, "index_n_heads": 32, "intermediate_size": 12288}
    | {"n_group": 1, "topk_group": 1, "num_attention_heads": 64, "num_hidden_layers": 78, "num_key_value_heads": 64}
    | {"q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256, "vocab_size": 154880, "index_topk_freq": 4}
    | {"index_skip_topk_offset": 3}
)
KIMI = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "text_config": DEEPSEEK_V3
    | {"n_group": 1, "topk_group": 1, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "vocab_size": 163840},
}
QWEN3_VL = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": _DENSE
    | {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64}
    | {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
}
# By model: config.json, billions of parameters (of the language model), and what NVIDIA's own checkpoint of it leaves out.
MODELS: dict[str, tuple[dict, float, tuple[str, ...]]] = {
    "Mistral 7B v0.3": (MISTRAL, 7.248, ()),
    "Mistral Small 3.2": (MISTRAL_SMALL, 23.572, ()),
    "Gemma 3 27B": (GEMMA, 27.009, ()),
    "MiniMax M2.5": (
        MINIMAX,
        228.690,
        ("lm_head", "model.layers.61.block_sparse_moe.gate", "model.layers.61.self_attn*"),
    ),
    "DeepSeek V3.2": (
        DEEPSEEK,
        685.355,
        (
            *("model.layers.60.self_attn.indexer*", "model.layers.60.self_attn.kv_a_proj_with_mqa", "model.layers.61*"),
            *(
                "model.layers.60.self_attn.kv_b_proj",
                "model.layers.60.self_attn.q_a_proj",
                "model.layers.60.self_attn.q_b_proj",
            ),
        ),
    ),
    "GLM 5.2": (GLM, 755.233, ("model.layers.0*", "model.layers.77.mlp.shared_experts*", "model.layers.77.self_attn*")),
    "Kimi K2.5": (KIMI, 1026.408, ("language_model.lm_head", "language_model.model.layers.60.self_attn*")),
    "Qwen3-VL 235B": (QWEN3_VL, 235.094, ()),
}
LARGE = [name for name, (_, billions, _) in MODELS.items() if billions > 100]


def models(*also: str) -> list:
    """All of them, the large ones but for some in slow runs alone."""
    slow = {*LARGE} - {*also}
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in MODELS]


def names_of(config: dict) -> Iterable[str]:
    for name in expected_shapes(parameters_of(config).values()):
        yield from (name, name.removesuffix(".weight"))


@pytest.mark.parametrize("name", models("MiniMax M2.5"))
def test_it_has_as_many_parameters_as_were_published_under_names_that_its_publishers_know(name: str) -> None:
    config, billions, left = MODELS[name]
    shapes = expected_shapes(parameters_of(config).values())
    assert round(sum(map(prod, shapes.values())) / 1e9, 3) == billions
    known = set(names_of(config))
    assert [glob for glob in left if not any(fnmatchcase(one, glob) for one in known)] == []


@pytest.mark.parametrize("name", models())
def test_it_is_planned_in_ten_seconds(name: str) -> None:
    config = MODELS[name][0]
    start = process_time()
    plan = plan_for(config, assumed(config, 8), format="nvfp4")
    assert process_time() - start < 10
    assert plan.nbytes < 0.45 * plan.source_nbytes


@pytest.mark.parametrize("name", ["DeepSeek V3.2", "GLM 5.2"])
def test_an_indexer_is_left_out_of_every_format_by_name(name: str) -> None:
    small = MODELS[name][0] | {"num_hidden_layers": 4, "n_routed_experts": 8, "index_topk_freq": 1}
    for form in ("fp8", "fp8_pb", "nvfp4"):
        plan = plan_for(small, assumed(small, 2), format=form, quantize_mla=True)
        assert {f"model.layers.0.self_attn.indexer.{one}" for one in ("wq_b", "wk", "weights_proj")} <= set(
            plan.excluded
        )
        assert not [module for module in plan.layers if ".indexer." in module]
