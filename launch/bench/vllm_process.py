"""One checkpoint in a real vLLM, in a process of its own: what vLLM is given, and what is replaced where it has no GPU.

    python launch/bench/vllm_process.py < request > answer

The request is a JSON object with the arguments of `served`; the answer is the last line that is printed, after MARK. What judges
a checkpoint (configs, names, shapes, fused loading, scales) is vLLM's own, and so are its kernels on a GPU. vLLM's CPU build
lacks those of quantized linears; there they are emulated. Imports nothing of this repository.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MARK = "ANSWER "
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
HOW = {
    "skip_tokenizer_init": True,
    "dtype": "bfloat16",
    "enforce_eager": True,
    # vLLM does not notice weights that are missing from a quantized checkpoint unless told to.
    "model_loader_extra_config": {"enable_weights_track": True},
}
GPU = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 29}  # not measured: others may share the GPU
SHORT = 64  # tokens that fit into an engine that is given no windows
PROMPT = [1, 5, 9, 77, 200, 31, 400, 8]
TOKENS = 8
# Warnings that a good checkpoint gets too: vLLM keeps KV scales in bfloat16, and nothing calibrates queries.
USUAL = (
    "with dtype torch.float32 into parameter with dtype torch.bfloat16",
    "q scaling factor",
    "uncalibrated q_scale",
)


class Heard(logging.Handler):
    """The warnings of vLLM, and which kernels it says that it takes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warned: list[str] = []
        self.chose: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.warned.append(text)
        elif text.startswith(("Using ", "Selected ")) and ("ernel" in text or "ackend" in text):
            self.chose.append(text)


def of_scales(warned: list[str]) -> list[str]:
    """Those warnings that tell of scales which were not found, or not taken as they are."""
    return [text for text in warned if "scal" in text.lower() and not any(usual in text for usual in USUAL)]


@contextmanager
def heard() -> Iterator[Heard]:
    """What vLLM says within."""
    import vllm.logger

    handler = Heard()
    logger = logging.getLogger("vllm")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    for said in ("_print_info_once", "_print_warning_once"):
        getattr(vllm.logger, said).cache_clear()
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def emulate_on_cpu() -> None:
    """`emulate`, in a process that has no GPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        emulate()


def emulate() -> None:
    """Give the CPU the linear kernels that it lacks, and a rotation of neighbouring pairs, which vLLM 0.32 gets wrong for views."""
    import torch
    import vllm._custom_ops as ops
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
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

    rotated = RotaryEmbedding.forward_cpu

    def forward_cpu(self: RotaryEmbedding, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (rotated if self.is_neox_style else RotaryEmbedding.forward_native)(self, *tensors)

    RotaryEmbedding.forward_cpu = forward_cpu
    ops.scaled_fp8_quant = scaled_fp8_quant
    fused_act_quant._FUSED_ACT_QUANT.clear()
    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    linear.register_linear_kernel(EmulationMxfp8LinearKernel, PlatformEnum.CPU, "mxfp8")
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(InBlocks)


def expect_no_input_scales() -> None:
    """The check for missing weights asks for an input_scale of W4A16_NVFP4 too, which vLLM drops where it is there."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    check = DefaultModelLoader.track_weights_loading
    dropping = getattr(modelopt, "_DROP_INPUT_SCALE", None)  # since 0.32

    def of_inputs(module: Any) -> bool:
        method = getattr(module, "quant_method", None)
        return getattr(method, "use_a16", False) or (dropping is not None and getattr(method, "fmt", None) is dropping)

    def track(self: Any, model: Any, loaded: set[str] | None, *rest: Any, **named: Any) -> None:
        modules = {name: module for name, module in model.named_modules() if of_inputs(module)}
        scales = {f"{name}.{suffix}" for name, module in modules.items() for suffix, _ in module.named_parameters()
                  if suffix.endswith("input_scale")}  # fmt: skip
        check(self, model, None if loaded is None else loaded | scales, *rest, **named)

    DefaultModelLoader.track_weights_loading = track


def served(folder: str, windows: list[list[int]], attention: str | None = None, tp: int = 1) -> dict[str, Any]:
    """What becomes of a checkpoint.

    windows    ids of a text in rows of one length; may be empty
    attention  a backend of vLLM's by its name, in place of the one that it would take
    tp         how many GPUs share each layer; what vLLM says in their processes, with more than one, is not heard

    Returns `version` and `device`; `tokens`, the first greedy ones after PROMPT; `losses`, the mean negative log-likelihood of
    each window's tokens after its first; `error` in place of these two; `warned` and `chose`, what vLLM said.
    """
    import vllm
    from vllm.platforms import current_platform

    gpu = not current_platform.is_cpu()
    emulate_on_cpu()
    expect_no_input_scales()
    device = current_platform.get_device_name() if gpu else "CPU, emulated"
    answer: dict[str, Any] = {"version": vllm.__version__, "device": device, "error": None}
    with heard() as said:
        try:
            how = {"attention_config": {"backend": attention}} if attention else {}
            answer |= asked(folder, windows, (GPU if gpu else {}) | how | {"tensor_parallel_size": tp})
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its verdict
            answer["error"] = f"{type(error).__name__}: {error}"
    return answer | {"warned": list(dict.fromkeys(said.warned)), "chose": list(dict.fromkeys(said.chose))}


def asked(folder: str, windows: list[list[int]], how: dict[str, Any]) -> dict[str, list]:
    """Start vLLM on a checkpoint; its first `tokens` and the `losses` of the windows. Raises what vLLM raises."""
    from vllm import LLM, SamplingParams

    length = len(windows[0]) + 1 if windows else SHORT
    llm = LLM(model=folder, max_model_len=length, max_num_seqs=64, language_model_only=True, **HOW, **how)
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, detokenize=False, ignore_eos=True)
    [answer] = llm.generate([{"prompt_token_ids": PROMPT}], greedy, use_tqdm=False)
    tokens, steps = list(answer.outputs[0].token_ids), answer.outputs[0].logprobs
    if not all(step[token].logprob > -1e9 for token, step in zip(tokens, steps, strict=True)):  # NaN is not greater
        raise ArithmeticError(f"the tokens {tokens} have probabilities that are no numbers")
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": row} for row in windows], scored, use_tqdm=False)
    losses = [_loss(row, one.prompt_logprobs) for row, one in zip(windows, answers, strict=True)]
    return {"tokens": tokens, "losses": losses}


def _loss(row: list[int], steps: list) -> float:
    """Of one window: nothing predicts its first token."""
    found = [step[token].logprob for token, step in zip(row[1:], steps[1:], strict=True)]
    return -sum(found) / len(found)


def main() -> None:
    """Answer one request."""
    os.environ |= SETTINGS
    answer = served(**json.loads(sys.stdin.read()))
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    os._exit(0)  # what an engine leaves running is not waited for


if __name__ == "__mp_main__":  # a process that vLLM has started, for one of several ranks
    emulate_on_cpu()
if __name__ == "__main__":
    main()
