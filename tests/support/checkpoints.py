"""Checkpoints as headers and configs alone: those that ModelOpt wrote, and ones that are damaged in one way each.

`golden/headers.json` has what the folders of ModelOpt 0.47 say before their weights: {name: {config, quant, index, files}}.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_export.common.file_names import INDEX
from megatron_export.engines import CheckpointView, Header
from megatron_export.planning.engine_check import expected_of, of_plan
from megatron_export.planning.plan import assumed

from .models import GOLDEN, read_json
from .plans import plan_for

Said = dict[str, Any]
HEADERS: dict[str, Said] = read_json(GOLDEN / "headers.json")
FP8, FP8_KV, NVFP4, MOE = (
    f"models/{name}" for name in ("llama-FP8", "llama-FP8-KVFP8", "llama-NVFP4", "qwen3moe-NVFP4")
)
TWO_FILES = "models/llama-FP8-mcore"


def golden(name: str) -> Said:
    """A copy of what ModelOpt wrote."""
    return copy.deepcopy(HEADERS[name])


def described(said: Said) -> CheckpointView:
    """As the engines' rules see it."""
    expected, copied = expected_of(said["config"])
    return CheckpointView(
        config=said["config"],
        quant=said["quant"],
        files={
            file: {name: Header(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
            for file, tensors in said["files"].items()
        },
        index=said["index"],
        expected=expected,
        copied=copied,
    )


def planned(config: dict, **settings: Any) -> CheckpointView:
    """What a plan would write."""
    return of_plan(plan_for(config, assumed(config, 1), **settings))


def written(said: Said, folder: Path) -> Path:
    """A folder with these headers and configs; weights are ones, or random codes."""
    import torch
    from safetensors.torch import save_file

    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
             "I8": torch.int8, "I64": torch.int64, "F16": torch.float16}  # fmt: skip
    folder.mkdir(parents=True)
    for file, tensors in said["files"].items():
        made = {
            name: torch.ones(shape, dtype=torch.float32).to(kinds[dtype]) for name, (dtype, shape) in tensors.items()
        }
        save_file(made, folder / file)
    (folder / "config.json").write_text(json.dumps(said["config"]))
    if said["quant"] is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(said["quant"]))
    if said["index"] is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": said["index"]}))
    return folder


def _tensors(said: Said) -> dict[str, list]:
    return next(iter(said["files"].values()))


def _listed(said: Said) -> tuple[list[str], list[str]]:
    return said["config"]["quantization_config"]["ignore"], said["quant"]["quantization"]["exclude_modules"]


def lose_a_file(said: Said) -> None:
    said["files"].popitem()


def add_a_stray_file(said: Said) -> None:
    said["files"]["calibration.safetensors"] = {"input_ids.0": ["I64", [2, 24]]}


def add_mistrals_file(said: Said) -> None:
    said["files"]["consolidated.safetensors"] = {"output.weight": ["BF16", [8, 8]]}


def repeat_a_tensor(said: Said) -> None:
    said["index"] = None
    first, second = said["files"].values()
    second["model.embed_tokens.weight"] = first["model.embed_tokens.weight"]


def lose_a_norm(said: Said) -> None:
    del _tensors(said)["model.norm.weight"]


def lose_a_scale(said: Said) -> None:
    del _tensors(said)["model.layers.0.mlp.down_proj.weight_scale"]


def lose_an_input_scale(said: Said) -> None:
    del _tensors(said)["model.layers.0.mlp.down_proj.input_scale"]


def lose_an_experts_scale(said: Said) -> None:
    del _tensors(said)["model.layers.0.mlp.experts.1.down_proj.weight_scale_2"]


def cut_a_weight(said: Said) -> None:
    _tensors(said)["model.layers.0.self_attn.o_proj.weight"][1][0] //= 2


def store_in_integers(said: Said) -> None:
    _tensors(said)["model.layers.0.mlp.down_proj.weight"][0] = "I8"


