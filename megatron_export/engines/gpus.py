"""Which GPU can compute what: NVIDIA's compute capabilities, as engines compare them."""

GPUS = {
    "t4": 75,
    "a100": 80,
    "a10": 86,
    "l4": 89,
    "l40s": 89,
    "rtx4090": 89,
    "h100": 90,
    "h200": 90,
    "gh200": 90,
    "b200": 100,
    "gb200": 100,
    "b300": 103,
    "rtx5090": 120,
    "rtxpro6000": 120,
}
BLACKWELL = 100
