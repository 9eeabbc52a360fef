"""Checkpoints loaded by a real vLLM on a CPU, with its check for missing weights switched on; a JSON line about each.

    python -m tests.engines.vllm_loading [--generate] CHECKPOINT...

What judges a checkpoint (configs, names, shapes, fused loading, scales) is vLLM's own. Replaced is arithmetic that the CPU
build does not have: products of quantized linears are emulated, and kernels of quantized experts are not chosen, so that
those are loaded and not run.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
HOW = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 64,
    "model_loader_extra_config": {"enable_weights_track": True},
}
PROMPT = [1, 5, 9, 77, 200, 31, 400, 8]


class Heard(logging.Handler):
    """The warnings of vLLM."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def emulate() -> None:
    """Give the CPU the linear kernels that it lacks, in plain torch."""
    import torch
    import vllm._custom_ops as ops
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.platforms import PlatformEnum

    def scaled_fp8_quant(
        input: torch.Tensor, scale: torch.Tensor | None = None, *rest: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = input.float()
        if scale is None:
            by_token = named.get("use_per_token_if_dynamic", False)
            largest = values.abs().amax(-1, keepdim=True) if by_token else values.abs().amax().reshape(1)
            scale = largest.clamp(min=1e-12) / 448
        return (values / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    class InBlocks(Fp8BlockScaledMMLinearKernel):
        """Weights in blocks of 128 x 128, multiplied out; inputs as they are."""

        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(
            self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor, **named: object
        ) -> torch.Tensor:
            scales = Bs.float().repeat_interleave(128, 0)[: B.shape[0]].repeat_interleave(128, 1)[:, : B.shape[1]]
            return A @ (B.float() * scales).to(A.dtype).T

    ops.scaled_fp8_quant = scaled_fp8_quant
    fused_act_quant._FUSED_ACT_QUANT.clear()
    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    linear.register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(InBlocks)


def without_kernels() -> None:
    """Quantized experts, and linears with weights alone in four bits, are built and loaded, and never run."""
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
    from vllm.model_executor.layers.quantization import fp8, modelopt

    backends = {"fp8": Fp8MoeBackend.TRITON, "nvfp4": NvFp4MoeBackend.MARLIN}

    def stub(module: ModuleType, kind: str) -> None:
        setattr(module, f"select_{kind}_moe_backend", lambda **named: (backends[kind], None))

    stub(fp8, "fp8")
    stub(modelopt, "fp8")
    stub(modelopt, "nvfp4")
    MarlinNvFp4LinearKernel.is_supported = classmethod(lambda cls, *rest: (True, None))
    MarlinNvFp4LinearKernel.process_weights_after_loading = lambda self, layer: None
    for method in (fp8.Fp8MoEMethod, modelopt.ModelOptFp8MoEMethod, modelopt.ModelOptNvFp4FusedMoE):
        method.process_weights_after_loading = lambda self, layer: None


@contextmanager
def heard() -> Iterator[list[str]]:
    """What vLLM warns of within."""
    import vllm.logger

    handler = Heard()
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    vllm.logger._print_warning_once.cache_clear()
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)


def loaded(folder: Path) -> None:
    """Build the model of a checkpoint, load its weights and make them ready. Raises what vLLM raises."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(model=str(folder), **HOW).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        if not torch.distributed.is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{mkdtemp()}/store", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        try:
            model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        finally:
            parallel_state.destroy_model_parallel()


def generated(folder: Path) -> list[int]:
    """Eight greedy tokens, and that their probabilities are numbers."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(folder), max_num_seqs=2, **HOW)
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, detokenize=False, ignore_eos=True)
    answer = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
    assert all(step[token].logprob > -1e9 for token, step in zip(answer.token_ids, answer.logprobs, strict=True))
    return list(answer.token_ids)


def tried(folder: Path, generate: bool) -> dict:
    """What became of a checkpoint: `tokens`, or an `error`, and what vLLM warned of."""
    with heard() as warned:
        try:
            tokens = generated(folder) if generate else loaded(folder)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
            return {"folder": str(folder), "error": f"{type(error).__name__}: {error}", "warned": warned}
    return {"folder": str(folder), "tokens": tokens, "error": None, "warned": warned}


def main() -> int:
    """Try every checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", action="store_true", help="also generate: experts must not be quantized")
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    emulate()
    if not arguments.generate:
        without_kernels()
    for folder in arguments.folders:
        sys.stdout.write(json.dumps(tried(folder, arguments.generate)) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os.environ |= SETTINGS
    sys.exit(main())
