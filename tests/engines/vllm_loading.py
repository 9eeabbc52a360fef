"""Checkpoints loaded by a real vLLM on a CPU, with its check for missing weights switched on; a JSON line about each.

    python -m tests.engines.vllm_loading [--generate] CHECKPOINT...

What judges a checkpoint (configs, names, shapes, fused loading, scales) is vLLM's own. Replaced is arithmetic that the CPU
build does not have: products of quantized linears are emulated, and kernels of quantized experts are not chosen, so that
those are loaded and not run.
"""

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from launch.bench.vllm_process import HOW, SETTINGS, SHORT, asked, emulate, expect_no_input_scales, heard


def without_kernels() -> None:
    """Experts, and linears with weights alone in four bits, are built and loaded, and never run."""
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as unquantized
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.quantization import fp8, modelopt, mxfp4
    from vllm.platforms.cpu import CpuPlatform

    backend = CpuPlatform.get_attn_backend_cls  # which refuses caches that it cannot compute, since 0.33
    CpuPlatform.get_attn_backend_cls = staticmethod(
        lambda chosen, attn_selector_config, **rest: backend(
            chosen, attn_selector_config._replace(kv_cache_dtype=None), **rest
        )
    )
    checked = FusedMoEConfig.__post_init__

    def gated_or_not(self: FusedMoEConfig) -> None:
        with suppress(
            NotImplementedError
        ):  # the last thing that it asks: experts without a gate are computed on GPUs alone
            checked(self)

    FusedMoEConfig.__post_init__ = gated_or_not
    built = MLAAttention.__init__  # of sparse attention it builds and loads the same, indexers apart, which the CPU has
    MLAAttention.__init__ = lambda self, *given, **named: built(self, *given, **named | {"use_sparse": False})
    unquantized.select_unquantized_moe_backend = lambda **named: (UnquantizedMoeBackend.TRITON, None)
    fp8.select_fp8_moe_backend = modelopt.select_fp8_moe_backend = lambda **named: (Fp8MoeBackend.TRITON, None)
    modelopt.select_nvfp4_moe_backend = lambda **named: (NvFp4MoeBackend.MARLIN, None)
    mxfp4.select_mxfp4_moe_backend = lambda *rest: (Mxfp4MoeBackend.MARLIN, None)
    MarlinNvFp4LinearKernel.is_supported = classmethod(lambda cls, *rest: (True, None))
    MarlinNvFp4LinearKernel.process_weights_after_loading = lambda self, layer: None
    experts = (
        unquantized.UnquantizedFusedMoEMethod,
        fp8.Fp8MoEMethod,
        modelopt.ModelOptFp8MoEMethod,
        modelopt.ModelOptNvFp4FusedMoE,
        mxfp4.GptOssMxfp4MoEMethod,
    )
    for method in experts:
        method.process_weights_after_loading = lambda self, layer: None


def loaded(folder: Path) -> None:
    """Build the model of a checkpoint, load its weights and make them ready. Raises what vLLM raises."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        get_model_architecture,
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=str(folder), max_model_len=SHORT, **HOW).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{mkdtemp()}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        kind, _ = get_model_architecture(config.model_config)
        joined = dict(getattr(kind, "packed_modules_mapping", {}))
        try:
            model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        finally:
            parallel_state.destroy_model_parallel()
            kind.packed_modules_mapping = joined  # some models add to that of their class, which the next would find


def tried(folder: Path, generate: bool) -> dict:
    """What became of a checkpoint: `tokens`, or an `error`, and what vLLM warned of."""
    with heard() as said:
        try:
            tokens = asked(str(folder), [], {})["tokens"] if generate else loaded(folder)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
            return {"folder": str(folder), "error": f"{type(error).__name__}: {error}", "warned": said.warned}
    return {"folder": str(folder), "tokens": tokens, "error": None, "warned": said.warned}


def main() -> None:
    """Try every checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", action="store_true", help="also generate: experts must not be quantized")
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    emulate()
    expect_no_input_scales()
    if not arguments.generate:
        without_kernels()
    for folder in arguments.folders:
        print(json.dumps(tried(folder, arguments.generate)), flush=True)


if __name__ == "__main__":
    os.environ |= SETTINGS
    main()
