"""What parts of TensorRT-LLM's files do with a checkpoint, without what is compiled: definitions out of its sources, run on a CPU.

`TENSORRT_LLM` names a folder with its sources, or with the files that TAKEN lists. A complete checkout was not tried. Its package
is not imported, as that needs bindings that are compiled. What the definitions call of these has a stand-in: kernels that move
codes into another order keep the order and the size, and a GPU's memory is the CPU's.
"""

import ast
import enum
import fnmatch
import inspect
import json
import math
import os
import re
import struct
import sys
import typing
from abc import ABC
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pydantic
import torch
import transformers

FOLDER = "TENSORRT_LLM"
METHODS = ("Base", "Unquantized", "FP8QDQ", "FP8Rowwise", "FP8BlockScales", "NVFP4", "W4A8NVFP4FP8", "W4A8MXFP4FP8")
_CONFIG = (
    *("resolve_moe_backend", "_build_modelopt_quant_config", "load_hf_quant_config", "override_quant_algo"),
    *("get_mxfp4_quant_algo", "from_pretrained", "_read_safetensors_header", "_get_safetensors_header_for_tensor"),
)
_MODEL = (
    *("_checkpoint_has_lm_head_scale", "_resolve_lm_head_quant_config", "apply_layerwise_quant_config"),
    *("apply_quant_config_exclude_modules", "__post_init__", "config"),
)
_MOE = "_torch/modules/fused_moe"
BASES = {
    "ModelConfig": "Given",
    "DecoderModelForCausalLM": "Module",
    "CutlassFusedMoE": "MoE",
}  # of classes taken in part
LATER = ("has_mxfp8",)  # questions of a mode that its experts ask, and that earlier modes do not know
# File -> its definitions; of a class that is taken in part, the methods.
TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "quantization/mode.py": dict.fromkeys(
        ("QuantAlgo", "QUANT_ALGO_LIST", "KV_CACHE_QUANT_ALGO_LIST", "QuantMode"), ()
    ),
    "quantization/modelopt_config.py": dict.fromkeys(
        (
            *("is_modelopt_quant_config", "_KV_SCHEME_DICT_MAP", "_KV_SCHEME_STRING_ALGOS", "_QUANT_ALGO_ALIASES"),
            *(
                "canonicalize_quant_algo",
                "_canonicalize_algos",
                "_kv_cache_scheme_to_algo",
                "read_modelopt_quant_config",
            ),
            "warn_if_inline_diverges",
        ),
        (),
    ),
    "models/modeling_utils.py": {"QuantConfig": ()},
    "_torch/model_config.py": {"ModelConfig": _CONFIG, "_mirror_text_subconfig_attrs": ()},
    "_torch/modules/linear.py": dict.fromkeys(
        (
            *("WeightMode", "WeightsLoadingConfig", "TensorParallelMode", "load_weight_shard", "copy_weight"),
            *("copy_weight_shard", "load_weights_vanilla_helper", "load_weights_fused_qkv_helper"),
            *("load_weights_fused_gate_up_helper", "get_weight_dtype_and_id", "get_quant_method", "LinearMethodBase"),
            *(f"{name}LinearMethod" for name in METHODS[1:]),
            *("W4A16_AWQ_LinearMethod", "W4A8_AWQ_LinearMethod", "Linear"),
        ),
        (),
    ),
    "_torch/models/modeling_utils.py": {"DecoderModelForCausalLM": _MODEL, "_load_weights_impl_v2": ()},
    "_torch/models/checkpoints/base_weight_mapper.py": {"BaseWeightMapper": ()},
    "_torch/models/checkpoints/hf/weight_mapper.py": {"HfWeightMapper": ()},
    "_torch/models/checkpoints/hf/qwen2_moe_weight_mapper.py": {
        "_unfuse_moe_expert_weights": (),
        "Qwen2MoeHfWeightMapper": (),
    },
    f"{_MOE}/quantization.py": dict.fromkeys(
        (
            *("FUSED_MOE_NVFP4_WEIGHT_DTYPE", "FUSED_MOE_NVFP4_WEIGHT_BLOCK_SCALE_DTYPE", "EplbSupportStatus"),
            *(f"FusedMoEQuantScales{name}" for name in ("FP8", "DeepSeekFP8BlockScales", "NVFP4")),
            *(f"load_expert_fc{name}_input_scale_fp8_qdq" for name in ("31", "2")),
            *("load_activation_scales_fp8_qdq", "requantize_expert_w3_w1_weight_fp8_qdq", "FusedMoEMethodBase"),
            *(f"{name}FusedMoEMethod" for name in ("Unquantized", "FP8QDQ", "DeepSeekFP8BlockScales", "NVFP4")),
            "NVFP4CutlassFusedMoEMethod",
        ),
        (),
    ),
    f"{_MOE}/fused_moe_cutlass.py": {"CutlassFusedMoE": ("_get_quant_method",)},
}


