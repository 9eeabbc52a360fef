"""A world without Megatron: parameters cut over all ranks of torch.distributed come out as the bytes of Megatron's tensor
parallelism; one process starts a world and ends it; a rank that fails alone is told of.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_export import calibrate, load_calibration
from megatron_export.checkpoint.original import read_original
from megatron_export.checkpoint.torch_dist import MegatronCheckpoint
from megatron_export.common.errors import ExportError, RankLost
from megatron_export.common.progress import quiet
from megatron_export.distributed import collectives, world
from megatron_export.export.origins import Stored
from megatron_export.export.pipeline import Clock, exported
from megatron_export.export.prepare import open_export
from megatron_export.planning.request import Request

from ..support.live import batches, loaded
from ..support.models import assert_same, read_json, tensors
from ..support.ranks import Ranks
from ..support.saving import PLACE, export_and_save

FORMS = ("fp8_pb", "nvfp4")


def save_and_export(source: Path, folder: Path) -> None:
    """In a rank: export a model in two formats with Megatron, and save it."""
    with loaded(source) as (model, _):
        export_and_save(model, source, folder, FORMS, alike=False)


def export_plain(source: Path, folder: Path) -> list[tuple]:
    """In a rank: export the saved model where only torch.distributed is initialized; returns each topology's sizes."""
    config = read_json(source / "config.json")
    dist.init_process_group("gloo")
    try:
        sizes = []
        for form in FORMS:
            given = load_calibration(folder / "calibration.safetensors", config) if form == "nvfp4" else None
            with world.plain(60) as here:
                origin, original = (
                    Stored(MegatronCheckpoint(folder / "saved" / PLACE, config)),
                    read_original(source, "keep", weights=False, own=False),
                )
                target = folder / f"plain {form}"
                opening = open_export(here, origin, original, Request(format=form), given, target)
                exported(here, opening, target, Clock(), None, None, lambda folder: None, quiet)
                sizes.append((here.rank, here.sizes))
        assert len(dist.distributed_c10d._world.pg_map) == 1, "a group was left behind"
        return sizes
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama31", "mixtral"])
@pytest.mark.parametrize("size", [2, 4])
def test_parameters_cut_over_all_ranks_become_the_same_bytes(
    name: str, size: int, models: dict[str, Path], ranks: Ranks, tmp_path: Path
) -> None:
    """Those of experts too, whose amaxes all ranks agree on."""
    ranks.call(1, save_and_export, models[name], tmp_path)
    everywhere = ranks.call(size, export_plain, models[name], tmp_path)
    one = {"world": size, "tp": size, "pp": 1, "vpp": 1, "cp": 1, "dp": 1, "ep": 1, "etp": size}
    assert everywhere == [[(rank, one)] * len(FORMS) for rank in range(size)]
    for form in FORMS:
        assert_same(tensors(tmp_path / f"plain {form}"), tensors(tmp_path / form))


def agreed() -> tuple[float, float, list[int]]:
    """In a rank: the maximum of all ranks' numbers over replicas, and over a cut; and what is joined over a cut."""
    dist.init_process_group("gloo")
    try:
        mine = torch.tensor([float(dist.get_rank())])
        with world.plain(60, replicas=True) as here:
            assert torch.equal(collectives.whole(here.cut(False), mine, 0), mine)
            over_replicas = collectives.maximum(mine.clone(), here.dp_group).item()
        with world.plain(60) as here:
            over_cut = collectives.maximum(mine.clone(), here.dp_group).item()
            joined = collectives.whole(here.cut(True), mine, 0).tolist()
        return over_replicas, over_cut, joined
    finally:
        dist.destroy_process_group()


def test_replicas_agree_on_what_they_saw_and_shards_are_joined(ranks: Ranks) -> None:
    assert ranks.call(3, agreed) == [(2.0, float(rank), [0.0, 1.0, 2.0]) for rank in range(3)]


def fail_alone() -> str:
    """In a rank: leave, or lose, a world in which rank 1 raises."""
    dist.init_process_group("gloo")
    try:
        with world.plain(5) as here:
            if here.rank:
                raise ExportError("no such layer")
            dist.barrier(group=here.control)
    except RankLost as error:
        return str(error)
    except ExportError as error:
        return f"mine: {error}"
    finally:
        dist.destroy_process_group()
    return "nothing happened"


def test_a_rank_that_fails_alone_is_told_of(ranks: Ranks) -> None:
    lost, mine = ranks.call(2, fail_alone)
    assert lost == "rank 1 failed to start: no such layer"
    assert mine == "mine: no such layer"


def test_a_process_alone_starts_a_world_and_ends_it() -> None:
    with world.plain(5) as here:
        assert dist.is_initialized()
        assert (here.rank, here.world, here.device) == (0, 1, torch.device("cpu"))
        assert collectives.everyone(here, "me") == ["me"]
    assert not dist.is_initialized()
    with pytest.raises(ExportError, match="no such layer"), world.plain(5):
        raise ExportError("no such layer")
    assert not dist.is_initialized()


def calibrated(source: Path) -> None:
    """In a rank: a model whose rotary embeddings Megatron-Core keeps in a cache, and its groups with them."""
    with loaded(source, tp=2) as (model, _):
        calibrate(model, batches(source), format="fp8")


def threads() -> list[str]:
    """In a rank: the names of its threads."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def test_the_threads_of_a_world_end_with_it(models: dict[str, Path], ranks: Ranks) -> None:
    """In the ranks of these tests, which are many worlds one after another: what one left would slow down all later ones."""
    ranks.call(2, calibrated, models["llama31"])
    assert [name for names in ranks.call(2, threads) for name in names if "gloo" in name] == []
