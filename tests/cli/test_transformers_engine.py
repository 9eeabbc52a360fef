"""`--engine transformers`: in one process and on the ranks of FSDP2, the bytes of Megatron's model; all else is refused."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_export.calibration.statistics import load

from ..calibration.test_transformers import differing
from ..export.test_topologies import calibration_flags, export
from ..support.models import add_mtp, assert_same, contents, make_model, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, refused

HERE = ("--engine", "transformers")


@pytest.mark.parametrize("name", ["llama31", "qwen3_moe"])
def test_the_bytes_are_those_of_megatrons_model(
    name: str, models: dict[str, Path], ranks: Ranks, tmp_path: Path
) -> None:
    """With the statistics that it measured; its own, of two ranks that share the data, are those of one rank."""
    source, kept = models[name], tmp_path / "kept.safetensors"
    flags = ("--hf-model", source, "--format", "nvfp4", "--kv-cache", "fp8")
    data = (*calibration_flags(source), "--calib-batch-size", 2)
    export(ranks, 1, *flags, *data, "--save-calibration", kept, "--output", tmp_path / "megatron")
    for world in (1, 2):
        given = (*flags, *HERE, "--load-calibration", kept, "--output", tmp_path / f"{world}")
        export(ranks, world, *given)
        assert_same(tensors(tmp_path / f"{world}"), tensors(tmp_path / "megatron"))
    left, right = (contents(tmp_path / out)["export_manifest.json"] for out in ("megatron", "1"))
    assert left["identity"] == right["identity"]
    for world in (1, 2):
        own = ("--save-calibration", tmp_path / f"{world}.safetensors", "--output", tmp_path / f"own {world}")
        export(ranks, world, *flags, *HERE, *data, *own)
    config = read_json(source / "config.json")
    one, two = (load(tmp_path / f"{world}.safetensors", config) for world in (1, 2))
    assert differing(two, one) == []
    assert read_json(tmp_path / "own 2" / "export_manifest.json")["run"]["engine"] == "transformers"


def test_a_dry_run_loads_nothing(models: dict[str, Path], ranks: Ranks) -> None:
    said = export(ranks, 2, "--hf-model", models["llama31"], "--format", "fp8_pb", *HERE, "--dry-run")
    assert "format            fp8_pb" in said and "load " not in said


def test_what_it_does_not_do_is_refused(models: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    source, output = models["llama31"], tmp_path / "place" / "out"
    flags = ("--hf-model", source, "--format", "nvfp4", *HERE, *calibration_flags(source), "--output", output)
    sizes = refused(ranks, tmp_path, *flags, "--pp", 2, status=2)
    assert_says(sizes, "--pp has no effect with --engine transformers. Leave one out")
    uneven = refused(ranks, tmp_path, *flags, "--calib-batch-size", 3)
    assert_says(uneven, "FSDP2 gathers each layer on all ranks at once, so each of these 2 needs as many micro-batches")
    assert find_spec("accelerate") is None, "say then what --tp does"
    assert_says(refused(ranks, tmp_path, *flags, "--tp", 2), "needs accelerate, as transformers says")


def test_layers_that_predict_are_dropped_when_asked(ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, "deepseek_v3")
    add_mtp(source)
    flags = ("--hf-model", source, "--format", "bf16", *HERE, "--output", tmp_path / "out")
    assert_says(refused(ranks, tmp_path, *flags), "transformers leaves out layers that predict one more token")
    export(ranks, 1, *flags, "--mtp", "drop")
    whole = {name: tensor for name, tensor in tensors(source).items() if not name.startswith("model.layers.4.")}
    assert_same(tensors(tmp_path / "out"), whole)
