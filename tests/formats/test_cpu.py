"""What is done by numpy and Arrow on a CPU is what torch does there."""

import time

import pytest
import torch

from megatron_export import formats
from megatron_export.common import threads
from megatron_export.common.piece import Amax
from megatron_export.formats import cpu, cpu_kernels, fp8

EVERY = (
    torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
)  # bfloat16 numbers, and NaN and Inf
FINITE = EVERY[EVERY.isfinite()]


@pytest.mark.parametrize("amax", [0.0, 1e-30, 0.0173, 1.0, 448.0, 3e38])
def test_fp8_codes_from_a_table_are_those_of_two_roundings(amax: float) -> None:
    scale = fp8.scale_of(torch.tensor(amax))
    weight = torch.cat([FINITE, FINITE.flip(0)]).view(2, -1)
    given, form = Amax(torch.tensor(amax), scale), formats.chosen("fp8")
    assert cpu_kernels.kernel_of(form, weight) is cpu_kernels.encode_fp8
    rounded = (weight.float() / scale).to(torch.bfloat16).clamp(-448, 448).to(torch.float8_e4m3fn)
    for found in (fp8.encode(weight, given), formats.encode(form, weight, given)):
        assert torch.equal(found["weight"].data.float(), rounded.float())
    turned = weight.T.contiguous().T  # in another order in memory
    assert torch.equal(formats.encode(form, turned, given)["weight"].data.float(), rounded.float())


def test_no_table_is_made_where_it_would_take_longer_or_could_not_serve() -> None:
    form, large = formats.chosen("fp8"), torch.zeros(256, 256, dtype=torch.bfloat16)
    assert cpu_kernels.kernel_of(form, large)
    for weight in (large[:128], large.float(), large.to("meta")):
        assert cpu_kernels.kernel_of(form, weight) is None
    assert cpu_kernels.kernel_of(formats.chosen("nvfp4"), large) is None


def test_bounds_are_counted_as_torch_compares() -> None:
    values = torch.cat([FINITE.float(), FINITE.float().nextafter(torch.tensor(0.0))])
    bounds, at = (0.25, 2.5, -1.0), (0.75, 3.5)
    expected = sum((values > one).to(torch.uint8) for one in bounds) + sum(
        (values >= one).to(torch.uint8) for one in at
    )
    assert torch.equal(cpu.above(values, bounds, at), expected)
    assert torch.equal(cpu.below_zero(values), (values < 0).to(torch.uint8))


def test_what_differs_is_found_as_torch_compares() -> None:
    """NaN differs from itself, and a zero not from a negative one."""
    one, other = EVERY.float(), EVERY.float().roll(3)
    other[:100], other[0x8000] = one[:100], 0.0
    found = cpu.unequal(one, other)
    assert torch.equal(found, one != other)
    assert int(cpu.count(found)) == int((one != other).sum()) < len(EVERY) - 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_of_a_block_is_its_amax(dtype: torch.dtype) -> None:
    blocks = FINITE[torch.randperm(len(FINITE), generator=torch.Generator().manual_seed(0))][: 4000 * 16].view(
        40, 100, 16
    )
    assert torch.equal(cpu.largest(blocks.to(dtype)), blocks.float().abs().amax(-1))


def amax_of(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, from strips of one number."""
    largest = cpu.Largest(values)
    return largest.total([largest.of_strip(slice(n, n + 1)) for n in range(len(values))])


@pytest.mark.parametrize(
    "numbers", [[-3.0, 2.0], [3.0, -2.0], [-3.0], [2.0], [-0.0], [1.0, float("inf")], [float("-inf"), 1.0]]
)
def test_the_largest_magnitude_is_found_whatever_the_signs(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    assert torch.equal(amax_of(values.to(torch.bfloat16)), values.abs().amax())
    assert torch.equal(amax_of(values), values.abs().amax())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_number_that_is_none_stays_visible(dtype: torch.dtype, sign: float) -> None:
    values = torch.tensor([1.0, torch.nan, -2.0]).copysign(torch.tensor(sign)).to(dtype)
    assert amax_of(values).isnan()


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int4_awq", "fp8_pb"])
def test_strips_side_by_side_make_the_same_bytes_and_leave_torchs_threads(name: str) -> None:
    weight = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    form, amax = formats.chosen(name), Amax(weight.abs().amax().float(), torch.tensor(3.0))
    whole = form.encode(weight, amax)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with threads.side_by_side(weight.device):
            found = formats.encode(form, torch.nn.Parameter(weight), amax)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found.keys() == whole.keys()
    for suffix, piece in whole.items():
        assert torch.equal(found[suffix].data.float(), piece.data.float()), suffix


def test_what_one_strip_raises_is_raised() -> None:
    def work(number: int) -> int:
        return 1 // (3 - number)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads.side_by_side(torch.device("cpu")):
            assert threads.each(work, [0, 1, 2]) == [0, 0, 1]
            with pytest.raises(ZeroDivisionError):
                threads.each(work, range(9))
            assert threads.each(lambda _: torch.get_num_threads(), range(9)) == [1] * 9
            assert threads.each(lambda _: torch.get_num_threads(), range(9), most=1) == [2] * 9
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_begun_is_done_when_the_gathering_ends() -> None:
    weights = [torch.randn(700, 1024, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in range(3)]
    form, amax = formats.chosen("fp8"), Amax(torch.tensor(5.0), torch.tensor(3.0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with threads.side_by_side(torch.device("cpu")), torch.inference_mode():
            with threads.gathered():
                found = [formats.encode(form, weight, amax) for weight in weights]
                squares = threads.begin(lambda number: number**2, range(100))
                assert threads.each(lambda number: number + 1, range(9)) == list(range(1, 10))
            assert squares == [number**2 for number in range(100)]
        with threads.gathered():  # without threads, at once
            assert threads.begin(lambda number: number**2, range(3)) == [0, 1, 4]
    finally:
        torch.set_num_threads(before)
    for weight, pieces in zip(weights, found, strict=True):
        assert torch.equal(pieces["weight"].data.float(), fp8.encode(weight, amax)["weight"].data.float())


@pytest.mark.parametrize("where", ["a strip", "what gathers"])
def test_what_fails_while_work_is_gathered_is_raised_after_all_have_stopped(where: str) -> None:
    running: list[int] = []

    def work(number: int) -> None:
        running.append(number)
        assert where != "a strip" or number != 5
        time.sleep(0.01)
        running.remove(number)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with threads.side_by_side(torch.device("cpu")):
            with pytest.raises(AssertionError), threads.gathered():
                threads.begin(work, range(100))
                assert where == "a strip"
            assert running == ([5] if where == "a strip" else [])
            assert threads.each(lambda number: number, range(9)) == list(range(9))  # the threads serve on
    finally:
        torch.set_num_threads(before)


def test_what_was_kept_in_inference_mode_serves_outside() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    form, amax = formats.chosen("nvfp4"), Amax(weight.abs().amax().float(), torch.tensor(3.0))
    with torch.inference_mode():
        inside = form.encode(weight, amax)["weight"].data
    assert torch.equal(form.encode(weight, amax)["weight"].data, inside)
