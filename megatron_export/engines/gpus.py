"""NVIDIA's GPUs and their compute capabilities, which engines compare. Source: developer.nvidia.com/cuda-gpus."""

BLACKWELL = 100
_MADE = {
    75: ("t4",),
    80: ("a100",),
    86: ("a10",),
    89: ("l4", "l40s", "rtx4090"),
    90: ("h100", "h200", "gh200"),
    BLACKWELL: ("b200", "gb200"),
    103: ("b300",),
    120: ("rtx5090", "rtxpro6000"),
}
GPUS = {gpu: capability for capability, gpus in _MADE.items() for gpu in gpus}  # name -> compute capability, times ten
