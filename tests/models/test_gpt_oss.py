"""GPT-OSS: experts with biases, stacked with rows of gate and up in turn: the same bytes on every topology."""

from pathlib import Path

import pytest

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.calibration import statistics

from ..support.experts import assert_stacked
from ..support.live import batches, loaded
from ..support.models import assert_same, behind, contents, read_json, same, tensors
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused

pytestmark = pytest.mark.whole

FORMS = ("bf16", "fp8", "nvfp4")
TOPOLOGIES = {  # on two ranks
    "tp2": {"tp": 2, "etp": 1},
    "ep2": {"ep": 2},
    "pp2": {"pp": 2},
    "tp2 ep2": {"tp": 2, "ep": 2, "etp": 1},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
}


def exports(source: Path, out: Path, sizes: dict) -> None:
    """In a rank: every format, from the calibration file beside `out`, which one rank alone writes."""
    config, file = read_json(source / "config.json"), out.parent / "calibration.safetensors"
    with loaded(source, **sizes) as (model, _):
        if not file.exists():
            statistics.save(calibrate(model, batches(source)), file, config)
        measured = statistics.load(file, config)
        for form in FORMS:
            options = {} if form == "bf16" else {"calibration": measured, "kv_cache": "fp8"}
            export_hf_checkpoint(model, out / form, hf_model=source, format=form, **options)


@pytest.fixture(scope="module")
def alone(pool: list[Ranks], models: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank exports, by format."""
    out = tmp_path_factory.mktemp("gpt_oss") / "alone"
    living(pool).call(1, exports, models["gpt_oss"], out, {})
    return out


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_topologies_write_equal_files(topology: str, alone: Path, ranks: Ranks, models: dict, tmp_path: Path) -> None:
    (tmp_path / "calibration.safetensors").write_bytes((alone.parent / "calibration.safetensors").read_bytes())
    ranks.call(2, exports, models["gpt_oss"], tmp_path / "out", TOPOLOGIES[topology])
    for form in FORMS:
        assert contents(tmp_path / "out" / form) == contents(alone / form)


def test_bf16_gives_back_every_tensor_of_the_source_bit_for_bit(alone: Path, models: dict) -> None:
    assert_same(tensors(alone / "bf16"), tensors(models["gpt_oss"]))


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_a_stack_holds_each_experts_codes_in_hfs_order(form: str, stack: str, alone: Path, models: dict) -> None:
    prefix = f"model.layers.0.mlp.experts.{stack}"
    original = tensors(models["gpt_oss"])
    found = behind(prefix, tensors(alone / form))
    assert same(found["_bias"], original[f"{prefix}_bias"])
    assert_stacked(found, original[prefix], form)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "nvfp4_awq"), "cannot be smoothed. For this architecture there are bf16, fp8, nvfp4 and mxfp4"),
        (("--format", "fp8_pb"), "no engine loads it"),
        (("--format", "w4a8_mxfp4_fp8"), "no engine loads it"),
        (
            ("--format", "mxfp4", "--set", "*.self_attn.*=fp8"),
            "this architecture's own mxfp4 and fp8: no config says both",
        ),
        (("--format", "mxfp4", "--kv-cache", "fp8", "--kv-scale", 1), "no engine reads scales of a cache beside"),
        (
            ("--format", "mxfp4", "--exclude", "model.layers.0.mlp.experts.*"),
            "some experts in this architecture's own mxfp4 and others not",
        ),
        (("--format", "bf16", "--tp", 2), "--etp 2: Megatron-Core cuts no experts with biases. Give --etp 1"),
    ],
)
def test_what_cannot_be_done_is_said(flags: tuple, message: str, ranks: Ranks, models: dict, tmp_path: Path) -> None:
    said = refused(ranks, tmp_path, "--hf-model", models["gpt_oss"], "--output", tmp_path / "out", *flags)
    assert_says(said, message)
