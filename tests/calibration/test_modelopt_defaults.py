"""What quantizers of ModelOpt mean whose settings were not saved."""

import pytest
import torch

from megatron_export import ExportError
from megatron_export.calibration.modelopt.defaults import supposed
from megatron_export.calibration.modelopt.quantizers import Quantizers, inherited_in, kinds_of

QKV = "decoder.layers.0.self_attention.linear_qkv"
CACHE = "decoder.layers.0.self_attention.core_attention"
ONE = {"_amax": torch.tensor(2.0)}
VECTOR = {"_pre_quant_scale": torch.ones(256)}
BLOCKS = {"_amax": torch.ones(512, 4)}


def linear(weights: dict, inputs: dict, **others: dict) -> Quantizers:
    parts = {"weight_quantizer": weights, "input_quantizer": inputs} | others
    return {f"{QKV}.{name}": buffers for name, buffers in parts.items() if buffers}


CHAIN = {f"{QKV}.{name}": one for name, one in (("weight_quantizer.0", BLOCKS), ("weight_quantizer.1", ONE))}


@pytest.mark.parametrize(
    ("quantizers", "format", "found"),
    [
        (linear(ONE, ONE), "fp8", "fp8"),
        (linear(ONE, ONE), "nvfp4", "nvfp4"),
        (linear(ONE, ONE | VECTOR), None, "nvfp4_awq"),
        (linear({"_amax": torch.ones(4, 2)}, {}), None, "fp8_pb"),
        (linear({"_amax": torch.ones(512, 1)}, {}), None, "fp8_pc_pt"),
        (linear(ONE, {}), None, "w4a16_nvfp4"),
        (linear(BLOCKS, VECTOR), None, "int4_awq"),
        (CHAIN | linear({}, ONE | VECTOR), None, "w4a8_awq"),
        (CHAIN | linear({}, ONE | VECTOR), "w4a8_awq", "w4a8_awq"),
    ],
)
def test_buffers_say_the_format_where_they_fit_one(quantizers: Quantizers, format: str | None, found: str) -> None:
    recipe = inherited_in(kinds_of(supposed(quantizers, {QKV: 256}, format, None, "DIR")))
    assert recipe.format == found
    assert recipe.group_size == (64 if "int4" in found or "w4a8" in found else 128)


@pytest.mark.parametrize(
    ("quantizers", "format", "cache", "said"),
    [
        (linear(ONE, ONE), None, None, "by their buffers they fit fp8 and nvfp4 and w4a8_nvfp4_fp8: say --format"),
        (linear(ONE, ONE), "fp8_pb", None, "they fit fp8 and nvfp4 and w4a8_nvfp4_fp8: say --format"),
        (linear(BLOCKS, VECTOR), "nvfp4", None, "they fit int4_awq: say --format"),
        (linear(ONE, {}), "fp8", None, "they fit w4a16_nvfp4: say --format"),
        (linear(ONE, VECTOR), "fp8", None, "they fit no format"),
        ({f"{CACHE}.k_bmm_quantizer": ONE, f"{CACHE}.v_bmm_quantizer": ONE}, "fp8", None, "say --kv-cache"),
    ],
)
def test_what_fits_several_or_another_is_refused(
    quantizers: Quantizers, format: str | None, cache: str | None, said: str
) -> None:
    with pytest.raises(ExportError, match=f"DIR: nothing says how the quantizers of .* {said}"):
        supposed(quantizers, {QKV: 256}, format, cache, "DIR")


def test_settings_that_are_known_stay() -> None:
    known = {f"{QKV}.weight_quantizer": ONE | {"_num_bits": (4, 3)}, f"{QKV}.input_quantizer": {"_num_bits": 8}}
    assert supposed(known, {}, None, None, "DIR") == known
