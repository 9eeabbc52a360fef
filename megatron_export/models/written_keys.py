"""Keys of config.json made of Megatron's settings, as several architectures spell them: what their `written` is made of.

Settings are as `settled` gives them: all that Megatron computes with is there, and what differs by layer is a list.
"""

from collections.abc import Sequence

from .architecture import Settings


def numbered(said: Settings) -> dict:
    """Experts as Qwen spells them: some layers may have an MLP in their place."""
    if not said["num_moe_experts"]:
        return {}
    return {
        "num_experts": said["num_moe_experts"],
        "num_experts_per_tok": said["moe_router_topk"],
        "moe_intermediate_size": said["moe_ffn_hidden_size"],
        "norm_topk_prob": not said["moe_router_pre_softmax"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": layers_with(said["moe_layer_freq"], 0),
    }


def local(said: Settings) -> dict:
    """Experts in every layer, whose size is that of MLPs, as Mixtral spells them."""
    if not said["num_moe_experts"]:
        return {}
    return {
        "num_local_experts": said["num_moe_experts"],
        "num_experts_per_tok": said["moe_router_topk"],
        "intermediate_size": said["moe_ffn_hidden_size"],
    }


def routed(said: Settings) -> dict:
    """Experts as DeepSeek spells them, after layers with MLPs."""
    if not said["num_moe_experts"]:
        return {}
    sparse, ffn = layers_with(said["moe_layer_freq"], 1), said["moe_ffn_hidden_size"]
    return {
        "n_routed_experts": said["num_moe_experts"],
        "num_experts_per_tok": said["moe_router_topk"],
        "moe_intermediate_size": ffn,
        "n_shared_experts": (said["moe_shared_expert_intermediate_size"] or 0) // ffn,
        "first_k_dense_replace": sparse[0] if sparse else said["num_layers"],
        "n_group": said["moe_router_num_groups"] or 1,
        "topk_group": said["moe_router_group_topk"] or 1,
        "routed_scaling_factor": said["moe_router_topk_scaling_factor"] or 1.0,
    }


def latent(said: Settings) -> dict:
    """Sizes of latent attention, all of whose heads are alike."""
    if not said["multi_latent_attention"]:
        return {}
    return {
        "num_key_value_heads": said["num_attention_heads"],
        "head_dim": said["qk_pos_emb_head_dim"],
        "q_lora_rank": said["q_lora_rank"],
        "kv_lora_rank": said["kv_lora_rank"],
        "qk_nope_head_dim": said["qk_head_dim"],
        "qk_rope_head_dim": said["qk_pos_emb_head_dim"],
        "v_head_dim": said["v_head_dim"],
    }


def window(said: Settings) -> dict:
    """HF counts all tokens that are seen, Megatron those before."""
    return {"sliding_window": said["window_size"][0] + 1 if said["window_size"] else None}


def windows(said: Settings) -> dict:
    """The same in some layers: without a list, in all."""
    inside = said["window_attn_skip_freq"] or [1] * said["num_layers"]
    inside = inside if said["window_size"] else [0] * said["num_layers"]
    return window(said) | {"layer_types": ["sliding_attention" if one else "full_attention" for one in inside]}


def layers_with(flags: Sequence[int], flag: int) -> list[int]:
    return [layer for layer, one in enumerate(flags) if one == flag]
