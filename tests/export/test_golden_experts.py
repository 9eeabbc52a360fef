"""Models with experts and latent attention against ModelOpt 0.47's files of the same sources, and what they differ in.

ModelOpt's FP8 is that of its Megatron route, where fused linears share a scale, as engines want it, its NVFP4 that of its
HF route, where q_a_proj and kv_a_proj_with_mqa share theirs too. We write on two tensor and two expert parallel ranks.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export.models.statistic_names import hf_keys

from ..support.models import GOLDEN, assert_same, read_json, same, tensors
from ..support.ranks import Ranks, living
from . import test_golden_models as golden_models
from .test_golden_models import ids_of, modelopt_statistics
from .test_topologies import export

pytestmark = pytest.mark.whole

MODELS = GOLDEN / "models"
SOURCES = {name: MODELS / f"{name}-bf16" for name in ("qwen3moe", "deepseekv3")}
FLAGS = {"qwen3moe": (), "deepseekv3": ("--quantize-mla",)}
ROUTES = {"fp8": "FP8-mcore", "nvfp4": "NVFP4"}
STATES = {"qwen3moe": "FP8-KVFP8", "deepseekv3": "FP8"}  # NVFP4 was calibrated to the same values
TOPOLOGY = ("--tp", 2, "--ep", 2)
ROUNDING = 8 * 2**-8  # the bound of test_topologies.py


def over_experts(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maximum over the experts of each layer, under the names that a calibration file has."""
    pooled: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = re.sub(r"\.experts\.\d+\.", ".experts.", key)
        pooled[name] = torch.maximum(pooled.get(name, value), value)
    return pooled


def save(theirs: dict[str, Tensor], name: str, file: Path) -> None:
    """ModelOpt's statistics as a calibration file: each expert with one token, as ModelOpt does not count them."""
    config = read_json(SOURCES[name] / "config.json")
    keys = hf_keys(config)
    counts = {on_disk[0]: torch.ones(4, dtype=torch.int64) for key, on_disk in keys.items() if key.endswith("tokens")}
    known = over_experts(theirs) | counts
    assert sorted(known) == sorted(key for on_disk in keys.values() for key in on_disk)
    golden_models.save(known, file, config)


def golden(name: str, form: str) -> dict[str, Tensor]:
    """ModelOpt's checkpoint, as far as its types and shapes are not what engines and publishers have: its Megatron route
    writes input scales as [1], all others as []; and it rounds the bias of the choice of experts to bfloat16, where
    DeepSeek publishes float32, which we always write (this source has it in bfloat16: the values are the same).
    """
    found = tensors(MODELS / f"{name}-{ROUTES[form]}")
    for key, tensor in found.items():
        if key.endswith("input_scale") and form == "fp8":
            assert tensor.shape == (1,)
            found[key] = tensor.squeeze(0)
    biases = [key for key in found if key.endswith("e_score_correction_bias")]
    assert biases == ["model.layers.1.mlp.gate.e_score_correction_bias"] * (name == "deepseekv3")
    for key in biases:
        assert found[key].dtype == torch.bfloat16
        found[key] = found[key].float()
    return found


def e4m3(weight: Tensor, scale: Tensor) -> Tensor:
    """The codes of a weight in FP8, as ModelOpt rounds: to bfloat16 first."""
    return (weight.float() / scale).bfloat16().to(torch.float8_e4m3fn)


def assert_equal_but_for_latents(ours: dict[str, Tensor], theirs: dict[str, Tensor], name: str, form: str) -> None:
    """ModelOpt's Megatron route scales q_a_proj and kv_a_proj_with_mqa apart, but engines fuse the two under the larger
    scale, with which the codes of the other would be wrong or be rounded again. We write the other one, in both layers of
    this model kv_a_proj_with_mqa, under the scale of q_a_proj, with ModelOpt's arithmetic.
    """
    different = [key for key in theirs if not same(ours[key], theirs[key])]
    if (name, form) != ("deepseekv3", "fp8"):
        assert different == []
        return
    attentions = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    leaves = ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.weight_scale")
    assert sorted(different) == [f"{attention}.{leaf}" for attention in attentions for leaf in leaves]
    source = tensors(SOURCES[name])
    for attention in attentions:
        weight, scale = (f"{attention}.{leaf}" for leaf in leaves)
        shared = theirs[f"{attention}.q_a_proj.weight_scale"]
        assert shared > theirs[scale]
        assert same(ours[scale], shared)
        assert same(theirs[weight], e4m3(source[weight], theirs[scale]))
        assert same(ours[weight], e4m3(source[weight], shared))


