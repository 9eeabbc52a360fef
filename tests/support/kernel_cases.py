"""Weights that bring the kernels of formats/cuda_kernels.py to their limits, and what is wrong with the results."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from megatron_export.common.piece import Amax, Piece
from megatron_export.formats import Form, Options, chosen, cuda_kernels
from megatron_export.formats.awq import SEARCHES, largest

from .models import same

FORMS = {
    "fp8": chosen("fp8"),
    "fp8_pb": chosen("fp8_pb"),
    "fp8_pb modelopt": chosen("fp8_pb", Options(fp8_pb_spelling="modelopt")),
    "nvfp4": chosen("nvfp4"),
    "w4a16_nvfp4": chosen("w4a16_nvfp4"),
    **{name: chosen(name) for name in ("fp8_pc_pt", "mxfp8", "mxfp4", "w4a8_nvfp4_fp8")},
    "int4_awq": chosen("int4_awq"),
    "int4_awq 64": chosen("int4_awq", Options(group_size=64)),
    "w4a8_awq": chosen("w4a8_awq"),
}
SEARCHED = {f"nvfp4 {scales}": chosen("nvfp4", Options(nvfp4_scales=scales)) for scales in ("mse", "four_over_six")}
Case = tuple[str, Form, Tensor, Amax]
Smoothed = tuple[str, str, Tensor, Tensor]


def every_number(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All finite bfloat16, zeros and subnormals too, in rising order of their bytes, and mixed: [510, 128] each."""
    numbers = torch.stack([torch.arange(0x7F80), torch.arange(0x8000, 0xFF80)]).to(torch.uint16).view(torch.bfloat16)
    mixed = numbers.flatten()[torch.randperm(numbers.numel(), generator=generator)]
    return numbers.view(510, 128), mixed.view(510, 128)


def drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Rows of several sizes, one of zeros, and a negative zero; float32."""
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[rows // 2] = 0
    weight[0, 0] = -0.0
    return weight


def amaxes(generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """Largest magnitudes as trained weights have them, exact and awkward ones, some whose scales are beyond all limits."""
    yield from torch.tensor([0.0, 448.0, 2688.0, 7.0, 1.0, 0.1, 2.0**-133, 3.0e38])
    mantissas = 1 + torch.rand(count, generator=generator)
    yield from mantissas.ldexp(torch.randint(-20, 10, (count,), generator=generator))
    yield from mantissas.ldexp(torch.randint(-132, 127, (count,), generator=generator)).to(torch.bfloat16).float()


def cases(seed: int, count: int) -> Iterator[Case]:
    """Every format on every number, in order and mixed, at 8 + 2 * `count` amaxes; on ties; on small and ragged shapes."""
    generator = torch.Generator().manual_seed(seed)
    ordered, mixed = every_number(generator)
    small = ordered[(ordered.abs().amax(dim=1) < 16) & (ordered.abs().amax(dim=1) > 2**-16)]
    ties = torch.randint(-56, 57, (64, 256), generator=generator).to(torch.bfloat16) / 8
    for name, form in FORMS.items():
        for amax in amaxes(generator, count) if name in ("fp8", "nvfp4", "w4a8_nvfp4_fp8") else [torch.tensor(1.0)]:
            yield f"{name}, all numbers, amax {amax}", form, ordered, Amax(amax, amax)
            yield f"{name}, all numbers mixed, amax {amax}", form, mixed, Amax(amax, amax)
        for scale in (1.0, 2.0**-10, 2.0**-110, 2.0**100):
            yield f"{name}, ties times {scale}", form, ties * scale, Amax(torch.tensor(7.0 * scale), torch.tensor(0.0))
        for rows, columns in (
            (2, 128),
            (34, 384),
            (130, 256),
            *(((1, 16), (3, 48)) if form.tile[1] == 16 else ((1, 32), (3, 96)) if form.tile[1] == 32 else ()),
        ):
            weight = drawn(rows, columns, generator)
            yield f"{name}, {rows} x {columns}", form, weight.to(torch.bfloat16), of(weight)
        yield f"{name}, rows of like size", form, small[: len(small) // 2 * 2], of(small)
    for rows, columns in ((130, 200), (1, 1), (257, 7), (127, 129)):
        weight = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        yield f"fp8_pb, {rows} x {columns}", FORMS["fp8_pb"], weight, of(weight)
        yield f"fp8, {rows} x {columns}", FORMS["fp8"], weight, of(weight)
        yield f"fp8_pc_pt, {rows} x {columns}", FORMS["fp8_pc_pt"], weight, of(weight)


def searched_cases(seed: int, amaxes: Iterable[Tensor]) -> Iterator[Case]:
    """Both searches for scales on every number, in order and mixed, ties and ordinary ones at these amaxes; on small shapes."""
    generator = torch.Generator().manual_seed(seed)
    ties = torch.randint(-56, 57, (512, 128), generator=generator).to(torch.bfloat16) / 8
    many = torch.cat([*every_number(generator), ties, drawn(512, 128, generator).to(torch.bfloat16)])
    for name, form in SEARCHED.items():
        for amax in amaxes:
            yield f"{name}, amax {amax}", form, many, Amax(amax, amax)
        for rows, columns in ((1, 16), (3, 48), (8, 512)):
            weight = drawn(rows, columns, generator).to(torch.bfloat16)
            yield f"{name}, {rows} x {columns}", form, weight, of(weight)


def decided() -> Case:
    """A weight whose blocks `four_over_six` decides without all digits: none has errors that are nearly equal."""
    weight = (torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    return "four_over_six, decided", SEARCHED["nvfp4 four_over_six"], weight, of(weight)


def of(weight: Tensor) -> Amax:
    """A weight's own amax, for its inputs too."""
    return Amax(weight.to(torch.bfloat16).abs().amax().float(), weight[0, 0].abs().float())