def store_in_bfloat16(said: Said) -> None:
    tensors, down = _tensors(said), "model.layers.0.mlp.down_proj"
    tensors[f"{down}.weight"] = ["BF16", [128, 256]]
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{down}.{suffix}"]


def add_pre_quant_scale(said: Said) -> None:
    _tensors(said)["model.layers.0.self_attn.o_proj.pre_quant_scale"] = ["BF16", [128]]


def leave_out_what_is_quantized(said: Said) -> None:
    for listed in _listed(said):
        listed.append("model.layers.0.mlp.down_proj")


def leave_out_a_part(said: Said) -> None:
    for listed in _listed(said):
        listed.append("model.layers.0.self_attn.q_proj")


def forget_lm_head(said: Said) -> None:
    for listed in _listed(said):
        listed.remove("lm_head")


def forget_a_router(said: Said) -> None:
    for listed in _listed(said):
        listed.remove("model.layers.0.mlp.gate")


def list_experts_by_a_short_word(said: Said) -> None:
    for listed in _listed(said):
        listed.append("mlp")


def forget_the_method(said: Said) -> None:
    del said["config"]["quantization_config"]["quant_method"]


def say_another_method(said: Said) -> None:
    said["config"]["quantization_config"] |= {"quant_method": "gptq", "producer": {"name": "another"}}
    said["quant"] = None


def keep_the_file_alone(said: Said) -> None:
    del said["config"]["quantization_config"]


def keep_the_file_alone_without_its_size(said: Said) -> None:
    keep_the_file_alone(said)
    del said["quant"]["quantization"]["group_size"]


def mix_nothing(said: Said) -> None:
    said["config"]["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}
    said["quant"]["quantization"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}


def mix_every_layer(said: Said) -> None:
    names = [name.removesuffix(".weight") for name in _tensors(said) if name.endswith("proj.weight")]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}
    said["config"]["quantization_config"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    said["quant"]["quantization"] |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def mix_within_a_joined_linear(said: Said) -> None:
    mix_every_layer(said)
    for section in (said["config"]["quantization_config"], said["quant"]["quantization"]):
        section["quantized_layers"] |= {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}}


def say_w4a16(said: Said) -> None:
    said["config"]["quantization_config"] |= {"quant_algo": "W4A16_NVFP4"}
    said["quant"]["quantization"]["quant_algo"] = "W4A16_NVFP4"


