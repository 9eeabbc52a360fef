"""Published models with layers of other kinds, from the values of their config.json: plans, names and shapes, without weights."""

from math import prod
from time import process_time

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.engines.verdict import Effect
from megatron_export.formats import Options
from megatron_export.models import parameters_of
from megatron_export.models.sources import expected_shapes
from megatron_export.planning.engine_check import of_plan, verdicts
from megatron_export.planning.plan import assumed

from ..support.plans import plan_for

_QWEN = {
    "hidden_act": "silu",
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
    "num_key_value_heads": 2,
    "mtp_num_hidden_layers": 1,
    "num_experts_per_tok": 10,
    "num_experts": 512,
}
QWEN3_NEXT = _QWEN | {
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_attention_heads": 16,
    "linear_num_value_heads": 32,
    "norm_topk_prob": True,
    "vocab_size": 151936,
}
QWEN3_5 = {  # whose experts need no intermediate_size, and have none in config.json
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "tie_word_embeddings": False,
    "text_config": _QWEN
    | {
        "num_hidden_layers": 60,
        "hidden_size": 4096,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
        "num_attention_heads": 32,
        "linear_num_value_heads": 64,
        "vocab_size": 248320,
    },
}
_NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"],
    "head_dim": 128,
    "conv_kernel": 4,
    "layer_norm_epsilon": 1e-5,
    "mamba_head_dim": 64,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "ssm_state_size": 128,
    "vocab_size": 131072,
}
NANO = _NEMOTRON | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
}
SUPER = _NEMOTRON | {  # whose pattern alone says how many layers there are, as in Ultra's config.json
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "mtp_hybrid_override_pattern": "*E",
    "num_nextn_predict_layers": 1,
    "hidden_size": 4096,
    "intermediate_size": 2688,
    "mamba_num_heads": 128,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
}
# By model: config.json, billions of parameters where they were published, and tensors of its files.
MODELS: dict[str, tuple[dict, float, dict[str, tuple[int, ...]]]] = {
    "Qwen3-Next": (
        QWEN3_NEXT,
        81.3,
        {
            "model.layers.0.linear_attn.in_proj_qkvz.weight": (12288, 2048),
            "model.layers.0.linear_attn.in_proj_ba.weight": (64, 2048),
            "model.layers.0.linear_attn.conv1d.weight": (8192, 1, 4),
            "model.layers.0.linear_attn.A_log": (32,),
            "model.layers.0.linear_attn.norm.weight": (128,),
            "model.layers.0.linear_attn.out_proj.weight": (2048, 4096),
            "model.layers.3.self_attn.q_proj.weight": (8192, 2048),
            "model.layers.3.self_attn.k_proj.weight": (512, 2048),
            "model.layers.3.self_attn.o_proj.weight": (2048, 4096),
            "model.layers.47.mlp.experts.511.gate_proj.weight": (512, 2048),
            "model.layers.47.mlp.shared_expert_gate.weight": (1, 2048),
            "mtp.fc.weight": (2048, 4096),
            "mtp.layers.0.self_attn.q_norm.weight": (256,),
            "mtp.layers.0.mlp.experts.511.down_proj.weight": (2048, 512),
            "mtp.pre_fc_norm_embedding.weight": (2048,),
        },
    ),
    "Qwen3.5": (
        QWEN3_5,
        0,
        {
            "model.language_model.layers.0.linear_attn.in_proj_qkv.weight": (12288, 4096),
            "model.language_model.layers.0.linear_attn.in_proj_z.weight": (8192, 4096),
            "model.language_model.layers.0.linear_attn.in_proj_b.weight": (64, 4096),
            "model.language_model.layers.0.linear_attn.in_proj_a.weight": (64, 4096),
            "model.language_model.layers.59.self_attn.q_proj.weight": (16384, 4096),
            "model.language_model.layers.59.mlp.experts.511.up_proj.weight": (1024, 4096),
            "lm_head.weight": (248320, 4096),
            "mtp.norm.weight": (4096,),
        },
    ),
    "Nano": (NANO, 31.6, {"backbone.layers.51.mixer.experts.127.up_proj.weight": (1856, 2688)}),
    "Super": (
        SUPER,
        0,
        {
            "backbone.embeddings.weight": (131072, 4096),
            "backbone.layers.0.norm.weight": (4096,),
            "backbone.layers.0.mixer.in_proj.weight": (18560, 4096),
            "backbone.layers.0.mixer.conv1d.weight": (10240, 1, 4),
            "backbone.layers.0.mixer.conv1d.bias": (10240,),
            "backbone.layers.0.mixer.D": (128,),
            "backbone.layers.0.mixer.norm.weight": (8192,),
            "backbone.layers.0.mixer.out_proj.weight": (4096, 8192),
            "backbone.layers.1.mixer.gate.e_score_correction_bias": (512,),
            "backbone.layers.1.mixer.experts.511.up_proj.weight": (2688, 1024),
            "backbone.layers.1.mixer.experts.511.down_proj.weight": (1024, 2688),
            "backbone.layers.1.mixer.shared_experts.up_proj.weight": (5376, 4096),
            "backbone.layers.1.mixer.fc1_latent_proj.weight": (1024, 4096),
            "backbone.layers.1.mixer.fc2_latent_proj.weight": (4096, 1024),
            "backbone.layers.7.mixer.k_proj.weight": (256, 4096),
            "backbone.norm_f.weight": (4096,),
            "mtp.layers.0.eh_proj.weight": (4096, 8192),
            "mtp.layers.0.mixer.q_proj.weight": (4096, 4096),
            "mtp.layers.1.mixer.experts.511.up_proj.weight": (2688, 1024),
            "mtp.layers.1.final_layernorm.weight": (4096,),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_of_its_full_size_has_the_tensors_of_its_files(name: str) -> None:
    config, billions, tensors = MODELS[name]
    start = process_time()
    plan = plan_for(config, assumed(config, 8 if name == "Super" else 2), format="nvfp4")
    assert process_time() - start < 20  # 8 s on a core of its own
    shapes = expected_shapes(parameters_of(config).values())
    assert {tensor: shapes.get(tensor) for tensor in tensors} == tensors
    assert not billions or round(sum(map(prod, shapes.values())) / 1e9, 1) == billions
    left = set(plan.excluded)
    assert not [module for module in plan.layers if module.startswith("mtp.")]
    assert all(module.removesuffix(".weight") in left for module in tensors if ".conv1d.weight" in module)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_check_finds_nothing_but_that_its_loaders_were_not_read(name: str, form: str) -> None:
    """Of a few layers: every linear, joined or not, agrees with the list of what is left out."""
    config = MODELS[name][0]
    text = dict(config.get("text_config", config)) | {"num_hidden_layers": 4}
    text |= (
        {"n_routed_experts": 32, "hybrid_override_pattern": "ME*-"} if "mamba_head_dim" in text else {"num_experts": 16}
    )
    small = config | {"text_config": text} if "text_config" in config else text
    for engine, verdict in verdicts(of_plan(plan_for(small, assumed(small, 1), format=form))).items():
        refused = [finding for finding in verdict.findings if finding.effect is not Effect.UNKNOWN]
        assert refused == [], (engine, refused)
        assert verdict.loads is None


def test_groups_of_linear_attention_are_not_clipped_one_by_one() -> None:
    config = QWEN3_NEXT | {"num_hidden_layers": 4, "num_experts": 16}
    held = assumed(config, 1)
    with pytest.raises(ExportError, match="--awq-clip: the rows of decoder.layers.0.self_attention.in_proj.weight"):
        plan_for(config, held, format="int4_awq", options=Options(awq_clip=True))
    plan_for(config, held, format="nvfp4_awq", options=Options(awq_clip=True))
    plan_for(config, held, format="int4_awq")
