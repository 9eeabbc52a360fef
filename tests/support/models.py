"""Small random HF checkpoints of every architecture, made by transformers itself, and what tests read back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
EXAMPLE = Path(__file__).parents[2] / "examples" / "model"

_SMALL = {
    "vocab_size": 500,  # not a multiple of anything that Megatron pads to
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,  # 16 divides a half of it, and no quarter of it
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
ARCHITECTURES = {
    "llama31": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": _LLAMA3 | {"factor": 8.0}},
    "llama32": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3 | {"factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v3": _EXPERTS
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 8,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe": _EXPERTS | {"model_type": "glm4_moe", "head_dim": 32, "attention_bias": True, "use_qk_norm": True},
}
_LLAMA4 = {
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "rope_theta": 500000.0,
    "rope_scaling": _LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32},
}
ARCHITECTURES |= {
    "qwen2_yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "sliding_window": 8,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "llama4": _LLAMA4 | {"model_type": "llama4_text"},
    "llama4_vision": {
        "model_type": "llama4",
        "text_config": _SMALL | _LLAMA4,
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
}
_TILES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "patch_size": 14,
}
ARCHITECTURES |= {
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": 8},
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral3": {
        "model_type": "mistral3",
        "text_config": _SMALL | {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": _TILES | {"model_type": "pixtral", "head_dim": 8, "image_size": 28},
        "spatial_merge_size": 1,
        "tie_word_embeddings": False,
    },
}
_SEES = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 64, "patch_size": 4}
_SEES |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
ARCHITECTURES |= {
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": _SMALL | {"head_dim": 16, "rope_parameters": _MROPE},
        "vision_config": _SEES,
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "text_config": _SMALL
        | {
            "head_dim": 16,
            "rope_parameters": _MROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
        "vision_config": _SEES,
    },
}
_LATENT = {
    k: ARCHITECTURES["deepseek_v3"][k] for k in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
}
_SPARSE = _EXPERTS | _LATENT | {"v_head_dim": 16, "num_key_value_heads": 8, "routed_scaling_factor": 2.5}
_SPARSE |= {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 64, "n_group": 1, "topk_group": 1}
ARCHITECTURES |= {
    "deepseek_v32": _SPARSE | {"model_type": "deepseek_v32"},
    "glm_moe_dsa": _SPARSE
    | {"model_type": "glm_moe_dsa", "rms_norm_eps": 1e-6, "indexer_types": ["full", "shared", "shared", "full"]},
}
ARCHITECTURES |= {
    "minimax_m2": {
        "model_type": "minimax_m2",
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "scoring_func": "sigmoid",
    },
}
ARCHITECTURES |= {
    "kimi_k25": {
        "model_type": "kimi_k25",
        "text_config": _SMALL | ARCHITECTURES["deepseek_v3"],
        "vision_config": _TILES | {"pos_emb_height": 2, "pos_emb_width": 2, "pos_emb_time": 1},
        "projection_hidden_size": 32,
        "tie_word_embeddings": False,
    },
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True}
_GEMMA |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA["rope_parameters"] = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ARCHITECTURES |= {
    "gemma3": {"model_type": "gemma3_text", **_GEMMA},
    "gemma3_vision": {
        "model_type": "gemma3",
        "text_config": _SMALL | _GEMMA,
        "vision_config": _TILES | {"image_size": 28, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
}
ARCHITECTURES |= {"phi3": {"model_type": "phi3", "pad_token_id": 0, "partial_rotary_factor": 0.5, "sliding_window": 8}}
_LINEAR = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}
_SHARED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
}
_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
ARCHITECTURES |= {
    "qwen3_next": _LINEAR | _SHARED | {"model_type": "qwen3_next", "mlp_only_layers": [1]},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": _SMALL | _LINEAR, "vision_config": _TOWER},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe", "text_config": _SMALL | _LINEAR | _SHARED, "vision_config": _TOWER},
    "qwen3_5_text": _LINEAR | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": _LINEAR | _SHARED | {"model_type": "qwen3_5_moe_text"},
}
ARCHITECTURES["nemotron_h"] = {
    "model_type": "nemotron_h",
    "head_dim": 16,
    "num_key_value_heads": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 96,
    "moe_latent_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
}
DENSE = ("llama31", "llama32", "qwen2", "qwen3")
SAMPLES, LENGTH = 8, 24


def make_model(folder: Path, name: str, **changes: object) -> Path:
    """A bfloat16 checkpoint, its norms and biases not trivial; beside it `ids/calibration.safetensors`, to calibrate with."""
    from transformers import AutoConfig

    torch.manual_seed(7)
    source = folder / name
    config = AutoConfig.for_model(**_settings(name, **changes))
    model = auto_model(name).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif parameter.dim() == 3:  # stacked experts
                parameter.normal_(std=_SMALL["initializer_range"])
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):  # in float32, as DeepSeek publishes it
                bias = module.e_score_correction_bias
                module.e_score_correction_bias = (torch.rand_like(bias, dtype=torch.float32) - 0.5) / 8
    model.save_pretrained(source)
    if name in ("qwen3_vl_moe", "kimi_k25", "gemma3_vision"):
        _as_published(source)
    (source / "tokenizer_config.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "ids").mkdir(exist_ok=True)
    ids = torch.randint(0, config.get_text_config().vocab_size, (SAMPLES, LENGTH))
    save_file({"input_ids": ids}, folder / "ids" / "calibration.safetensors")
    return source


def hf_config(name: str) -> dict:
    """config.json's dict of such a checkpoint of a language model, without making it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_settings(name))
    found = json.loads(config.to_json_string())
    return found | {"architectures": [AutoModelForCausalLM._model_mapping[type(config)].__name__], "dtype": "bfloat16"}