def wrong(case: Case, kernel: Callable[[Tensor, Amax], dict[str, Piece]], device: str) -> str:
    """What differs between a kernel there and plain torch on the CPU: "" for nothing."""
    label, form, weight, amax = case
    expected = form.encode(weight, amax)
    found = kernel(weight.to(device), Amax(amax.weight.to(device), amax.input.to(device)))
    if list(found) != list(expected):
        return f"{label}: {list(found)}, not {list(expected)}"
    differing = [
        suffix
        for suffix, piece in expected.items()
        if found[suffix].axes != piece.axes or not same(found[suffix].data.cpu(), piece.data)
    ]
    return f"{label}: {', '.join(differing)}" if differing else ""


def smoothings(seed: int) -> Iterator[Smoothed]:
    """Every search on every number, in order, mixed, and one a row; on ties and on weights that overflow; on awkward shapes."""
    generator = torch.Generator().manual_seed(seed)
    ordered, mixed = every_number(generator)
    signs = torch.randint(0, 2, (255 * 128, 64), generator=generator).mul(2).sub(1).to(torch.bfloat16)
    alike = (ordered[:255].reshape(-1, 1) * signs).repeat(1, 2)
    ties = torch.randint(-56, 57, (64, 128), generator=generator).to(torch.bfloat16) / 8
    ties[:, ::16] = 7
    odd = torch.rand(128, generator=generator).add(0.5).to(torch.bfloat16)
    for name in SEARCHES:
        for factors in (torch.ones_like(odd), odd):
            yield f"{name}, all numbers", name, ordered, factors
            yield f"{name}, all numbers mixed", name, mixed, factors
            yield f"{name}, one number a row", name, alike[seed % 8 :: 8].contiguous(), factors
            for power in (0, -10, -24, -60, -110, -127, 100, 124):
                yield f"{name}, ties times 2^{power}", name, ties * 2.0**power, factors
                yield f"{name}, ties times 2^{power}, twice", name, ties * 2.0**power, factors * 2.0**power
        for rows, columns in ((1, 128), (33, 384), (130, 256), (31, 1152), *(((3, 48),) if name == "nvfp4" else ())):
            weight = drawn(rows, columns, generator)
            factors = torch.rand(columns, generator=generator).mul(8).sub(4).exp2()
            yield f"{name}, {rows} x {columns}", name, weight.to(torch.bfloat16), factors.to(torch.bfloat16)


def wrongly_rounded(case: Smoothed, device: str) -> str:
    """What differs between a search's kernel there and plain torch on the CPU: "" for nothing, where numbers are finite."""
    label, name, weight, factors = case
    search, amax = SEARCHES[name], largest(weight, factors.unsqueeze(0))[0]
    expected = search.rounded(weight * factors, amax)
    found = search.kernel(weight.to(device), factors.to(device), amax.to(device)).cpu()
    made = cuda_kernels.scaled(weight.to(device), factors.to(device), search.group).cpu()
    if not same(made, weight * factors):
        return f"{label}: products with the factors"
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return f"{label}: other numbers are finite"
    differing = (found.view(torch.int16) != expected.view(torch.int16)) & finite
    return f"{label}: {differing.sum()} of {differing.numel()}" if differing.any() else ""


def outputs(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 products and bfloat16 outputs whose sums of squares float64 holds to the bit, in awkward sizes."""
    generator = torch.Generator().manual_seed(seed)
    for shape in ((1, 1), (1, 4096), (7, 1171), (64, 320)):
        product, expected = (torch.randint(-(1 << 13), 1 << 13, shape, generator=generator) / 64 for _ in range(2))
        yield product, expected.to(torch.bfloat16)


def changed(seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor, int]]:
    """What awq_gram.changes is given, in awkward sizes, and a product of whole numbers with the columns from one on, whose dot
    products float64 holds to the bit.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows, columns, start in ((1, 16, 0), (3, 400, 256), (130, 48, 0), (33, 1040, 512)):
        rounded, weight = torch.randn(2, rows, columns, generator=generator).to(torch.bfloat16)
        ours, theirs = torch.randn(2, columns, generator=generator).exp()
        product = torch.randint(-64, 65, (rows, columns - start), generator=generator).float()
        yield (rounded, ours, weight, theirs), product, start
