"""Drafts as headers and configs alone: those that ModelOpt wrote, ones that all engines load, and what can be done to them.

`golden/draft_headers.json` has what the folders of ModelOpt 0.47 say before their weights, as `golden/headers.json` of models.
"""

import copy
from collections.abc import Callable
from typing import Any

from megatron_export.engines import CheckpointView

from .checkpoints import Change, Said, described, golden, losing, storing
from .models import GOLDEN, read_json

HEADERS: dict[str, Said] = read_json(GOLDEN / "draft_headers.json")
WHOLE, SMALLER = "draft-llama-eagle3-bf16457", "draft-llama-eagle3d-bf16457"
FP8, DEEP = "draft-llama-eagle3d-FP8457", "draft-llama-eagle3deep-FP8457"
COMBINED, COMBINED_FP8 = "draft-llama-medusa-bf16", "draft-llama-medusa-FP8"
IGNORED = ("*fc", "lm_head")
DOWN, Q = "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"


def golden_draft(name: str) -> Said:
    """A copy of what ModelOpt wrote."""
    return copy.deepcopy(HEADERS[name])


def tensors(said: Said) -> dict[str, list]:
    return said["files"]["model.safetensors"]


def said_of_base(**config: Any) -> Said:
    """The base of the Llama drafts, with eight layers instead of two."""
    said = golden("models/llama-bf16")
    said["config"] |= {"num_hidden_layers": 8} | config
    said["files"].pop("calib_input_ids.safetensors", None)
    held = tensors(said)
    for name in [name for name in held if name.startswith("model.layers.0.")]:
        held |= {name.replace(".0.", f".{layer}.", 1): held[name] for layer in range(2, 8)}
    return said


def base(**config: Any) -> CheckpointView:
    return described(said_of_base(**config))


def spell(*ignored: str, **words: Any) -> Change:
    """Both configs say FP8, or these words, and leave those modules out; the one in config.json is flat."""

    def change(said: Said) -> None:
        algorithm = {"quant_algo": "FP8"} | words
        flat = algorithm | {"quant_method": "modelopt", "ignore": list(ignored)}
        said["config"]["quantization_config"] = flat
        said["quant"] = {"quantization": algorithm | {"exclude_modules": list(ignored), "kv_cache_quant_algo": None}}

    return change


def spell_older(said: Said) -> None:
    """As ModelOpt writes config.json of drafts: hf_quant_config.json's section, and no method."""
    said["config"]["quantization_config"] = {"producer": {"name": "modelopt"}, **said["quant"]}


def in_file_alone(said: Said) -> None:
    del said["config"]["quantization_config"]


def in_config_alone(**words: Any) -> Change:
    """Without hf_quant_config.json, and with these words in config.json."""

    def change(said: Said) -> None:
        said["quant"] = None
        said["config"]["quantization_config"] |= words

    return change


def in_nvfp4(said: Said) -> None:
    """Layers in NVFP4."""
    for name in [name for name in tensors(said) if name.endswith("proj.weight")]:
        rows, inputs = tensors(said)[name][1]
        storing(name, "U8", rows, inputs // 2)(said)
        storing(f"{name}_scale", "F8_E4M3", rows, inputs // 16)(said)
        storing(f"{name}_scale_2", "F32")(said)
        storing(f"{name.removesuffix('weight')}input_scale", "F32")(said)
    spell(*IGNORED, quant_algo="NVFP4", group_size=16)(said)


def narrowed(width: int) -> Change:
    """Linears of the MLP of another width, in NVFP4."""

    def change(said: Said) -> None:
        said["config"]["intermediate_size"] = width
        for part, shape in {"gate": (width, 128), "up": (width, 128), "down": (128, width)}.items():
            storing(f"layers.0.mlp.{part}_proj.weight", "BF16", *shape)(said)
        in_nvfp4(said)

    return change


def renamed(change: Callable[[str], str]) -> Change:
    """Every tensor under another name."""
    return lambda said: said["files"].update(
        {"model.safetensors": {change(name): one for name, one in tensors(said).items()}}
    )


def listing(*ids: int, inputs: tuple[int, ...] | None = None) -> Change:
    """Other layers of the base: outputs in eagle_config, inputs beside it (by default the same ones)."""

    def change(said: Said) -> None:
        said["config"]["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = list(ids)
        said["config"]["eagle_aux_hidden_state_layer_ids"] = list(inputs or (one + 1 for one in ids))
        said["config"]["rope_scaling"] = None

    return change


def plain() -> Said:
    """A draft in bfloat16 that all engines load, with 256 of 512 tokens."""
    return changed(golden_draft(SMALLER), listing(0, 1))


def whole() -> Said:
    """One with all tokens."""
    return changed(golden_draft(WHOLE), listing(0, 1))


def coded(name: str = FP8) -> Said:
    """A draft in FP8 that all engines load: fc and lm_head in bfloat16, and a flat config."""
    lost = losing("fc.weight_scale", "fc.input_scale")
    return changed(golden_draft(name), listing(0, 1), lost, storing("fc.weight", "BF16", 128, 256), spell(*IGNORED))


def deep() -> Said:
    """Two layers, with the norm before the second under both names."""
    return changed(coded(DEEP), storing("layers.1.hidden_norm.weight", "BF16", 128))


def fp8_fc(said: Said) -> None:
    """fc in FP8, as ModelOpt has it."""
    storing("fc.weight", "F8_E4M3", 128, 256)(said)
    storing("fc.weight_scale", "F32")(said)
    storing("fc.input_scale", "F32")(said)
    spell("lm_head")(said)


def heads() -> Said:
    """Medusa's heads in a folder for vLLM."""
    held = {name: one for name, one in tensors(golden_draft(COMBINED)).items() if name.startswith("medusa_heads")}
    config = {"architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": 128, "vocab_size": 512}
    config |= {"num_heads": 3, "num_hidden_layers": 1, "medusa_fc_bias": True}
    return {"config": config, "quant": None, "index": None, "files": {"model.safetensors": held}}


def second_block(said: Said) -> None:
    """A block more in each of Medusa's heads."""
    held = tensors(said)
    for name in [name for name in held if name.startswith("medusa_heads.")]:
        _, head, place, end = name.split(".", 3)
        if place == "1":
            held[f"medusa_heads.{head}.2.{end}"] = held.pop(name)
    for name in [name for name in held if name.startswith("medusa_heads.") and name.split(".")[2] == "0"]:
        held[name.replace(".0.linear", ".1.linear")] = held[name]
    if "medusa" in said["config"]:
        said["config"]["medusa"]["num_medusa_layers"] = 2
    else:
        said["config"]["num_hidden_layers"] = 2


def changed(said: Said, *changes: Change) -> Said:
    for change in changes:
        change(said)
    return said
