"""The same bytes on every topology: tensor, pipeline and data parallel, gloo on the CPU, given one calibration file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ..support.models import DENSE, LENGTH, SAMPLES, assert_same, contents, read_json, tensors
from ..support.ranks import Ranks, command, living

pytestmark = pytest.mark.whole

TOPOLOGIES = {
    "tp2": ("--tp", 2),
    "pp2": ("--pp", 2),
    "tp2pp2": ("--tp", 2, "--pp", 2),
    "dp2": (),
    "tp4": ("--tp", 4),  # a quarter of the down projection's input holds no whole block of nvfp4: gathered first
}
WORLD = {"tp2": 2, "pp2": 2, "tp2pp2": 4, "dp2": 2, "tp4": 4}


def export(ranks: Ranks, world: int, *flags: object) -> str:
    """Run the command on `world` ranks; returns what rank 0 said."""
    results = ranks.call(world, command, "--device", "cpu", *flags)
    assert [status for status, _ in results] == [0] * world, results
    assert [text for _, text in results[1:]] == [""] * (world - 1)
    return results[0][1]


def calibration_flags(source: Path) -> tuple:
    ids = source.parent / "ids" / "calibration.safetensors"
    return ("--calib-data", ids, "--calib-samples", SAMPLES, "--calib-seq-len", LENGTH)


@pytest.fixture(scope="module")
def references(models: dict[str, Path], pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per architecture, a folder with the calibration file and the exports of one rank alone."""
    ranks, folders = living(pool), {}
    for name in DENSE:
        source = models[name]
        folder = folders[name] = tmp_path_factory.mktemp(name)
        saved = ("--save-calibration", folder / "calibration.safetensors")
        export(ranks, 1, "--hf-model", source, "--format", "fp8", "--kv-cache", "fp8", "--output", folder / "fp8",
               *calibration_flags(source), *saved)  # fmt: skip
        export(ranks, 1, *loading(source, "nvfp4", folder), "--output", folder / "nvfp4")
        export(ranks, 1, "--hf-model", source, "--format", "bf16", "--output", folder / "bf16")
    return folders


def loading(source: Path, form: str, folder: Path) -> tuple:
    if form == "bf16":
        return ("--hf-model", source, "--format", form)
    loaded = ("--load-calibration", folder / "calibration.safetensors")
    return ("--hf-model", source, "--format", form, "--kv-cache", "fp8", *loaded)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("form", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("name", DENSE)
def test_every_topology_writes_the_same_files_as_one_rank(
    name: str, form: str, topology: str, models: dict, references: dict, ranks: Ranks, tmp_path: Path
) -> None:
    flags = loading(models[name], form, references[name])
    said = export(ranks, WORLD[topology], *flags, *TOPOLOGIES[topology], "--output", tmp_path / "out")
    alone = references[name] / form
    assert_same(tensors(tmp_path / "out"), tensors(alone))
    assert contents(tmp_path / "out") == contents(alone)
    assert ("gathered first    4 of" in said) == (topology == "tp4" and form == "nvfp4"), said


@pytest.mark.parametrize("name", DENSE)
def test_bf16_gives_back_every_tensor_of_the_source_bit_for_bit(name: str, models: dict, references: dict) -> None:
    assert_same(tensors(references[name] / "bf16"), tensors(models[name]))
    assert "quantization_config" not in read_json(references[name] / "bf16" / "config.json")
    assert not (references[name] / "bf16" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("name", DENSE)
def test_fused_linears_share_every_scale(name: str, references: dict) -> None:
    for form, scales in (("fp8", ("weight_scale", "input_scale")), ("nvfp4", ("weight_scale_2", "input_scale"))):
        found = tensors(references[name] / form)
        for layer in range(4):
            for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
                for scale in scales:
                    values = {found[f"model.layers.{layer}.{part}_proj.{scale}"].item() for part in fused}
                    assert len(values) == 1
                    assert min(values) > 0


@pytest.mark.parametrize(("topology", "batch"), [("pp2", 4), ("dp2", 4), ("tp2", 4), ("tp2pp2", 1), ("dp2", 3)])
@pytest.mark.parametrize("name", ["llama31", "qwen2", "qwen3"])
def test_statistics_agree_with_those_of_one_rank(
    name: str, topology: str, batch: int, models: dict, references: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """Equal where every matrix product is the same one: stages and replicas of the same micro-batches.

    Under tensor parallelism a row-parallel product sums its halves in another order, and a product of another batch
    size may block its sums otherwise. Both round to bfloat16 (8 bits) afterwards: differences of one ulp, 2^-8, enter
    at every layer and pass through the layers after it. 8 ulp bounds what four layers of random weights showed (4.3).
    """
    file = tmp_path / "calibration.safetensors"
    export(ranks, WORLD[topology], "--hf-model", models[name], *calibration_flags(models[name]), *TOPOLOGIES[topology],
           "--calib-batch-size", batch, "--save-calibration", file, "--output", tmp_path / "out")  # fmt: skip
    alone, here = load_file(references[name] / "calibration.safetensors"), load_file(file)
    assert sorted(alone) == sorted(here)
    same_products = topology in ("pp2", "dp2") and batch == 4
    for key in alone:
        torch.testing.assert_close(here[key], alone[key], rtol=0 if same_products else 8 * 2**-8, atol=0)