def descriptions(folder: Path) -> tuple[dict, dict]:
    """What hf_quant_config.json and config.json say of the quantization."""
    nested, flat = (read_json(folder / name) for name in ("hf_quant_config.json", "config.json"))
    return nested["quantization"], flat["quantization_config"]


@pytest.fixture(scope="module")
def measured(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model, what two expert parallel ranks measured on the token ids that ModelOpt calibrated on."""
    files = {}
    for name, source in SOURCES.items():
        folder = tmp_path_factory.mktemp(name)
        ids = ids_of(source, folder / "ids.safetensors")
        files[name] = folder / "calibration.safetensors"
        export(living(pool), 2, "--ep", 2, "--hf-model", source, "--calib-data", ids, "--output",
            folder / "out", "--calib-samples", 8, "--calib-batch-size", 2, "--save-calibration", files[name])  # fmt: skip
    return files


@pytest.fixture(scope="module")
def exported(
    measured: dict[str, Path], pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """By model and format, the export of two tensor and two expert parallel ranks, latent attention included."""
    folders = {}
    for name, source in SOURCES.items():
        for form in ROUTES:
            folders[name, form] = tmp_path_factory.mktemp(f"{name}-{form}") / "out"
            export(living(pool), 4, *TOPOLOGY, *FLAGS[name], "--hf-model", source, "--format", form, "--load-calibration",
                measured[name], "--output", folders[name, form])  # fmt: skip
    return folders


@pytest.mark.parametrize("form", ROUTES)
@pytest.mark.parametrize("name", SOURCES)
def test_every_weight_and_weight_scale_equals_modelopt_but_for_shared_latents(
    name: str, form: str, exported: dict
) -> None:
    ours, theirs = tensors(exported[name, form]), golden(name, form)
    assert sorted(ours) == sorted(theirs)
    weights = {key: tensor for key, tensor in theirs.items() if not key.endswith("input_scale")}
    assert len(weights) > 60
    assert_equal_but_for_latents(ours, weights, name, form)


@pytest.mark.parametrize("form", ROUTES)
@pytest.mark.parametrize("name", SOURCES)
def test_with_modelopt_statistics_every_tensor_is_equal_but_for_shared_latents(
    name: str, form: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Of its Megatron route only the input scales are known: e4m3's largest number, 448, times less than what was seen.
    What was seen is in bfloat16.
    """
    theirs, seen = golden(name, form), modelopt_statistics(name, STATES[name])
    if form == "fp8":
        scales = {key: scale for key, scale in theirs.items() if key.endswith("input_scale")}
        seen |= {
            key.replace("input_scale", "input_amax"): (scale * 448).bfloat16().float() for key, scale in scales.items()
        }
    save(seen, name, tmp_path / "c.safetensors")
    export(ranks, 4, *TOPOLOGY, *FLAGS[name], "--hf-model", SOURCES[name], "--format", form, "--load-calibration",
        tmp_path / "c.safetensors", "--output", tmp_path / "out")  # fmt: skip
    ours = tensors(tmp_path / "out")
    assert sorted(ours) == sorted(theirs)
    assert_equal_but_for_latents(ours, theirs, name, form)


@pytest.mark.parametrize("name", SOURCES)
def test_inputs_are_those_that_modelopt_measured_on_transformers_up_to_rounding(name: str, measured: dict) -> None:
    """Of experts too: those of down_proj before the router's probability, and the maximum over a layer's experts.

    Of two tensor parallel ranks the products round once more: one maximum moves by 10 roundings, to 19.125, from
    ModelOpt's 18.375; it is 18.88 in float32, and 18.75 here.
    """
    ours, theirs = load_file(measured[name]), over_experts(modelopt_statistics(name, STATES[name]))
    counted = [key for key in ours if key.endswith(".tokens")]
    assert [ours[key].sum() for key in counted] == [8 * 24 * 2] * len(counted)  # two experts for every token
    assert sorted(ours.keys() - counted) == sorted(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("name", SOURCES)
def test_modelopt_on_megatron_scales_inputs_of_down_proj_too_small_and_all_others_as_we_do(
    name: str, exported: dict
) -> None:
    """Megatron multiplies the router's probability in before down_proj, engines after it: the inputs that they see would
    saturate under ModelOpt's scale. Ours are those of a layer's experts on transformers, see the test above.
    """
    ours, theirs = tensors(exported[name, "fp8"]), golden(name, "fp8")
    seen = modelopt_statistics(name, STATES[name])
    scales = [key for key in theirs if key.endswith("input_scale")]
    down = [key for key in scales if ".experts." in key and "down_proj" in key]
    assert len(down) == {"qwen3moe": 8, "deepseekv3": 4}[name]
    for key in scales:
        assert ours[key].dtype == torch.float32
        if key in down:
            expected = seen[key.replace("input_scale", "input_amax")] / 448
            torch.testing.assert_close(ours[key], expected, rtol=ROUNDING, atol=0)
            assert theirs[key] < 0.8 * expected
            assert theirs[key] < 0.8 * ours[key]
        else:
            torch.testing.assert_close(ours[key], theirs[key], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("form", ROUTES)
@pytest.mark.parametrize("name", SOURCES)
def test_both_descriptions_of_the_quantization_equal_those_of_modelopt(name: str, form: str, exported: dict) -> None:
    """Of which modules are left alone, too: routers, and nothing of experts or latent attention. `group_size` is in ours
    of config.json on purpose: vLLM and SGLang look for it there.
    """
    (nested, flat), (theirs_nested, theirs_flat) = (
        descriptions(folder) for folder in (exported[name, form], MODELS / f"{name}-{ROUTES[form]}")
    )
    assert nested == theirs_nested
    assert flat == theirs_flat | ({"group_size": 16} if form == "nvfp4" else {})
    alone = flat["ignore"]
    routers = [f"model.layers.{layer}.mlp.gate" for layer in ((0, 1) if name == "qwen3moe" else (1,))]
    assert alone == ["lm_head", "model.embed_tokens", *routers]


def test_latent_attention_is_left_as_it_was_and_named_unless_it_is_asked_for(
    measured: dict, ranks: Ranks, tmp_path: Path
) -> None:
    export(ranks, 4, *TOPOLOGY, "--hf-model", SOURCES["deepseekv3"], "--format", "nvfp4", "--load-calibration",
        measured["deepseekv3"], "--output", tmp_path / "out")  # fmt: skip
    ours, source, theirs = tensors(tmp_path / "out"), tensors(SOURCES["deepseekv3"]), golden("deepseekv3", "nvfp4")
    attention = {key: tensor for key, tensor in source.items() if ".self_attn." in key}
    assert_same({key: tensor for key, tensor in ours.items() if ".self_attn." in key}, attention)
    linears = [key.removesuffix(".weight") for key in attention if key.endswith(("_proj.weight", "_mqa.weight"))]
    assert len(linears) == 10
    assert {ours[f"{linear}.weight"].dtype for linear in linears} == {torch.bfloat16}
    (nested, flat), (theirs_nested, theirs_flat) = map(descriptions, (tmp_path / "out", MODELS / "deepseekv3-NVFP4"))
    assert nested["exclude_modules"] == sorted([*theirs_nested["exclude_modules"], *linears])
    assert flat["ignore"] == sorted([*theirs_flat["ignore"], *linears])
    rest = [key for key in theirs if ".self_attn." not in key and not key.endswith("input_scale")]
    assert len(rest) > 40
    assert [key for key in rest if not same(ours[key], theirs[key])] == []