def _settings(name: str, **changes: object) -> dict:
    settings = ARCHITECTURES[name]
    if "text_config" in settings:
        return settings | {"text_config": settings["text_config"] | changes}
    settings = {**_SMALL, **settings, **changes}
    return settings | ({"num_hidden_layers": len(settings["layers_block_type"])} if name == "nemotron_h" else {})


_OF_TOWER = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
_OF_PLACES = ("pos_emb_height", "pos_emb_time", "pos_emb_width")


def _as_published(source: Path) -> None:
    """Undo what transformers saves otherwise than the publisher: names of Kimi K2.5 and of Gemma's vision tower, and stacked
    experts of Qwen3-VL, whose last two dims it leaves as they are in memory.
    """
    spelled = (("model.blocks.", "model.layers."), ("model.mm_projector.", "mm_projector."))
    spelled += (("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),)
    if source.name == "gemma3_vision":
        spelled = (("vision_tower.", "vision_tower.vision_model."),)
    made = {}
    for name, tensor in tensors(source).items():
        for theirs, own in spelled:
            name = name.replace(theirs, own)
        made[name] = tensor.mT.contiguous() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else tensor
    save_file(made, source / "model.safetensors", {"format": "pt"})
    config = (source / "config.json").read_text().replace("Kimi_K25For", "KimiK25For")
    if source.name == "kimi_k25":
        said = json.loads(config)
        sees = said["vision_config"]
        sees |= {f"vt_{key}": sees[key] for key in _OF_TOWER} | {f"init_{key}": sees[key] for key in _OF_PLACES}
        sees |= {"mm_hidden_size": sees["hidden_size"], "text_hidden_size": said["text_config"]["hidden_size"]}
        config = json.dumps(said)
    (source / "config.json").write_text(config)


def auto_model(name: str) -> Any:
    """The class of transformers that makes and loads a model of that name."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if "vision_config" in ARCHITECTURES.get(name, {}) else AutoModelForCausalLM


def add_mtp(source: Path) -> None:
    """Give a checkpoint a layer that predicts one more token: like its last, with other numbers, as DeepSeek spells it."""
    config, held = read_json(source / "config.json"), tensors(source)
    count, hidden = config["num_hidden_layers"], config["hidden_size"]
    last, new = f"model.layers.{count - 1}.", f"model.layers.{count}."
    made = {new + name.removeprefix(last): tensor.flip(0) for name, tensor in held.items() if name.startswith(last)}
    made |= {f"{new}{norm}.weight": torch.rand(hidden).bfloat16() for norm in ("enorm", "hnorm", "shared_head.norm")}
    made[f"{new}eh_proj.weight"] = (torch.randn(hidden, 2 * hidden) / 10).bfloat16()
    made[f"{new}embed_tokens.weight"] = held["model.embed_tokens.weight"]
    made[f"{new}shared_head.head.weight"] = held["lm_head.weight"]
    for path in source.glob("*.safetensors"):
        path.unlink()
    save_file({name: tensor.clone() for name, tensor in (held | made).items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, read file by file as an engine does, ignoring the index."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                assert name not in found, f"{name} is in two files"
                found[name] = opened.get_tensor(name)
    return found


def behind(prefix: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by what follows in them."""
    return {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}


def same(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes; NaN equals itself."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, and every tensor the same to the bit."""
    assert sorted(left) == sorted(right)
    assert [name for name in left if not same(left[name], right[name])] == []


def contents(folder: Path) -> dict[str, object]:
    """What is in a checkpoint folder, by file name: bytes, and of the manifest all but how it came about."""
    held: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    held["export_manifest.json"] = {k: v for k, v in json.loads(held["export_manifest.json"]).items() if k != "run"}
    return held


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