def store_in_blocks(said: Said) -> None:
    """As DeepSeek's own checkpoints are; k and v have 64 rows."""
    tensors = _tensors(said)
    for name in [name for name in tensors if name.endswith(("weight_scale", "input_scale"))]:
        del tensors[name]
    for name, (dtype, shape) in list(tensors.items()):
        if dtype == "F8_E4M3":
            tensors[f"{name}_scale_inv"] = ["F32", [-(-size // 128) for size in shape]]
    said["config"]["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    said["quant"] = None


def cut_a_block(said: Said) -> None:
    """FP8_PB_WO, and 200 inputs of down_proj."""
    tensors = _tensors(said)
    said["config"]["intermediate_size"] = 200
    said["config"]["quantization_config"] |= {"quant_algo": "FP8_PB_WO"}
    said["quant"]["quantization"]["quant_algo"] = "FP8_PB_WO"
    for name in [name for name in tensors if name.endswith("input_scale")]:
        del tensors[name]
    for name, (dtype, shape) in list(tensors.items()):
        if dtype == "F8_E4M3":
            shape[:] = [200 if size == 256 else size for size in shape]
            tensors[f"{name}_scale"] = ["F32", [-(-shape[0] // 128), 1, -(-shape[1] // 128), 1]]


def lose_a_layers_cache_scales(said: Said) -> None:
    for part in "kv":
        del _tensors(said)[f"model.layers.1.self_attn.{part}_proj.{part}_scale"]


def spell_cache_scales_short(said: Said) -> None:
    tensors = _tensors(said)
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        attention, _, scale = name.rsplit(".", 2)
        tensors[f"{attention}.{scale}"] = tensors.pop(name)


def disagree(said: Said) -> None:
    said["quant"]["quantization"]["exclude_modules"].append("model.layers.9.nothing")


def name_the_method_of_routers(said: Said) -> None:
    said["config"] |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}


def rename_the_architecture(said: Said) -> None:
    said["config"]["architectures"] = ["NobodysForCausalLM"]


Change = Callable[[Said], None]
# A checkpoint and its damage -> what vLLM, SGLang and TensorRT-LLM find (a rule; '' for nothing), and whether vLLM notices.
# fmt: off
DAMAGES: dict[tuple[str, Change], tuple[str, str, str, bool]] = {
    (TWO_FILES, lose_a_file):                ("files", "files", "missing", True),
    (FP8, add_a_stray_file):                 ("unknown", "unknown", "unknown", True),
    (FP8, add_mistrals_file):                ("consolidated", "consolidated", "consolidated", True),
    (TWO_FILES, repeat_a_tensor):            ("twice", "twice", "twice", False),
    (NVFP4, lose_a_norm):                    ("missing", "missing", "missing", True),
    (NVFP4, lose_a_scale):                   ("scale", "scale", "scale", True),
    (FP8, lose_an_input_scale):              ("scale", "scale", "", True),
    (MOE, lose_an_experts_scale):            ("scale", "scale", "scale", False),
    (FP8, cut_a_weight):                     ("shape", "shape", "shape", True),
    (FP8, store_in_integers):                ("dtype", "dtype", "dtype", False),
    (NVFP4, add_pre_quant_scale):            ("extra", "awq", "extra", True),
    (NVFP4, leave_out_what_is_quantized):    ("left out", "left out", "left out", True),
    (NVFP4, store_in_bfloat16): ("not left out", "not left out", "not left out", True),
    (NVFP4, leave_out_a_part):               ("partly", "partly", "left out", True),
    (NVFP4, forget_lm_head):                 ("not left out", "not left out", "", True),
    ("models/qwen3-NVFP4", forget_lm_head):  ("not left out", "", "", True),
    (MOE, forget_a_router):                  ("not left out", "", "", True),
    (MOE, list_experts_by_a_short_word):     ("left out", "left out", "", True),
    (NVFP4, forget_the_method):              ("dialect", "", "", True),
    (NVFP4, say_another_method):             ("another", "another", "another", True),
    (NVFP4, keep_the_file_alone):            ("", "", "", False),
    (NVFP4, keep_the_file_alone_without_its_size): ("config", "config", "", True),
    (NVFP4, mix_nothing):                    ("mixed", "mixed", "left out", True),
    (NVFP4, mix_every_layer):                ("", "mixed joined", "", False),
    (NVFP4, mix_within_a_joined_linear):     ("partly", "partly", "partly", True),
    (NVFP4, say_w4a16): ("", "extra", "extra", False),
    (FP8, store_in_blocks):                  ("blocks", "llama blocks", "", True),
    (FP8, cut_a_block):                      ("inputs", "algorithm", "case", True),
    (FP8_KV, lose_a_layers_cache_scales):    ("kv scales", "", "", False),
    (FP8_KV, spell_cache_scales_short):      ("", "", "kv spelling", False),
    (FP8, disagree):                         ("", "", "two configs", False),
    ("models/deepseekv3-FP8-KVFP8", name_the_method_of_routers): ("kv mla", "", "latent", False),
    ("models/deepseekv3-NVFP4", name_the_method_of_routers): ("", "latent", "latent", False),
    ("models/deepseekv3-FP8-mcore", name_the_method_of_routers): ("mtp", "latent scale", "latent", False),
    (FP8, rename_the_architecture):          ("architecture", "architecture", "architecture", True),
}
# fmt: on


def damaged(name: str, change: Change) -> Said:
    """A golden checkpoint after a change."""
    said = golden(name)
    change(said)
    return said
