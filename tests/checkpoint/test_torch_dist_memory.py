"""Memory of an export from a checkpoint is bounded: neither a model nor the checkpoint is ever held."""

from pathlib import Path
from unittest import mock

import pytest

from megatron_export import export_hf_checkpoint
from megatron_export.checkpoint.torch_dist import MegatronCheckpoint
from megatron_export.checkpoint.torch_dist_iteration import find_iteration
from megatron_export.planning import shard_files

from ..export.test_memory import BUCKET, CONFIG, measure, resident
from ..support.live import blank, world
from ..support.models import EXAMPLE
from ..support.ranks import Ranks
from ..support.saving import save

pytestmark = pytest.mark.whole


def save_random(folder: Path, layers: int) -> None:
    """In a rank: a model of so many layers, 3.5 million numbers each."""
    config = CONFIG | {"num_hidden_layers": layers}
    with blank(config) as (model, _):
        save(model, folder, config)


def peak_of_export(saved: Path, folder: Path, layers: int) -> int:
    """Bytes by which this rank's memory rose during an fp8_pb export of a checkpoint, opening it included."""
    config = CONFIG | {"num_hidden_layers": layers}
    with (
        world(),
        mock.patch.object(shard_files, "BUCKET_BYTES", BUCKET),
        mock.patch("megatron_export.checkpoint.original.read_config", lambda *_, **__: config),
    ):
        before = measure()
        checkpoint = MegatronCheckpoint(find_iteration(saved, None), config)
        export_hf_checkpoint(checkpoint, folder, hf_model=EXAMPLE, format="fp8_pb")
        return resident("VmHWM") - before


def test_a_checkpoint_larger_than_the_memory_that_is_taken_is_exported(tmp_path: Path) -> None:
    """24 layers weigh 180 MB, 21 of them 160 MB; 16 MB are left for what differs between runs (5 MB seen)."""
    saving = Ranks(1)
    for layers in (3, 24):
        saving.call(1, save_random, tmp_path / f"saved{layers}", layers)
    saving.close()
    size = sum(path.stat().st_size for path in (tmp_path / "saved24").rglob("*.distcp"))
    ranks = Ranks(1)
    few = [ranks.call(1, peak_of_export, tmp_path / "saved3", tmp_path / f"few{run}", 3)[0] for run in range(2)]
    (many,) = ranks.call(1, peak_of_export, tmp_path / "saved24", tmp_path / "many", 24)
    ranks.close()
    assert many < max(few) + (16 << 20), (few, many)
    assert many < size // 2, (many, size)
