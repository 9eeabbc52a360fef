"""Layers that predict one more token: HF numbers them after the decoder's and copies embedding and output layer into each."""

from pathlib import Path

import pytest

from ..export.test_topologies import calibration_flags, export
from ..support.models import add_mtp, assert_same, make_model, read_json, same, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, refused

pytestmark = pytest.mark.whole

LAYER = "model.layers.4."
TOPOLOGIES = {"tp2": ("--tp", 2), "pp2": ("--pp", 2), "ep2": ("--ep", 2), "pp2vpp2": ("--pp", 2, "--vpp", 2)}


@pytest.fixture(scope="module", params=["deepseek_v3", "glm4_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, and one that predicts."""
    folder = make_model(tmp_path_factory.mktemp("mtp"), request.param)
    add_mtp(folder)
    return folder


def test_bf16_gives_back_the_predicting_layer_and_its_copies(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    export(ranks, 2, "--ep", 2, "--hf-model", source, "--format", "bf16", "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(source))
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 1


def test_every_topology_writes_one_quantized_predicting_layer(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    common = ("--hf-model", source, "--format", "nvfp4_awq")
    measured = (*common, *calibration_flags(source), "--save-calibration", file)
    export(ranks, 1, *measured, "--output", tmp_path / "one")
    one = tensors(tmp_path / "one")
    for expert in range(4):
        assert one[f"{LAYER}mlp.experts.{expert}.down_proj.input_scale"] > 0
    assert same(one[f"{LAYER}eh_proj.weight"], tensors(source)[f"{LAYER}eh_proj.weight"])
    excluded = read_json(tmp_path / "one" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert {f"{LAYER}eh_proj", f"{LAYER}embed_tokens", f"{LAYER}shared_head.head", f"{LAYER}mlp.gate"} <= set(excluded)
    for name, sizes in TOPOLOGIES.items():
        export(ranks, 2, *common, "--load-calibration", file, *sizes, "--output", tmp_path / name)
        assert_same(tensors(tmp_path / name), one)


def test_a_dropped_layer_leaves_no_trace(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--hf-model", source, "--format", "fp8", *calibration_flags(source), "--mtp", "drop")
    export(ranks, 2, *flags, "--tp", 2, "--output", tmp_path / "out")
    assert not any(name.startswith(LAYER) for name in tensors(tmp_path / "out"))
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 0
    excluded = read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert not any(name.startswith(LAYER) for name in excluded)


def test_an_excluded_layer_stays_in_bfloat16_and_engines_are_told(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--hf-model", source, "--format", "fp8", *calibration_flags(source), "--exclude", f"{LAYER}*")
    export(ranks, 1, *flags, "--output", tmp_path / "out")
    written, given = tensors(tmp_path / "out"), tensors(source)
    for name in [name for name in given if name.startswith(LAYER)]:
        assert same(written[name], given[name])
    excluded = read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert f"{LAYER}mlp.experts.3.down_proj" in excluded


def test_a_layer_that_the_config_means_and_the_files_lack_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path / "models", "deepseek_v3", num_nextn_predict_layers=1)
    said = refused(ranks, tmp_path, "--hf-model", source, "--format", "bf16", "--output", tmp_path / "place" / "out")
    assert_says(said, f"tensor {LAYER}eh_proj.weight is missing", "--mtp drop")
