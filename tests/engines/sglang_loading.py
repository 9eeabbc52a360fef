"""Checkpoints loaded by a real SGLang on a CPU, each twice: into memory of zeros and into memory of ones; a JSON line about each.

    python -m tests.engines.sglang_loading CHECKPOINT...

What differs between the two was never loaded, whatever SGLang says of it; codes that were copied into a weight of numbers are
counted too. Configs, construction of models, names, shapes, joined
loading and the split of latent projections are SGLang's own, and are those of a GPU: its branches for CPUs are switched off.
Nothing is computed: its kernels are not installed, packages that only they need are empty, and weights are not made ready for them;
KV caches are.
"""

import importlib
import json
import logging
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..support.ranks import free_port

if TYPE_CHECKING:
    import torch

SETTINGS = {"SGLANG_USE_CPU_ENGINE": "1", "TOKENIZERS_PARALLELISM": "false"}
HOW = {
    "device": "cpu",
    "mamba_radix_cache_strategy": "no_buffer",  # of models with linear attention or Mamba
    "disable_overlap_schedule": True,
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "moe_runner_backend": "marlin",  # what it takes on Hopper for experts in four bits; others are loaded alike
}
EMPTY = ("IPython", "gguf", "sgl_kernel", "tvm_ffi")
OPERATORS = (  # that Qwen 3.5 asks for while it is imported where there is no GPU
    *("fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu"),
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
DERIVED = ("blockscale_swizzled",)  # made of what was loaded, later
DEFAULTS = ("k_scale", "v_scale", "pre_quant_scale")  # are 1 where a checkpoint has none; the first two begin as -1


class Anything(type):
    """A class that has every attribute, and whose instances are such classes; as a decorator it changes nothing."""

    def __getattr__(cls, name: str) -> "Anything":
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __call__(cls, *given: Any, **named: Any) -> Any:
        return given[0] if len(given) == 1 and callable(given[0]) else Anything(cls.__name__, (), {})


class Package(ModuleType):
    """A package that has every name."""

    __path__ = []

    def __getattr__(self, name: str) -> Anything:
        return getattr(Anything("", (), {}), name)


class Empty(MetaPathFinder, Loader):
    """Imports packages that are not there."""

    def find_spec(self, name: str, *rest: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in EMPTY else None

    def create_module(self, spec: ModuleSpec) -> Package:
        return Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def imported() -> None:
    """Import SGLang and its models, without its kernels, and have them take the way of a GPU."""
    sys.meta_path.append(Empty())
    import torch

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor values) -> Tensor")
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and "rotary" not in name and "_is_cpu" in vars(module):
            module._is_cpu = False
    importlib.import_module("torch").cuda.get_device_capability = lambda *given: (
        9,
        0,
    )  # asked of before sparse attention
    factory.get_rope_cpu = lambda *given: factory.get_rope(*given[:-1])  # which wants scaled rotations


def started(folder: Path) -> Any:
    """SGLang's settings for a checkpoint in force, on one rank; its own description of the model."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path=str(folder), **HOW)
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    config = ModelConfig.from_server_args(arguments)
    if not importlib.import_module("torch").distributed.is_initialized():
        bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=free_port())
    bootstrap.init_layer_runtime(model_config=config)
    return config


def loaded(config: Any, byte: int) -> tuple[dict[str, "torch.Tensor"], int, bool]:
    """The bytes of all parameters, loaded into memory that is full of one; how many copies took codes for numbers; whether there
    were KV scales. Raises what SGLang raises."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.model_loader import loader
    from torch.overrides import TorchFunctionMode

    codes = (torch.float8_e4m3fn, torch.uint8, torch.int8)
    converted: list[torch.Tensor] = []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, does: Any, kinds: Any, given: tuple = (), named: dict | None = None) -> Any:
            if does is torch.Tensor.copy_ and given[1].dtype in codes and given[0].dtype != given[1].dtype:
                converted.append(given[0])
            return does(*given, **(named or {}))

    files = loader.DefaultModelLoader(LoadConfig())
    quantization = loader._get_quantization_config(config, files.load_config)
    with loader.set_default_torch_dtype(config.dtype):
        model = loader._initialize_model(config, files.load_config, quantization)
        for name, parameter in model.named_parameters():
            if name.endswith(DEFAULTS[:2]):
                continue
            filling = torch.full((parameter.numel() * parameter.element_size(),), byte, dtype=torch.uint8)
            parameter.data.copy_(filling.view(parameter.dtype).view(parameter.shape))
        with Copies():
            files.load_weights_only(model, files._get_all_weights(config, model), torch.device("cpu"))
    for name, module in model.named_modules():
        split = getattr(module, "w_kc", None)  # of latent attention
        assert split is None or split.dtype != torch.uint8, f"{name} takes codes of four bits for numbers"
    kv = any(bool(one > 0) for name, one in model.named_parameters() if name.endswith("k_scale"))
    for module in model.modules():
        if isinstance(vars(module).get("quant_method"), BaseKVCacheMethod):
            module.quant_method.process_weights_after_loading(module)
    unread = of_inputs_as_they_are(model, quantization)
    parameters = {name: one.data for name, one in model.named_parameters() if name not in unread}
    return {name: data.contiguous().view(-1).view(torch.uint8) for name, data in parameters.items()}, len(converted), kv


def of_inputs_as_they_are(model: Any, quantization: Any) -> set[str]:
    """Input scales of weights in four bits alone (W4A16_NVFP4): registered, and deleted (linears) or set to 1 (experts)."""
    from sglang.srt.layers.quantization import modelopt_quant

    alone = None
    if isinstance(quantization, modelopt_quant.ModelOptMixedPrecisionConfig):
        alone = quantization.nvfp4a16_config
    elif isinstance(quantization, modelopt_quant.ModelOptFp4Config) and quantization.is_w4a16:
        alone = quantization
    methods = (modelopt_quant.ModelOptNvFp4A16LinearMethod, modelopt_quant.ModelOptNvFp4FusedMoEMethod)
    return {
        f"{name}.{suffix}"
        for name, module in model.named_modules()
        for method in [vars(module).get("quant_method")]
        if isinstance(method, methods) and method.quant_config is alone
        for suffix, _ in module.named_parameters(recurse=False)
        if suffix.endswith("input_scale")
    }


def tried(folder: Path) -> dict:
    """What became of a checkpoint: an `error`, parameters that were not filled (`lacking`), how many took codes for numbers
    (`converted`), whether KV scales were filled (`kv`)."""
    said = {"folder": str(folder), "error": None, "lacking": [], "converted": 0, "kv": False}
    try:
        config = started(folder)
        (zeros, converted, kv), (ones, *_) = loaded(config, 0), loaded(config, 255)
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
        return said | {"error": f"{type(error).__name__}: {error}"}
    unequal = [name for name in zeros if not zeros[name].equal(ones[name])]
    lacking = [name for name in unequal if not name.endswith(DERIVED + DEFAULTS)]
    return said | {"lacking": lacking, "converted": converted, "kv": kv}


def main(folders: list[str]) -> None:
    """Try every checkpoint."""
    imported()
    for folder in folders:
        print(json.dumps(tried(Path(folder))), flush=True)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    os.environ |= SETTINGS
    main(sys.argv[1:])
