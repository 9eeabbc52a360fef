"""Small checkpoints of every architecture in every format, in sizes that engines accept: whole blocks, latents of 576."""

from pathlib import Path

from megatron_export import formats
from megatron_export.engines.exclude_lists import JOINED
from megatron_export.planning import recipe

from ..support.exported import exported
from ..support.models import add_mtp, make_model
from ..support.predicting import add_nemotrons, add_qwens

_WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}
_HEADS = _WIDE | {"head_dim": 64}
_EXPERTS = _HEADS | {"moe_intermediate_size": 128}
_MLA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "q_lora_rank": 128,
    "moe_intermediate_size": 128,
}
_LLAMA4 = _HEADS | {"intermediate_size": 128, "intermediate_size_mlp": 384}
_LINEAR = _EXPERTS | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 128,
    "mlp_only_layers": [],
}
_MAMBA = _EXPERTS | {
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 8,
    "ssm_state_size": 16,
    "moe_latent_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
}
_SPARSE = _WIDE | _MLA | {"index_n_heads": 4, "index_head_dim": 128, "index_topk": 64}
_WINDOWS = _HEADS | {"layer_types": ["sliding_attention", "full_attention"]}
_POSITIONS = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
# Exported from their tables alone, without a Megatron model, some of whose layers would be slow on a CPU, or missing.
BY_TABLE = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    "nemotron_h": _MAMBA,
    "mistral": _HEADS,
    "ministral3": _HEADS,
    "mistral3": _HEADS,
    "phi3": _WIDE,
    "gemma3": _WINDOWS,
    "gemma3_vision": _WINDOWS,
    "minimax_m2": _HEADS | {"intermediate_size": 128},
    "qwen3_vl": _HEADS | {"rope_parameters": _POSITIONS},
    "qwen3_vl_moe": _EXPERTS | {"rope_parameters": _POSITIONS, "moe_intermediate_size": 384},  # no expert is square
    "kimi_k25": _WIDE | _MLA,
    "deepseek_v32": _SPARSE,
    "glm_moe_dsa": _SPARSE | {"indexer_types": ["full", "shared"]},
}
LATENT = ("deepseek_v3", "kimi_k25", "deepseek_v32", "glm_moe_dsa")
MODELS = BY_TABLE | {
    "llama31": _WIDE,
    "llama32": _HEADS,
    "qwen2": _WIDE,
    "qwen3": _HEADS,
    "qwen3_moe": _EXPERTS,
    "mixtral": _HEADS,
    "deepseek_v3": _WIDE | _MLA,
    "glm4_moe": _EXPERTS,
    "gpt_oss": _HEADS | {"intermediate_size": 128},
    "llama4": _LLAMA4,
    "llama4_vision": _LLAMA4,
}
FORMATS = {name: {"format": name} for name in formats.FORMATS} | {
    "fp8_kv": {"format": "fp8", "kv_cache": "fp8"},
    **{f"{name}_head": {"format": name, "set": (f"lm_head={name}",)} for name in ("fp8", "nvfp4", "w4a16_nvfp4")},
    "nvfp4_cast": {"format": "nvfp4", "kv_cache": "fp8", "kv_scale": 1.0, "input_scale": 1.0},
    "fp8_pb_modelopt": {"format": "fp8_pb", "fp8_pb_spelling": "modelopt"},
    "nvfp4_kv": {"format": "nvfp4", "kv_cache": "fp8"},
    "nvfp4_kvnvfp4": {"format": "nvfp4", "kv_cache": "nvfp4"},
    "nvfp4_awq_modelopt": {"format": "nvfp4_awq", "awq_output": "modelopt"},
}
FORMATS |= {name: {"recipe": name} for name in recipe.names()} | {
    "nvfp4_experts_kv_cast": {"recipe": "nvfp4_experts_only", "kv_cache": "fp8", "kv_scale": 1.0},
    "mixed_mxfp8": {"recipe": "nvfp4_mlp_only", "set": ("*.self_attn.*=mxfp8",)},
    "mixed_pc_pt": {"recipe": "nvfp4_mlp_only", "set": ("*.self_attn.*=fp8_pc_pt",)},
    "mixed_pb": {"recipe": "nvfp4_mlp_only", "set": ("*.self_attn.*=fp8_pb",), "fp8_pb_spelling": "modelopt"},
    "mixed_pb_native": {"recipe": "nvfp4_mlp_only", "set": ("*.self_attn.*=fp8_pb",)},
    "mixed_head": {"recipe": "nvfp4_mlp_fp8_attention", "set": ("lm_head=fp8",)},
    "mixed_head_w4a16": {"recipe": "w4a16_nvfp4_mlp_fp8_attention", "set": ("lm_head=w4a16_nvfp4",)},
    "mixed_hybrid": {
        "format": "bf16",
        "set": ("*.experts=nvfp4", *(f"*.{last}=fp8" for last in ("in_proj", "out_proj", "[qkvo]_proj"))),
    },
    "mixed_kvnvfp4": {"recipe": "nvfp4_mlp_fp8_attention", "kv_cache": "nvfp4"},
}
_OPTIONS = ("fp8_pb_spelling", "awq_output")
WITH_MLA = {f"{name}+mla": settings | {"quantize_mla": True} for name, settings in FORMATS.items()}


