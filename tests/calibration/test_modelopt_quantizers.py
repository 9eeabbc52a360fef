"""What the settings of ModelOpt's quantizers mean, and which are refused; tensors and attributes as ModelOpt 0.47 has them."""

import pytest
import torch

from megatron_export import ExportError
from megatron_export.calibration.modelopt import quantizers as modelopt
from megatron_export.calibration.modelopt.quantizers import Quantizers
from megatron_export.calibration.modelopt.settings import CACHES, LINEARS
from megatron_export.formats import FORMATS, KV_FORMATS, chosen

LAYER = "decoder.layers.0"
QKV, PROJ, FC1 = f"{LAYER}.self_attention.linear_qkv", f"{LAYER}.self_attention.linear_proj", f"{LAYER}.mlp.linear_fc1"
NVFP4 = {"_num_bits": (2, 1), "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
STATIC = NVFP4 | {"_axis": (0,), "_block_sizes": NVFP4["_block_sizes"] | {"type": "static"}}
FOUR_OVER_SIX = STATIC | {"_block_sizes": STATIC["_block_sizes"] | {"four_over_six": 1}}  # True becomes 1
FP8, OFF, INT4 = {"_num_bits": (4, 3)}, {"_disabled": True, "_num_bits": 8}, {"_num_bits": 4, "_axis": (0,)}
INT4 |= {"_block_sizes": {-1: 128, "type": "static"}}
FP8_PB = {"_num_bits": (4, 3), "_axis": (0, 2), "_block_sizes": {-1: 128, -2: 128}}
MXFP8 = {"_num_bits": (4, 3), "_block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
MXFP4 = MXFP8 | {"_num_bits": (2, 1)}
BY_TOKEN = FP8 | {"_dynamic": True}
VECTOR, CONSTANT = {"_pre_quant_scale": torch.ones(128)}, {"_use_constant_amax": True}


def linear(name: str, weights: dict, inputs: dict, **others: dict) -> Quantizers:
    """The quantizers of one linear."""
    parts = {"weight_quantizer": weights, "input_quantizer": inputs, "output_quantizer": OFF} | others
    return {f"{name}.{part}": attributes for part, attributes in parts.items()}


def cache(keys: dict, values: dict) -> Quantizers:
    """The quantizers of one attention."""
    attention = f"{LAYER}.self_attention.core_attention"
    return {f"{attention}.k_bmm_quantizer": keys, f"{attention}.v_bmm_quantizer": values}


def chain(name: str) -> Quantizers:
    """Those of W4A8, whose weights are rounded twice."""
    found = linear(name, {}, FP8 | VECTOR, **{"weight_quantizer.0": INT4, "weight_quantizer.1": FP8})
    return found | {f"{name}.weight_quantizer": {}}


@pytest.mark.parametrize(
    ("quantizers", "format", "cached"),
    [
        (linear(QKV, FP8, FP8), "fp8", "none"),
        (linear(QKV, FP8, FP8) | cache(FP8, FP8), "fp8", "fp8"),
        (linear(QKV, FP8, FP8) | cache(FP8 | CONSTANT, FP8 | CONSTANT), "fp8", "fp8 of 1"),
        (linear(QKV, FP8, FP8) | cache(FP8, FP8 | CONSTANT), "fp8", "fp8"),
        (linear(QKV, FP8, FP8) | cache(OFF | CONSTANT, OFF | CONSTANT), "fp8", "none"),
        (linear(QKV, FP8_PB, OFF), "fp8_pb", "none"),
        (linear(QKV, NVFP4, NVFP4) | cache(NVFP4, NVFP4), "nvfp4", "nvfp4"),
        (linear(QKV, NVFP4, NVFP4 | VECTOR), "nvfp4_awq", "none"),
        (linear(QKV, NVFP4, OFF), "w4a16_nvfp4", "none"),
        (linear(QKV, STATIC, NVFP4), "nvfp4 mse", "none"),
        (linear(QKV, STATIC, OFF), "w4a16_nvfp4 mse", "none"),
        (linear(QKV, FOUR_OVER_SIX, NVFP4), "nvfp4 four_over_six", "none"),
        (linear(QKV, FOUR_OVER_SIX, OFF), "w4a16_nvfp4 four_over_six", "none"),
        (linear(QKV, NVFP4 | {"_block_sizes": NVFP4["_block_sizes"] | {-1: 32}}, FP8), "w4a8_nvfp4_fp8", "none"),
        (linear(QKV, MXFP8, MXFP8), "mxfp8", "none"),
        (linear(QKV, MXFP4, OFF), "mxfp4", "none"),
        (linear(QKV, MXFP4, FP8), "w4a8_mxfp4_fp8", "none"),
        (linear(QKV, FP8 | {"_axis": 0}, BY_TOKEN | {"_axis": (0, 1)}), "fp8_pc_pt", "none"),
        (linear(QKV, FP8 | {"_axis": 0}, BY_TOKEN | {"_axis": None, "_block_sizes": {-1: None}}), "fp8_pc_pt", "none"),
        (linear(QKV, INT4, OFF | VECTOR), "int4_awq", "none"),
        (chain(QKV), "w4a8_awq", "none"),
    ],
)
def test_a_recipe_is_read_from_the_quantizers(quantizers: Quantizers, format: str, cached: str) -> None:
    quantizers = quantizers | linear(FC1, OFF, OFF) | linear("output_layer", OFF, OFF)
    kv_cache, _, scale = cached.partition(" of ")
    name, _, scales = format.partition(" ")
    expected = modelopt.Inherited({QKV: name}, kv_cache, 128, float(scale) if scale else None, scales or "max")
    assert modelopt.inherited_in(modelopt.kinds_of(quantizers)) == expected


def test_every_format_has_settings_of_its_own() -> None:
    assert sorted(LINEARS) == sorted(FORMATS)
    assert sorted(CACHES) == sorted(KV_FORMATS)
    assert [LINEARS[name].smoothed for name in FORMATS] == [chosen(name).smoothing is not None for name in FORMATS]
    rounding = [str(settings) for settings in LINEARS.values()]
    assert len(set(rounding)) == len(rounding)


def test_scales_that_were_made_in_several_ways_are_refused() -> None:
    both = linear(QKV, NVFP4, NVFP4) | linear(FC1, STATIC, NVFP4)
    assert modelopt.inherited_in(modelopt.kinds_of(both), "max").scales == "max"
    with pytest.raises(ExportError, match=rf"in several ways.*max \({QKV}, 1 in all\), mse \({FC1}, 1 in all\)"):
        modelopt.inherited_in(modelopt.kinds_of(both), "mse")
    beside = linear(QKV, FP8, FP8) | linear(FC1, STATIC, NVFP4)
    assert modelopt.inherited_in(modelopt.kinds_of(beside), "mse").scales == "mse"


def test_without_quantizers_that_round_there_is_no_recipe() -> None:
    assert modelopt.inherited_in(modelopt.kinds_of({})) is None
    assert modelopt.inherited_in(modelopt.kinds_of(linear(QKV, OFF, OFF) | cache(OFF, OFF))) is None


@pytest.mark.parametrize(
    ("quantizers", "said"),
    [
        (linear(QKV, {"_num_bits": 8, "_axis": 0}, {"_num_bits": 8}), "weight_quantizer is int8, one scale by axis 0"),
        (linear(QKV, MXFP4, MXFP4), "weight_quantizer is e2m1 in blocks of 32, dynamic, with scales of e8m0"),
        (linear(QKV, FP8, BY_TOKEN | {"_axis": (0, 1)}), "input_quantizer is e4m3, one scale by token, as they come"),
        (linear(QKV, FP8, OFF), "weight_quantizer is e4m3: no format"),
        (linear(QKV, FP8, FP8 | VECTOR), "inputs are multiplied by a pre_quant_scale: no format"),
        (linear(QKV, OFF, OFF | VECTOR), "inputs are multiplied by a pre_quant_scale: no format"),
        (linear(QKV, INT4, OFF), "weight_quantizer is int4 in blocks of 128: no format"),
        (linear(QKV, FP8, FP8, output_quantizer=FP8), "output_quantizer is e4m3"),
        (linear(QKV, FP8 | {"_scale": torch.ones(())}, FP8), "e4m3, compressed"),
        (linear(QKV, STATIC | {"_lsq": True}, NVFP4), "blocks of 16, with scales of e4m3, with scales that are trained"),
        (linear(QKV, STATIC, NVFP4 | VECTOR), "blocks of 16, with scales of e4m3; inputs are multiplied"),
        (linear(QKV, NVFP4, STATIC), "input_quantizer is e2m1 in blocks of 16, with scales of e4m3"),
        (linear(QKV, NVFP4 | {"_svdquant_lora_a": torch.ones(2, 2)}, NVFP4 | VECTOR), "beside a product of two matrices"),
        (linear(QKV, FP8 | {"backend": "my_backend"}, FP8), "weight_quantizer is e4m3, by a backend of its own"),
        (
            linear(QKV, NVFP4 | {"_block_sizes": NVFP4["_block_sizes"] | {"four_over_six": True}}, NVFP4),
            "dynamic, with scales of e4m3, of 4 or 6",
        ),
        (cache({"_num_bits": 8}, {"_num_bits": 8}), "self_attention .*: ModelOpt's k_bmm_quantizer is int8"),
        (cache(FP8 | {"_bias": {"enable": True}}, FP8), "k_bmm_quantizer is e4m3, with an offset"),
        (linear(f"{LAYER}.mlp.experts.1.linear_fc1", NVFP4, NVFP4 | VECTOR), "each expert a pre_quant_scale of its own"),
        (
            linear(f"{LAYER}.mlp.experts.0.linear_fc1", FP8, FP8) | linear(f"{LAYER}.mlp.experts.1.linear_fc1", OFF, OFF),
            "experts.1.linear_fc1 .* it is quantized to bf16, and another expert of its layer to fp8",
        ),
    ],
)  # fmt: skip
def test_what_no_format_does_is_refused_by_name(quantizers: Quantizers, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        modelopt.kinds_of(quantizers)


def test_each_linear_has_its_own_format_the_output_layer_too() -> None:
    mixed = linear(QKV, FP8, FP8) | linear(FC1, NVFP4, NVFP4) | linear("output_layer", FP8, FP8)
    found = modelopt.inherited_in(modelopt.kinds_of(mixed))
    assert found.formats == {QKV: "fp8", FC1: "nvfp4", "output_layer": "fp8"}


def test_awq_beside_another_format_and_a_cache_alone_are_refused() -> None:
    with pytest.raises(
        ExportError, match=rf"with AWQ and without.*fp8 \({QKV}, 1 in all\), int4_awq 128 \({FC1}, 1 in all\)"
    ):
        modelopt.inherited_in(modelopt.kinds_of(linear(QKV, FP8, FP8) | linear(FC1, INT4, OFF | VECTOR)))
    with pytest.raises(ExportError, match=r"nothing of this model but its KV cache \(fp8\)"):
        modelopt.inherited_in(modelopt.kinds_of(cache(FP8, FP8)))


def test_a_hundred_linears_that_are_refused_are_one_line() -> None:
    some = {k: v for n in range(100) for k, v in linear(f"decoder.layers.{n}.mlp.linear_fc1", FP8, OFF).items()}
    with pytest.raises(ExportError, match=r"^decoder.layers.0.mlp.linear_fc1 \(100 such\): [^\n]*$"):
        modelopt.kinds_of(some)


def test_statistics_are_the_amaxes_and_vectors_that_are_there() -> None:
    def amax(value: float) -> dict:
        return {"_amax": torch.tensor(value, dtype=torch.bfloat16)}

    quantizers = linear(QKV, FP8 | amax(0.5), FP8 | amax(3)) | linear(PROJ, FP8, FP8 | amax(2))
    quantizers |= linear(f"{LAYER}.mlp.experts.0.linear_fc1", FP8 | amax(0.25), FP8 | amax(6))
    quantizers |= linear(f"{LAYER}.mlp.experts.1.linear_fc1", FP8 | amax(0.75), FP8 | amax(4))
    quantizers |= linear("output_layer", OFF | amax(9), OFF | amax(9))
    quantizers |= cache(FP8 | amax(7), FP8 | CONSTANT)
    assert modelopt.scalars_in(quantizers) == {
        f"{QKV}.weight_amax": 0.5,
        f"{QKV}.input_amax": 3,
        f"{PROJ}.input_amax": 2,
        f"{LAYER}.mlp.experts.0.linear_fc1.weight_amax": 0.25,
        f"{LAYER}.mlp.experts.1.linear_fc1.weight_amax": 0.75,
        f"{LAYER}.mlp.experts.linear_fc1.input_amax": 6,
        f"{LAYER}.self_attention.k_amax": 7,
        f"{LAYER}.self_attention.v_amax": 448,
    }
    with pytest.raises(ExportError, match=rf"{QKV}.input_quantizer._amax is nan"):
        modelopt.scalars_in(linear(QKV, FP8, FP8 | amax(torch.nan)))
    assert torch.equal(modelopt.vectors_in(linear(QKV, INT4, OFF | VECTOR))[QKV], torch.ones(128))
    found = modelopt.blocks_in(linear(QKV, FP8_PB | {"_amax": torch.ones(2, 1, 3, 1)}, OFF))[QKV]
    assert (found.amax.shape, found.size, found.scales) == ((2, 1, 3, 1), (128, 128), "")
    assert modelopt.blocks_in(linear(QKV, FP8 | amax(1), FP8)) == {}