class Names(enum.StrEnum):
    """A string whose `auto()` is its name as it is, as of the package StrEnum; of Python's own it has small letters."""

    @staticmethod
    def _generate_next_value_(name: str, *rest: object) -> str:
        return name


class Later(enum.EnumMeta):
    """Of a name that these sources do not have yet, the name: their files may be of several commits."""

    def __getattr__(cls, name: str) -> str:
        if name.isupper():
            return name
        raise AttributeError(name)


class Modes(enum.Enum):
    """How experts lie in a checkpoint."""

    VANILLA = 0
    FUSED_GATE_UP_PROJ = 1
    W4A8_CUSTOM = 2


class Strict(pydantic.BaseModel):
    """A config that has no other fields."""

    model_config = pydantic.ConfigDict(extra="forbid")


class Given:
    """An object with the attributes that it is made with."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Alone(Given):
    """One rank of `tp_size`."""

    tp_size = 1
    tp_rank = 0
    enable_attention_dp = False


class Torch(ModuleType):
    """torch, where a GPU is the CPU, new memory is full of one byte, and the kernels that order scales only pad them."""

    byte = 0

    ops = SimpleNamespace(trtllm=SimpleNamespace(block_scale_interleave=lambda scales: padded(scales)))
    cuda = SimpleNamespace(set_device=lambda number: None, is_available=lambda: False, synchronize=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu")

    def empty(self, *sizes: Any, device: object = None, **named: Any) -> torch.Tensor:
        made = torch.empty(*sizes, **named)
        made.view(-1).view(torch.uint8).fill_(self.byte)
        return made


def padded(scales: torch.Tensor) -> torch.Tensor:
    """Scales [rows, columns] as one row, with rows filled up to 128 and columns to 4."""
    rows, columns = -scales.shape[-2] % 128, -scales.shape[-1] % 4
    return torch.nn.functional.pad(scales, (0, columns, 0, rows)).reshape(*scales.shape[:-2], -1)


def silent(*said: object, **named: object) -> None:
    """A log that nobody reads."""


def stand_ins() -> dict[str, Any]:
    """What the definitions find in their modules, beside one another."""
    torch.Tensor.cuda = lambda self: self
    moves = torch.Tensor.to
    torch.Tensor.to = lambda tensor, *given, **named: moves(tensor, *given, **staying(named))
    owners = {name: type(name, (torch.nn.Module,), {}) for name in ("MoE", "VanillaMoE", "Attention")}
    fp4 = {
        "float4_e2m1x2": torch.uint8,
        "float4_sf_dtype": torch.uint8,
        "pad_up": lambda size, to: -(-size // to) * to,
        "shuffle_matrix_a": lambda weight, *rest: weight,
        "shuffle_matrix_sf_a": lambda scales, *rest: padded(scales),
    }
    modules = {one.__name__: one for one in (enum, fnmatch, inspect, json, math, os, re, struct, transformers)}
    python = {one.__name__: one for one in (ABC, Path, enum.Enum, enum.IntFlag, cached_property, dataclass)}
    types = {name: getattr(typing, name) for name in typing.__all__} | {"TConfig": Any, "Callable": Callable}
    torches = {"torch": Torch("torch"), "nn": torch.nn, "Parameter": torch.nn.Parameter, "Module": torch.nn.Module}
    configs = {"StrictBaseModel": Strict, "Field": pydantic.Field, "load_pretrained_config": described}
    enums = {"StrEnum": Names, "BaseEnumMeta": Later, "auto": enum.auto, "MoEWeightLoadingMode": Modes}
    objects = {"Mapping": Alone, "Given": Given, "fp4_utils": SimpleNamespace(**fp4), **fp4, "LoraLayer": None}
    objects |= {"AllReduceStrategy": SimpleNamespace(AUTO=None), "_DEEPSEEK_V4_ARCHITECTURES": ()}
    objects |= {
        "logger": SimpleNamespace(**dict.fromkeys(("info", "warning", "warning_once", "debug", "error"), silent))
    }
    machine = {"mpi_disabled": True, "is_device_integrated": False, "local_mpi_rank": 0, "get_sm_version": 90}
    machine |= {"is_sm_100f": False, "get_model_extra_attrs": None}
    does = {
        "QuantModeWrapper": lambda modes: modes[0],
        "config_file_lock": nullcontext,
        "is_moe_weight_owner": lambda module: isinstance(module, owners["MoE"]),
        "preprocess_weights_for_mixed_gemm": lambda weight, *kinds: weight,
        "register_mapper": lambda *names: lambda kind: kind,
        "silent": silent,
        "tqdm": lambda items, **named: items,
    }
    told = {name: lambda said=said: said for name, said in machine.items()}
    return modules | python | types | torches | configs | enums | objects | owners | told | does


def staying(named: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Tensor.to`, without a move to a GPU."""
    return {name: one for name, one in named.items() if (name, one) != ("device", "cuda")}


