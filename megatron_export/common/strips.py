"""Strips of rows: how many weights are encoded at a time, so that float32 copies stay small."""

from collections.abc import Iterator

from torch import Tensor

STRIP_ELEMENTS = 1 << 20


CUDA_STRIP_ELEMENTS = 1 << 22


def row_strips(weight: Tensor, rows: int) -> Iterator[slice]:
    """Slices of a `[out, in]` weight, in whole tiles of `rows` rows, of at most so many elements as a strip has on its device.

    Float32 copies of one strip stay small. On the CPU they stay in its cache, and glibc keeps their memory when they are freed,
    which takes longer to get anew than to fill; a GPU wants more work at a time.
    """
    step = max(strip_elements(weight.device.type) // weight.shape[1] // rows, 1) * rows
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def strip_elements(device: str) -> int:
    """How many weights are encoded at a time on a "cpu" or a "cuda" device."""
    return CUDA_STRIP_ELEMENTS if device == "cuda" else STRIP_ELEMENTS
