"""Single linears against the vectors that ModelOpt 0.47 wrote: every byte, by both of its routes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_export import formats
from megatron_export.formats import FORMATS
from megatron_export.piece import Amax

from ..models import GOLDEN, same

VECTORS = sorted((GOLDEN / "vectors").glob("*/*.safetensors"))


def read(path: Path) -> tuple[dict, Amax]:
    vector = load_file(path)
    state = (vector[f"calib.{name}_quantizer._amax"].float() for name in ("weight", "input"))
    return vector, Amax(*state)


@pytest.mark.parametrize("path", [p for p in VECTORS if p.stem != "zero"], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_byte_equals_modelopt(path: Path) -> None:
    vector, amax = read(path)
    assert torch.equal(vector["in.weight"].abs().amax().float(), amax.weight)
    pieces = formats.encode(FORMATS[path.parent.name.lower()], vector["in.weight"], amax)
    for route in ("out", "meg"):
        golden = {key.removeprefix(f"{route}."): value for key, value in vector.items() if key.startswith(f"{route}.")}
        assert sorted(golden) == sorted(pieces)
        for suffix, value in golden.items():
            # ModelOpt's Megatron route writes FP8 input scales as [1], its HF route and we as []
            shape = () if suffix.endswith(("input_scale", "scale_2")) else value.shape
            assert same(pieces[suffix].data.contiguous(), value.reshape(shape)), (route, suffix)


@pytest.mark.parametrize("name", ["FP8", "NVFP4"])
def test_a_weight_of_zeros_gets_scales_of_one_and_decodes_to_zeros(name: str) -> None:
    """ModelOpt writes NaN here; a checkpoint with NaN in it is broken for every engine."""
    vector, amax = read(GOLDEN / "vectors" / name / "zero.safetensors")
    form = FORMATS[name.lower()]
    pieces = formats.encode(form, vector["in.weight"], amax)
    for suffix, piece in pieces.items():
        if "weight_scale" in suffix:
            assert (piece.data.float() == 1).all(), suffix
    assert not form.decode(pieces).any()