def source(folder: Path, name: str) -> Path:
    """A bfloat16 checkpoint in those sizes; NAME-mtp has a layer that predicts a token, NAME-sparse experts in every layer."""
    name, _, kind = name.partition("-")
    made = make_model(folder, name, **MODELS[name] | ({"mlp_only_layers": []} if kind == "sparse" else {}))
    if kind == "mtp":
        predicting = add_nemotrons if name == "nemotron_h" else add_qwens if name.startswith("qwen3") else add_mtp
        predicting(made)
    return made


def list_joined(layers: dict[str, dict]) -> None:
    """Put the names of joined linears (qkv_proj, gate_up_proj) into a quantized_layers that has their members."""
    joined = {part: name for parts, name in JOINED.items() for part in parts}
    for module, said in list(layers.items()):
        parent, _, last = module.rpartition(".")
        if last in joined:
            layers[f"{parent}.{joined[last]}"] = said


def export_by_table(model: Path, out: Path, names: list[str]) -> dict[str, str]:
    """Write a checkpoint in the formats of those names into folders of `out`; what was refused, and why."""
    from megatron_export import ExportError

    refused = {}
    for name in names:
        asked = (FORMATS | WITH_MLA)[name]
        settings = {key: value for key, value in asked.items() if key not in _OPTIONS}
        options = {key: value for key, value in asked.items() if key in _OPTIONS}
        try:
            exported(model, out / name, settings.pop("format", None), options=options, **settings)
        except ExportError as error:
            refused[name] = str(error)
    return refused


def export(model: Path, out: Path, names: list[str], **more: object) -> dict[str, str]:
    """In a rank: export a checkpoint in the formats of those names into folders of `out`; what was refused, and why."""
    from megatron_export import ExportError, calibrate, export_hf_checkpoint

    from ..support.live import batches, loaded

    refused, measured = {}, None
    asked = {name: (FORMATS | WITH_MLA)[name] for name in names}
    with loaded(model) as (built, _):
        for name in names:
            settings = asked[name]
            try:
                if measured is None and settings.get("format") != "bf16":
                    forms = {one.get("format", "fp8") for one in asked.values()}  # fp8's serve every recipe here
                    head = any("lm_head" in line for one in asked.values() for line in one.get("set", ()))
                    measured = calibrate(built, batches(model), format=sorted(forms - {"bf16"}), head=head)
                given = None if settings.get("format") == "bf16" else measured
                export_hf_checkpoint(built, out / name, hf_model=model, calibration=given, **settings, **more)
            except ExportError as error:
                refused[name] = str(error)
    return refused
