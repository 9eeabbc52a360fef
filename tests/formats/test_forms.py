"""What every format says of itself is what it does."""

import re

import pytest
import torch

from megatron_export.common.dtypes import dtype_names
from megatron_export.common.piece import Amax, Axis, join
from megatron_export.formats import (
    ALGORITHMS,
    AS_HF,
    FORMATS,
    KV_FORMATS,
    PUBLISHED,
    SCALES,
    SUFFIXES,
    VARIANTS,
    Form,
    KvForm,
    Options,
    Stacked,
    chosen,
    chosen_kv,
    encode,
)
from megatron_export.formats.awq import SEARCHES
from megatron_export.formats.form import WHOLE_ROW
from megatron_export.models.statistic_names import module_of, vector_key

FORMS = {f"{form.name} {number}": form for number, (_, form) in enumerate(VARIANTS)}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
AXES = (Axis.OUT, Axis.IN)


def size_of(form: Form) -> tuple[int, int]:
    """A weight of three tiles down and two across, and of part of a tile more where the format takes that."""
    down, across = form.tile[0], min(form.tile[1], 256)
    return 3 * down + form.ragged * (down // 2), 2 * across + form.ragged * (across // 4)


def encoded(form: Form, weight: torch.Tensor, input_amax: float = 3.0) -> dict:
    return encode(form, weight, Amax(weight.abs().amax().float(), torch.tensor(input_amax)))


def weight_of(form: Form) -> torch.Tensor:
    return torch.randn(size_of(form), generator=torch.Generator().manual_seed(5)).bfloat16()


@every_form
def test_it_makes_the_tensors_that_it_says(form: Form) -> None:
    weight = weight_of(form)
    pieces = encoded(form, weight)
    assert pieces.keys() == form.stored.keys()
    assert pieces["weight"].axes == AXES
    for suffix, piece in pieces.items():
        said = form.stored[suffix]
        assert (dtype_names()[piece.data.dtype], piece.data.dim()) == (said.dtype, said.dims), suffix
        assert piece.axes == said.axes, suffix
        for axis, size, each in zip(AXES, weight.shape, (said.rows, said.columns), strict=True):
            length = piece.data.shape[piece.axes.index(axis)] if axis in piece.axes else None
            assert length == (each and -(-size // each)), suffix


@every_form
def test_the_shapes_that_it_says_are_those_that_it_makes(form: Form) -> None:
    down, across = size_of(form)
    for weight in (weight_of(form), torch.ones(down - down % form.tile[0], across // 2, dtype=torch.bfloat16)):
        made = encoded(form, weight)
        for suffix, said in form.stored.items():
            assert said.shape(tuple(weight.shape)) == tuple(made[suffix].data.shape), suffix


@pytest.mark.parametrize("stacked", [AS_HF, PUBLISHED["mxfp4"].stack])
@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(6, 32), (6,)])
def test_the_slices_of_stacks_have_the_shapes_that_are_said(
    stacked: Stacked, suffix: str, shape: tuple[int, ...]
) -> None:
    if stacked.codes and suffix == "weight" and len(shape) == 1:
        return  # codes are in rows
    assert stacked.slice_shape(shape, suffix) == tuple(stacked.slice(torch.ones(shape), suffix).shape)


@pytest.mark.parametrize("form", [form for form in KV_FORMATS.values() if form], ids=lambda form: form.name)
def test_a_cache_has_the_scales_that_are_said(form: KvForm) -> None:
    amax = torch.tensor(3.0)
    for given in ({}, {"scale": 1.0}, {"scale": 2.0}, {"least": 1.0}):
        one = chosen_kv(form.name, **given)
        made = one.encode(amax, amax)
        assert tuple(made) == one.scales
        assert all((scale.dtype, scale.shape) == (torch.float32, ()) for scale in made.values())


@every_form
def test_nothing_outside_a_tile_changes_what_is_made_of_it(form: Form) -> None:
    weight = weight_of(form)
    amax = Amax(weight.abs().amax().float(), torch.tensor(3.0))
    for axis, (dim, tile) in zip(AXES, enumerate(form.tile), strict=True):
        if tile == WHOLE_ROW:
            continue
        parts = [encode(form, part.contiguous(), amax) for part in weight.split(tile, dim)]
        assert len(parts) > 1
        for suffix, piece in encode(form, weight, amax).items():
            assert torch.equal(join([part[suffix] for part in parts], axis).data.float(), piece.data.float()), suffix


@every_form
def test_rounding_with_its_scales_is_decoding_what_it_encodes(form: Form) -> None:
    weight = weight_of(form)
    pieces = encoded(form, weight)
    assert torch.equal(form.requantize(weight.float(), pieces), form.decode(pieces))


@every_form
def test_inputs_change_the_input_scale_and_nothing_else(form: Form) -> None:
    weight = weight_of(form)
    one, other = encoded(form, weight, 3.0), encoded(form, weight, 5.0)
    changed = [suffix for suffix in one if not torch.equal(one[suffix].data.float(), other[suffix].data.float())]
    assert changed == (["input_scale"] if form.activations else [])
    values = torch.randn(2, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    rounded = form.arithmetic.inputs(values, one["input_scale"].data if form.activations else None)
    assert (rounded.dtype, rounded.shape) == (torch.float32, values.shape)


@every_form
def test_rows_in_another_order_have_the_numbers_of_before_only_in_a_format_that_is_not_by_row(form: Form) -> None:
    """An engine that puts the rows of codes in another order finds the scales of other rows, or bytes of two."""
    weight = weight_of(form) * torch.arange(1, 1 + size_of(form)[0]).unsqueeze(1).bfloat16() ** 3
    before, after = encoded(form, weight), encoded(form, weight.flip(0))
    if not form.by_row:
        assert torch.equal(before["weight"].data.flip(0).float(), after["weight"].data.float())
    others = [
        suffix
        for suffix, piece in before.items()
        if suffix != "weight" and not torch.equal(piece.data.float(), after[suffix].data.float())
    ]
    assert bool(others) is form.by_row


def test_a_code_has_the_bits_that_the_format_is_named_after() -> None:
    named = {name: int(found[0]) for name in FORMATS if (found := re.search(r"\d+", name))}
    assert {name: chosen(name).bits for name in named} == named


def test_no_two_formats_have_one_name_and_every_option_makes_another() -> None:
    assert all(form.name == name for name in FORMATS for form in (chosen(name),))
    assert (
        len({(form.name, options) for options, form in VARIANTS})
        == len({form for _, form in VARIANTS})
        == len(VARIANTS)
    )
    used = {option for module in FORMATS.values() for option in module.OPTIONS}
    assert used == {*Options.__dataclass_fields__}


@every_form
def test_a_format_that_quantizes_can_be_told_from_its_tensors_and_configs(form: Form) -> None:
    if not form.quantization:
        assert (form.algorithm, form.numbers, form.native, form.smoothing) == (None, None, None, None)
        return
    assert form.algorithm in ALGORITHMS
    assert form.scale in SCALES
    assert {*form.stored} <= {"weight", *SUFFIXES}
    assert form.calibrated is ("input_scale" in form.stored or form.smoothing is not None)
    assert form.quantization.get("group_size", form.tile[1]) == form.tile[1]


@pytest.mark.parametrize("search", dict.fromkeys(form.smoothing.search for form in FORMS.values() if form.smoothing))
def test_a_search_that_a_format_names_is_there_and_its_statistics_can_be_taken_apart(search: str) -> None:
    assert search in SEARCHES
    assert module_of(vector_key("decoder.layers.0.mlp.linear_fc2", search)) == "decoder.layers.0.mlp.linear_fc2"


def test_no_option_decides_whether_a_format_needs_calibration() -> None:
    """The command asks before it has read the options."""
    assert [form.name for _, form in VARIANTS if form.calibrated is not chosen(form.name).calibrated] == []
