"""Configs that tests plan from, without a checkpoint: each has all that its architecture needs, in sizes that engines accept."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = MIXTRAL | {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 256, "norm_topk_prob": True}
LLAMA4 = MIXTRAL | {"architectures": ["Llama4ForCausalLM"], "num_experts_per_tok": 1, "intermediate_size_mlp": 512}
LLAMA4_SEES = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": LLAMA4}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
}
SMALL_V3 = DEEPSEEK_V3 | {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "vocab_size": 1000,
}
LLAMA_70B = LLAMA | {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
QWEN35 = LLAMA | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
QWEN_NEXT = QWEN35 | {
    "architectures": ["Qwen3NextForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
}
NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 8,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "hybrid_override_pattern": "ME*",
}
_INSIDE = {"text_config": LLAMA, "tie_word_embeddings": False}
MISTRAL3 = {"architectures": ["Mistral3ForConditionalGeneration"], **_INSIDE}
_GROWING = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "llama_4_scaling_beta": 0.1}
MINISTRAL3 = LLAMA | {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3", "head_dim": 32}
MINISTRAL3 |= {"rope_parameters": _GROWING | {"original_max_position_embeddings": 16384}, "rope_theta": 1e6}
MINISTRAL3_SEES = MISTRAL3 | {"text_config": MINISTRAL3}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 8}
MINIMAX = MIXTRAL | {"architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 32, "rotary_dim": 16}
GLM5 = SMALL_V3 | {"architectures": ["GlmMoeDsaForCausalLM"], "num_nextn_predict_layers": 0, "kv_lora_rank": 128}
GLM5 |= {
    "index_topk": 64,
    "index_n_heads": 2,
    "index_head_dim": 128,
    "indexer_types": ["full", "shared", "shared", "full"],
}
QWEN_SEES = {"architectures": ["Qwen3VLForConditionalGeneration"], "text_config": LLAMA | {"head_dim": 32}}
QWEN_MOE_SEES = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": QWEN_MOE | {"head_dim": 32}}
KIMI = {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": SMALL_V3 | {"num_nextn_predict_layers": 0}}
