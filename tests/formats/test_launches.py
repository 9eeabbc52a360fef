"""No kernel runs on memory that is smaller than its tensor says, as an FP8 tensor's is: CUDA would end the process."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.common.piece import Amax
from megatron_export.formats import cuda_kernels
from megatron_export.formats.cuda_kernels import (
    encode_fp8,
    encode_fp8_pb,
    encode_int4,
    encode_nvfp4,
    encode_w4a8,
    rounded_int4,
    rounded_nvfp4,
    scaled,
    squares,
)

from ..support.quantized import Float8

ONE = torch.ones(())
FACTORS = torch.ones(256, dtype=torch.bfloat16)
KERNELS: dict[str, Callable[[Tensor], object]] = {
    "fp8": lambda weight: encode_fp8(weight, Amax(ONE, ONE)),
    "fp8_pb": lambda weight: encode_fp8_pb(weight),
    "nvfp4": lambda weight: encode_nvfp4(weight, Amax(ONE, ONE)),
    "nvfp4 mse": lambda weight: encode_nvfp4(weight, Amax(ONE, ONE), "mse"),
    "nvfp4 four_over_six": lambda weight: encode_nvfp4(weight, Amax(ONE, ONE), "four_over_six"),
    "int4": lambda weight: encode_int4(weight, Amax(ONE, ONE), 128),
    "w4a8": lambda weight: encode_w4a8(weight, Amax(ONE, ONE), 128),
    "int4 rounded": lambda weight: rounded_int4(weight, FACTORS, None, 128),
    "nvfp4 rounded": lambda weight: rounded_nvfp4(weight, FACTORS, ONE),
    "scaled": lambda weight: scaled(weight, FACTORS, 16),
    "squares": lambda weight: squares(weight.float(), weight),
    "squares of another": lambda weight: squares(weight, torch.zeros_like(weight)),
}


class Recorder:
    """Stands for all kernels: what they were launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getattr__(self, name: str) -> "Recorder":
        return self

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *arguments, **settings: self.launched.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(cuda_kernels, "kernels", lambda *file: made)
    return made


def a_weight() -> Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_launched_on_plain_tensors_in_memory(name: str, recorder: Recorder) -> None:
    KERNELS[name](a_weight())
    assert len(recorder.launched) == 1
    assert sum(isinstance(given, Tensor) for given in recorder.launched[0]) >= 3


def halved(weight: Tensor) -> Tensor:
    weight.untyped_storage().resize_(weight.nbytes // 2)
    return weight


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "squares"])  # which makes a copy of it first
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (halved, "takes 131,072 bytes of memory, and has 65,536"),
        (Float8.of, "it is a tests.support.quantized.Float8"),
        (lambda weight: weight.T, "it is not contiguous"),
    ],
    ids=["halved", "of another class", "transposed"],
)
def test_no_kernel_is_launched_on_memory_that_is_not_what_the_tensor_says(
    name: str, damage: Callable[[Tensor], Tensor], words: str, recorder: Recorder
) -> None:
    weight = damage(a_weight())
    with pytest.raises(ExportError) as refusal:
        KERNELS[name](weight)
    assert words in str(refusal.value)
    assert recorder.launched == []


def test_what_a_kernel_reads_beside_its_weight_has_its_size(recorder: Recorder) -> None:
    weight = a_weight()
    for call in (lambda: squares(weight.float(), weight[:128]), lambda: rounded_nvfp4(weight, FACTORS[:128], ONE)):
        with pytest.raises(RuntimeError):
            call()
    assert recorder.launched == []


def test_kernels_are_launched_in_one_place() -> None:
    launches = []
    for function in ast.parse(Path(cuda_kernels.__file__).read_text()).body:
        calls: list[Any] = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        launches += [function.name for call in calls if isinstance(call.func, ast.Subscript)]
    assert launches == ["launch"]
