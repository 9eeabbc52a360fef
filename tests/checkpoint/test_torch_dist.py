"""Checkpoints that Megatron-Core saved, at one parallelism and exported at another: the bytes of the live model."""

import json
from pathlib import Path

import pytest

from ..export.test_topologies import calibration_flags, export
from ..support.live import loaded
from ..support.models import add_mtp, assert_same, make_model, tensors
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused
from ..support.saving import assert_keys, export_and_save, reading, saved_model, without_weights

pytestmark = pytest.mark.whole

FORMS = ("bf16", "fp8_pb", "nvfp4_awq")
# How it was saved: model, ranks, sizes, what else; and the sizes that it is read at.
SAVED: dict[str, tuple[str, int, dict, dict]] = {
    "dense": ("llama32", 4, {"tp": 2, "pp": 2}, {"optimizer": True}),
    "moe": ("qwen3_moe", 2, {"ep": 2}, {"optimizer": True}),
    "moe of equal layers": ("mixtral", 4, {"tp": 2, "ep": 2}, {}),
    "moe of single experts": ("mixtral", 2, {"tp": 2}, {"metadata": {"singleton_local_shards": True}}),
    "mla": ("deepseek_v3", 2, {"pp": 2, "vpp": 2}, {"optimizer": True}),
}
READ: dict[str, tuple[tuple, ...]] = {
    "dense": (("--tp", 2), ("--pp", 2)),
    "moe": (("--tp", 2), ("--pp", 2)),
    "moe of equal layers": ((), ("--ep", 2)),
    "moe of single experts": (("--ep", 2),),
    "mla": (("--tp", 2), ("--ep", 2)),
}


def save_and_export(source: Path, folder: Path, sizes: dict, alike: bool, how: dict) -> None:
    """In a rank: calibrate a model, export it in every form, and save it."""
    with loaded(source, **sizes) as (model, _):
        export_and_save(model, source, folder, FORMS, alike, how=how)


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with the checkpoint, the model's exports, their calibration, and an HF folder without weights."""
    folders = {}
    for case, (name, world, sizes, how) in SAVED.items():
        base = tmp_path_factory.mktemp("saved")
        source = make_model(base, name)
        if name == "deepseek_v3":
            add_mtp(source)
        living(pool).call(world, save_and_export, source, base / "live", sizes, case == "moe of equal layers", how)
        without_weights(source, base / "live" / "hf")
        folders[case] = base / "live"
    return folders


KEYS = {
    "dense": {"decoder.layers.mlp.linear_fc1.weight": (4, 192, 64)},
    "moe": {"decoder.layers.0.mlp.experts.experts.linear_fc1.weight": (4, 96, 64)},
    "moe of equal layers": {"decoder.layers.mlp.experts.experts.linear_fc1.weight": (4, 4, 192, 64)},
    "moe of single experts": {
        "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_w": (96, 64),
        "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_v": (96, 64),
    },
    "mla": {"mtp.layers.0.transformer_layer.self_attention.linear_q_down_proj.weight": (48, 64)},
}


def test_megatron_spells_keys_in_all_the_ways_that_are_read(saved: dict) -> None:
    """Also: what training needs beside the model is there where a case means it."""
    for case, found in assert_keys(KEYS, saved).items():
        moments = [key for key in found if key.startswith("optimizer.state.exp_avg.")]
        assert bool(moments) is SAVED[case][3].get("optimizer", False)


@pytest.mark.parametrize(("case", "sizes"), [(case, sizes) for case, found in READ.items() for sizes in found], ids=str)
def test_a_checkpoint_exports_the_bytes_of_the_model_that_was_saved(
    case: str, sizes: tuple, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for form in FORMS:
        said = export(ranks, 2, *reading(saved[case], form), *sizes, "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(saved[case] / form))
        assert "load " not in said  # no model was built
    assert_same(tensors(tmp_path / "bf16"), tensors(saved[case].parent / SAVED[case][0]))


@pytest.mark.parametrize("name", ["qwen2", "glm4_moe", "llama4", "gpt_oss"])
def test_other_architectures_come_back_bit_for_bit(name: str, models: dict, ranks: Ranks, tmp_path: Path) -> None:
    sizes = {"tp": 2} if name == "qwen2" else {"ep": 2}
    ranks.call(2, saved_model, models[name], tmp_path / "saved", sizes)
    without_weights(models[name], tmp_path / "hf")
    export(ranks, 2, *reading(tmp_path, "bf16"), "--pp", 2, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(models[name]))


@pytest.mark.parametrize("sizes", [("--tp", 2), ("--pp", 2)], ids=str)
def test_a_model_that_is_calibrated_is_filled_from_the_checkpoint(
    sizes: tuple, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """Tied, so that the last pipeline stage has a copy of the embedding to fill."""
    folder = saved["dense"]
    source = folder.parent / "llama32"
    common = ("--format", "fp8", *calibration_flags(source), *sizes)
    export(ranks, 2, "--hf-model", source, *common, "--output", tmp_path / "hf")
    said = export(ranks, 2, *reading(folder), *common, "--output", tmp_path / "out")
    assert "load " in said
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


def test_a_dry_run_reads_no_tensors_and_tells_what_is_then_written(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    flags = (*reading(saved["mla"], "fp8_pb"), "--tp", 2)
    dry = export(ranks, 2, *flags, "--dry-run").splitlines()
    real = export(ranks, 2, *flags, "--output", tmp_path / "out").splitlines()
    assert {"format", "written"} <= {line.split("  ")[0] for line in real if line in dry}
    held = json.loads((tmp_path / "out" / "export_manifest.json").read_text())
    assert held["run"]["megatron_checkpoint"] == "saved"


def test_layers_that_predict_can_be_dropped(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    export(ranks, 2, *reading(saved["mla"], "bf16"), "--tp", 2, "--mtp", "drop", "--output", tmp_path / "out")
    full = tensors(saved["mla"] / "bf16")
    assert_same(tensors(tmp_path / "out"), {n: t for n, t in full.items() if not n.startswith("model.layers.4.")})


def test_an_iteration_that_is_not_there_is_refused_by_every_rank(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    said = refused(ranks, tmp_path, *reading(saved["dense"], "bf16"), "--output", tmp_path / "out", "--iteration", 3)
    assert_says(said, f"{saved['dense'] / 'saved'} has no iter_0000003. There are iter_0000007")
