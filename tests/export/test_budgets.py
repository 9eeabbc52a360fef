"""A budget's choice: from one saved file the same recipe and the same bytes on every topology, and by its recipe again."""

from pathlib import Path

import pytest

from megatron_export import (
    ExportError,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    load_calibration,
    plan_hf_tensors,
)

from ..support.live import loaded
from ..support.models import assert_same, contents, make_model, read_json, tensors
from ..support.ranks import Ranks, command, living
from .test_topologies import calibration_flags, export

pytestmark = pytest.mark.whole

BUDGET = ("--effective-bits", 6, "--kv-cache", "fp8")
TOPOLOGIES = {
    "llama31": ((2, "--tp", 2), (2, "--pp", 2), (4, "--tp", 2, "--pp", 2), (2,)),
    "qwen3_moe": ((2, "--ep", 2), (4, "--tp", 2, "--ep", 2)),
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def alone(
    request: pytest.FixtureRequest, models: dict, pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A model, and the folder of what one rank measured and wrote of it."""
    folder, name = tmp_path_factory.mktemp("budget"), request.param
    source = models[name] if name in models else make_model(folder, name)
    export(living(pool), 1, "--hf-model", source, *BUDGET, *calibration_flags(source),
           "--save-calibration", folder / "c.safetensors", "--output", folder / "out")  # fmt: skip
    return name, source, folder


def test_one_file_gives_the_same_choice_and_the_same_bytes_on_every_topology(
    alone: tuple[str, Path, Path], ranks: Ranks, tmp_path: Path
) -> None:
    name, source, folder = alone
    for number, (world, *sizes) in enumerate(TOPOLOGIES[name]):
        out = tmp_path / str(number)
        export(ranks, world, "--hf-model", source, *BUDGET, *sizes, "--load-calibration", folder / "c.safetensors",
               "--output", out)  # fmt: skip
        assert contents(out) == contents(folder / "out")


def test_its_recipe_writes_the_same_bytes_and_another_budget_needs_no_data(
    alone: tuple[str, Path, Path], ranks: Ranks, tmp_path: Path
) -> None:
    _, source, folder = alone
    loaded = ("--hf-model", source, "--load-calibration", folder / "c.safetensors", "--output")
    export(ranks, 1, "--recipe", folder / "out" / "recipe.yaml", *loaded, tmp_path / "again")
    assert_same(tensors(tmp_path / "again"), tensors(folder / "out"))
    assert read_json(tmp_path / "again" / "config.json") == read_json(folder / "out" / "config.json")
    assert not (tmp_path / "again" / "recipe.yaml").exists()
    export(ranks, 1, "--effective-bits", 12, *loaded, tmp_path / "larger")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder / "out", tmp_path / "larger")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--effective-bits", 4), 1, "--effective-bits 4 cannot be met"),
        (("--effective-bits", 6, "--from", "mxfp8,bf16"), 1, "cannot be met: with --from mxfp8,bf16 this model takes 8.250"),
        (("--effective-bits", 9, "--from", "mxfp8,bf16"), 1, "has no decoder.layers.0.mlp.linear_fc1.sensitivity.mxfp8"),
        (("--effective-bits", 6, "--dry-run"), 0, ""),
    ],
)  # fmt: skip
def test_a_file_without_what_the_budget_needs_is_refused(
    flags: tuple, status: int, said: str, alone: tuple[str, Path, Path], ranks: Ranks, tmp_path: Path
) -> None:
    name, source, folder = alone
    if name == "llama31":
        loaded = ("--load-calibration", folder / "c.safetensors", "--output", tmp_path / "out")
        [(found, text)] = ranks.call(1, command, "--device", "cpu", "--hf-model", source, *loaded, *flags)
        assert found == status, text
        assert said in text
        assert not (tmp_path / "out").exists()


def live(source: Path, statistics: Path, folder: Path) -> None:
    """In a rank: the same by the library, at once and in the background."""
    with loaded(source) as (model, _):
        found = load_calibration(statistics, read_json(source / "config.json"))
        asked = {"hf_model": source, "effective_bits": 6, "kv_cache": "fp8", "calibration": found}
        export_hf_checkpoint(model, folder / "live", **asked)
        export_hf_checkpoint_async(model, folder / "later", **asked).wait()
        with pytest.raises(ExportError, match="effective_bits needs calibration"):
            plan_hf_tensors(model, hf_model=source, effective_bits=6)


def test_the_library_chooses_and_writes_the_same(alone: tuple[str, Path, Path], ranks: Ranks, tmp_path: Path) -> None:
    _, source, folder = alone
    ranks.call(1, live, source, folder / "c.safetensors", tmp_path)
    assert contents(tmp_path / "live") == contents(tmp_path / "later") == contents(folder / "out")