def described(folder: str, **rest: Any) -> transformers.PretrainedConfig:
    """config.json, as transformers reads it."""
    return transformers.AutoConfig.from_pretrained(folder)


def noted(copies: Callable, converted: list[str]) -> Callable:
    """One of its two functions that copy into a parameter, which notes where they take codes for numbers."""

    def copied(into: torch.Tensor, from_: torch.Tensor, *where: int) -> None:
        if from_.dtype != into.dtype and torch.float8_e4m3fn in (from_.dtype, into.dtype):
            converted.append(f"{from_.dtype} as {into.dtype}")
        copies(into, from_, *where)

    return copied


def sources() -> Path:
    """The folder with TensorRT-LLM's files; FileNotFoundError without one."""
    root = Path(os.environ.get(FOLDER, "")) / "tensorrt_llm"
    if FOLDER not in os.environ or not root.is_dir():
        raise FileNotFoundError(f"{FOLDER} must name a folder with TensorRT-LLM's sources (CONTRIBUTING.md)")
    return root


def algorithms() -> set[str]:
    """The names that its QuantAlgo has."""
    modes = ast.parse((sources() / "quantization/mode.py").read_text())
    (known,) = (node for node in modes.body if of(node) == "QuantAlgo")
    return {of(node) for node in ast.walk(known) if isinstance(node, ast.Assign)}


def taken() -> ModuleType:
    """TensorRT-LLM's own definitions, in one module, whose list `converted` grows while something is loaded.

    Raises FileNotFoundError without its sources, LookupError where they have other names.
    """
    root = sources()
    name = "tensorrt_llm._torch.modules.taken"
    home = ModuleType(name)
    home.__package__ = name.rpartition(".")[0]
    sys.modules |= {name: home} | {
        ".".join(name.split(".")[:count]): ModuleType("parent") for count in range(1, name.count(".") + 1)
    }
    for inside in ("_torch.distributed", "_torch.models.checkpoints.base_weight_loader"):
        sys.modules[f"tensorrt_llm.{inside}"] = SimpleNamespace(AllReduce=Given, ConsumableWeightsDict=Given)
    vars(home).update(stand_ins())
    for file, wanted in TAKEN.items():
        tree = ast.parse((root / file).read_text())
        found = {of(node): node for node in tree.body}
        if lacking := sorted(set(wanted) - set(found)):
            raise LookupError(f"{file} of these sources has no {', '.join(lacking)}")
        body = [reduced(found[one], methods) for one, methods in wanted.items()]
        program = compile(
            ast.fix_missing_locations(ast.Module(body, [])), str(root / file), "exec", flags=1 << 24, dont_inherit=True
        )  # the flag is that of `from __future__ import annotations`
        exec(program, vars(home))
    home.converted = []
    for flag in LATER:
        if not hasattr(home.QuantMode, flag):
            setattr(home.QuantMode, flag, lambda mode: False)
    for copies in ("copy_weight", "copy_weight_shard"):
        setattr(home, copies, noted(getattr(home, copies), home.converted))
    return home


def of(node: ast.stmt) -> str:
    """The name that a statement defines; '' for none."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return node.name if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""


def reduced(node: ast.stmt, methods: tuple[str, ...]) -> ast.stmt:
    """A class with these methods alone, which inherits no other part; anything else as it is."""
    if not methods:
        return node
    assert isinstance(node, ast.ClassDef)
    body = [one for one in node.body if of(one) in methods]
    return ast.ClassDef(node.name, [ast.Name(BASES[node.name], ast.Load())], [], body, [], type_params=[])
