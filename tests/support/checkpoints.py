"""Checkpoints as headers and configs alone: those that ModelOpt wrote, and ones that are damaged in one way each.

`golden/headers.json` has what the folders of ModelOpt 0.47 say before their weights: {name: {config, quant, index, files}}.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_export.common.dtypes import torch_dtypes
from megatron_export.common.file_names import INDEX
from megatron_export.engines import CheckpointView, Header
from megatron_export.planning.engine_check import expected_of, of_plan

from .models import GOLDEN, read_json
from .plans import plan_of

Said = dict[str, Any]
Change = Callable[[Said], object]
HEADERS: dict[str, Said] = read_json(GOLDEN / "headers.json")
FP8, FP8_KV, NVFP4, MOE = "models/llama-FP8", "models/llama-FP8-KVFP8", "models/llama-NVFP4", "models/qwen3moe-NVFP4"
TWO_FILES, DOWN = "models/llama-FP8-mcore", "model.layers.0.mlp.down_proj"


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
    return of_plan(plan_of(config, **settings))


def written(said: Said, folder: Path) -> Path:
    """A folder with these headers and configs, and ones in every tensor."""
    kinds = torch_dtypes() | {"I8": torch.int8}
    folder.mkdir(parents=True)
    for file, tensors in said["files"].items():
        save_file({name: torch.ones(shape).to(kinds[dtype]) for name, (dtype, shape) in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(said["config"]))
    if said["quant"] is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(said["quant"]))
    if said["index"] is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": said["index"]}))
    return folder


def _tensors(said: Said) -> dict[str, list]:
    return next(iter(said["files"].values()))


def _sections(said: Said) -> tuple[Said, Said]:
    return said["config"]["quantization_config"], said["quant"]["quantization"]


def _listed(said: Said) -> tuple[list[str], list[str]]:
    flat, nested = _sections(said)
    return flat["ignore"], nested["exclude_modules"]


def losing(*names: str) -> Change:
    """Tensors are gone."""
    return lambda said: [_tensors(said).pop(name) for name in names]


def storing(name: str, dtype: str, *shape: int) -> Change:
    """A tensor is there, of this type and shape."""
    return lambda said: _tensors(said).update({name: [dtype, list(shape)]})


def adding(file: str, **tensors: list) -> Change:
    """Another file is there."""
    return lambda said: said["files"].update({file: tensors})


def leaving_out(name: str) -> Change:
    """Both configs list another module that is not quantized."""
    return lambda said: [listed.append(name) for listed in _listed(said)]


def not_leaving_out(name: str) -> Change:
    return lambda said: [listed.remove(name) for listed in _listed(said)]


def saying(**words: Any) -> Change:
    """Other words in both configs."""
    return lambda said: [section.update(words) for section in _sections(said)]


def configured(**keys: Any) -> Change:
    """Other keys of config.json."""
    return lambda said: said["config"].update(keys)


def repeat_a_tensor(said: Said) -> None:
    said["index"] = None
    first, second = said["files"].values()
    second["model.embed_tokens.weight"] = first["model.embed_tokens.weight"]


def store_in_bfloat16(said: Said) -> None:
    losing(*(f"{DOWN}.{suffix}" for suffix in ("weight_scale", "weight_scale_2", "input_scale")))(said)
    storing(f"{DOWN}.weight", "BF16", 128, 256)(said)


def say_another_method(said: Said) -> None:
    said["config"]["quantization_config"] |= {"quant_method": "gptq", "producer": {"name": "another"}}
    said["quant"] = None


def keep_the_file_alone_without_its_size(said: Said) -> None:
    del said["config"]["quantization_config"]
    del said["quant"]["quantization"]["group_size"]


def mix_every_layer(said: Said, **others: str) -> None:
    """In NVFP4, but for some linears."""
    names = [name.removesuffix(".weight") for name in _tensors(said) if name.endswith("proj.weight")]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}
    layers |= {name: {"quant_algo": algorithm} for name, algorithm in others.items()}
    saying(quant_algo="MIXED_PRECISION", quantized_layers=layers)(said)


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
    saying(quant_algo="FP8_PB_WO")(said)
    for name in [name for name in tensors if name.endswith("input_scale")]:
        del tensors[name]
    for name, (dtype, shape) in list(tensors.items()):
        if dtype == "F8_E4M3":
            shape[:] = [200 if size == 256 else size for size in shape]
            tensors[f"{name}_scale"] = ["F32", [-(-shape[0] // 128), 1, -(-shape[1] // 128), 1]]


def spell_cache_scales_short(said: Said) -> None:
    tensors = _tensors(said)
    for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
        attention, _, scale = name.rsplit(".", 2)
        tensors[f"{attention}.{scale}"] = tensors.pop(name)


def widen_cache_scales(said: Said) -> None:
    """A scale for each of four heads."""
    for name, header in _tensors(said).items():
        if name.endswith(("k_scale", "v_scale")):
            header[1] = [4]


def losing_all(end: str) -> Change:
    """All tensors whose names end so are gone."""
    return lambda said: losing(*(name for name in _tensors(said) if name.endswith(end)))(said)


ATTENTION = "model.layers.0.self_attn"
CACHE = [f"model.layers.1.self_attn.{part}_proj.{part}_scale" for part in "kv"]
ROUTING = configured(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
# Damage -> the checkpoint, what is done to it, what vLLM, SGLang and TensorRT-LLM find (a rule; '' for nothing), and whether
# vLLM notices.
# fmt: off
DAMAGES: dict[str, tuple[str, Change, str, str, str, bool]] = {
    "a file lost":                (TWO_FILES, lambda said: said["files"].popitem(), "files", "files", "missing", True),
    "a stray file":               (FP8, adding("calibration.safetensors", **{"input_ids.0": ["I64", [2, 24]]}),
                                   "unknown", "unknown", "unknown", True),
    "Mistral's file":             (FP8, adding("consolidated.safetensors", **{"output.weight": ["BF16", [8, 8]]}),
                                   "consolidated", "consolidated", "consolidated", True),
    "a tensor repeated":          (TWO_FILES, repeat_a_tensor, "twice", "twice", "twice", False),
    "a norm lost":                (NVFP4, losing("model.norm.weight"), "missing", "missing", "missing", True),
    "a scale lost":               (NVFP4, losing(f"{DOWN}.weight_scale"), "scale", "scale", "scale", True),
    "an input scale lost":        (FP8, losing(f"{DOWN}.input_scale"), "scale", "scale", "", True),
    "an input scale of q lost":   (FP8, losing(f"{ATTENTION}.q_proj.input_scale"), "scale", "scale", "joined inputs", False),
    "an expert's scale lost":     (MOE, losing("model.layers.0.mlp.experts.1.down_proj.weight_scale_2"),
                                   "scale", "scale", "scale", False),
    "a weight cut":               (FP8, storing(f"{ATTENTION}.o_proj.weight", "F8_E4M3", 64, 128),
                                   "shape", "shape", "shape", True),
    "stored in integers":         (FP8, storing(f"{DOWN}.weight", "I8", 128, 256), "dtype", "dtype", "dtype", False),
    "a factor too many":          (NVFP4, storing(f"{ATTENTION}.o_proj.pre_quant_scale", "BF16", 128),
                                   "extra", "awq", "", True),
    "quantized, and left out":    (NVFP4, leaving_out(DOWN), "left out", "left out", "left out", True),
    "stored in bfloat16":         (NVFP4, store_in_bfloat16, "not left out", "not left out", "not left out", True),
    "a part left out":            (NVFP4, leaving_out(f"{ATTENTION}.q_proj"), "partly", "partly", "left out", True),
    "lm_head forgotten":          (NVFP4, not_leaving_out("lm_head"), "not left out", "not left out", "", True),
    "lm_head of Qwen3 forgotten": ("models/qwen3-NVFP4", not_leaving_out("lm_head"), "not left out", "", "", True),
    "a router forgotten":         (MOE, not_leaving_out("model.layers.0.mlp.gate"), "not left out", "", "", True),
    "experts left out in short":  (MOE, leaving_out("mlp"), "left out", "left out", "", True),
    "the method forgotten":       (NVFP4, lambda said: said["config"]["quantization_config"].pop("quant_method"),
                                   "dialect", "", "", True),
    "another method":             (NVFP4, say_another_method, "another", "another", "another", True),
    "the file alone":             (NVFP4, lambda said: said["config"].pop("quantization_config"), "", "", "", False),
    "the file without a size":    (NVFP4, keep_the_file_alone_without_its_size, "config", "config", "", True),
    "nothing mixed":              (NVFP4, saying(quant_algo="MIXED_PRECISION", quantized_layers={}),
                                   "mixed", "mixed", "left out", True),
    "every layer mixed":          (NVFP4, mix_every_layer, "", "mixed joined", "", False),
    "mixed within a linear":      (NVFP4, lambda said: mix_every_layer(said, **{f"{ATTENTION}.q_proj": "FP8"}),
                                   "partly", "partly", "partly", True),
    "called W4A16":               (NVFP4, saying(quant_algo="W4A16_NVFP4"), "", "extra", "extra", False),
    "in blocks":                  (FP8, store_in_blocks, "blocks", "llama blocks", "", True),
    "a block cut":                (FP8, cut_a_block, "inputs", "algorithm", "case", True),
    "a layer's cache lost":       (FP8_KV, losing(*CACHE), "kv scales", "", "kv fp8", False),
    "the cache spelt short":      (FP8_KV, spell_cache_scales_short, "", "", "kv spelling", False),
    "a cache scale for each head": (FP8_KV, widen_cache_scales, "kv shape", "kv shape", "kv shape", True),
    "no scales of keys":          (FP8_KV, losing_all("k_scale"), "kv pair", "kv pair", "kv spelling", True),
    "no scales of values":        (FP8_KV, losing_all("v_scale"), "kv half", "kv half", "kv half", False),
    "dual chunks":                (MOE, configured(dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192}),
                                   "chunks", "chunks", "", True),
    "two configs":                (FP8, lambda said: _listed(said)[1].append("model.layers.9.nothing"),
                                   "", "", "two configs", False),
    "routers, cache":             ("models/deepseekv3-FP8-KVFP8", ROUTING, "kv mla", "", "latent", False),
    "routers, NVFP4":             ("models/deepseekv3-NVFP4", ROUTING, "", "latent", "latent", False),
    "routers, FP8":               ("models/deepseekv3-FP8-mcore", ROUTING, "mtp", "latent scale", "latent", False),
    "nobody's architecture":      (FP8, configured(architectures=["NobodysForCausalLM"]),
                                   "architecture", "architecture", "architecture", True),
}
# fmt: on


def damaged(damage: str) -> Said:
    """A golden checkpoint after that damage."""
    name, change, *_ = DAMAGES[damage]
    said = golden(name)
    change(said)
    return said
