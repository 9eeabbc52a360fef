"""What static NVFP4 quantizers of ModelOpt hold, recorded: the scales that it exports are those of one of --nvfp4-scales.

Made by ModelOpt 0.47 on the CPU, of a linear [32, 128]: presets NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG and NVFP4_FOUR_OVER_SIX_CFG,
and NVFP4_DEFAULT_CFG with static weights. Its Triton kernel that rounds a weight was replaced by plain torch that does the same.
"""

import ast
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_export.calibration.modelopt.blocks import kept, scales_of
from megatron_export.calibration.modelopt.quantizers import Quantizers, blocks_in, inherited_in, kinds_of, scalars_in
from megatron_export.common.piece import Amax
from megatron_export.formats import Options, chosen, encode
from megatron_export.models.statistic_names import input_key, weight_key

from ..support.models import same

GOLDEN = Path(__file__).parents[1] / "golden" / "modelopt_static"
LINEAR = "decoder.layers.0.self_attention.linear_proj"
SCALES = ("max", "mse", "four_over_six")


def recorded(scales: str) -> tuple[Quantizers, dict[str, Tensor]]:
    """Quantizers with their settings and buffers; the weight, and what ModelOpt exports."""
    with safe_open(GOLDEN / f"{scales}.safetensors", "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        settings = ast.literal_eval(file.metadata()["settings"])
    quantizers = {f"{LINEAR}.{name}": said for name, said in settings.items()}
    for name, buffer in held.items():
        quantizer, _, key = name.partition(".")
        if quantizer.endswith("_quantizer"):
            quantizers[f"{LINEAR}.{quantizer}"][key] = buffer
    return quantizers, held


@pytest.mark.parametrize("scales", SCALES)
def test_what_modelopt_exports_is_written_to_the_bit(scales: str) -> None:
    quantizers, held = recorded(scales)
    weight, blocks, amaxes = held["in.weight"], blocks_in(quantizers)[LINEAR], scalars_in(quantizers)
    told = scales_of(weight, blocks.amax, blocks)
    assert told == scales
    inherited = inherited_in(kinds_of(quantizers), told)
    assert (inherited.formats, inherited.scales) == ({LINEAR: "nvfp4"}, scales)
    amax = Amax(*(torch.tensor(amaxes[key(LINEAR)]) for key in (weight_key, input_key)))
    made = encode(chosen("nvfp4", Options(nvfp4_scales=inherited.scales)), weight, amax)
    for suffix, piece in made.items():
        assert same(piece.data, held[f"out.{suffix}"].view(piece.data.dtype).reshape(piece.data.shape)), suffix
    assert kept(weight, blocks.amax, blocks, scales, float(amax.weight))


@pytest.mark.parametrize("scales", SCALES)
def test_scales_that_an_export_would_not_make_are_told(scales: str) -> None:
    """Of another search, of a weight that changed, under another amax, of fewer blocks."""
    quantizers, held = recorded(scales)
    weight, blocks = held["in.weight"], blocks_in(quantizers)[LINEAR]
    for other in {*SCALES} - {scales}:
        assert not kept(weight, blocks.amax, blocks, other, blocks.largest)
    changed = weight.clone()
    changed[5, :16] *= 0.5
    assert not kept(changed, blocks.amax, blocks, scales, blocks.largest)
    assert not kept(weight, blocks.amax * 1.25, blocks, scales, blocks.largest)
    assert not kept(weight, blocks.amax, blocks, scales, blocks.largest * 1.25)
    assert not kept(weight, blocks.amax[1:], blocks, scales, blocks.largest)
