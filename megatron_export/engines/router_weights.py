"""Where vLLM multiplies by Llama 4's router weights twice, and computes nonsense."""

from .checkpoint_view import CheckpointView
from .gpus import BLACKWELL, GPUS
from .quant_configs import AlgorithmOf
from .verdict import Findings

_FLASHINFER_CUTLASS = (90, 120)  # where experts go to its CUTLASS kernels, if they can compute them


def check_router_weights(
    checkpoint: CheckpointView, algorithm_of: AlgorithmOf, gpu: str | None, findings: Findings
) -> None:
    """Llama 4 multiplies experts' inputs by router weights: vLLM does so before it calls a kernel, and some kernels do it again."""
    experts = (group for group in checkpoint.indexed.groups if group.kind in ("experts", "stack") and group.quantized)
    first = next(experts, None)
    if first is None or not checkpoint.architecture.startswith("Llama4"):
        return
    algorithm = algorithm_of(first)
    twice = "multiplies by router weights twice"
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        way = "--format fp8, or serve it with --moe-backend emulation, which is slow"
        if gpu is None:
            why = f"its experts, on B200 or B300; elsewhere Marlin or FlashInfer {twice}"
            findings.add("router kernel", why, way=way)
        elif GPUS[gpu] < BLACKWELL:
            findings.add("router", f"on {gpu} Marlin computes its experts, and {twice}", way=way)
        elif GPUS[gpu] in _FLASHINFER_CUTLASS:
            findings.add("router kernel", f"its experts with FlashInfer, which on {gpu} {twice}", way=way)
    elif algorithm == "FP8" and (gpu is None or GPUS[gpu] in _FLASHINFER_CUTLASS):
        findings.add("router kernel", f"its experts; FlashInfer, where it is there, {twice} on Hopper and RTX GPUs",
                     way="serve it with --moe-backend triton")  # fmt: skip
