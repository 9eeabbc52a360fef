"""Models whose ranks share each sample (context parallelism): they are exported as they are, and calibrated elsewhere."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from megatron.core import parallel_state

from megatron_export import calibrate, export_hf_checkpoint

from ..support.live import batches, loaded, refusal
from ..support.models import assert_same, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole


def export_and_calibrate(source: Path, out: Path, sizes: dict) -> tuple[int, str]:
    """In a rank of a world whose context-parallel size is 2: export, and what calibrating is answered."""
    start = partial(parallel_state.initialize_model_parallel, context_parallel_size=2)
    with (
        mock.patch.object(parallel_state, "initialize_model_parallel", start),
        loaded(source, **sizes) as (model, here),
    ):
        export_hf_checkpoint(model, out, hf_model=source, format="fp8_pb")
        return here.cp_size, refusal(calibrate, model, batches(source))


@pytest.mark.parametrize(("name", "world", "sizes"), [("llama31", 2, {}), ("qwen3_moe", 4, {"tp": 2})])
def test_context_parallel_ranks_are_replicas_to_an_export(
    name: str, world: int, sizes: dict, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    answers = ranks.call(world, export_and_calibrate, models[name], tmp_path / "two", sizes)
    ranks.call(1, export_alone, models[name], tmp_path / "one")
    assert_same(tensors(tmp_path / "two"), tensors(tmp_path / "one"))
    assert {size for size, _ in answers} == {2}
    [said] = {said for _, said in answers}
    assert said.startswith("the ranks share each sample (context parallelism, 2), so no rank sees whole ones")
    assert "save_calibration" in said


def export_alone(source: Path, out: Path) -> None:
    with loaded(source) as (model, _):
        export_hf_checkpoint(model, out, hf_model=source, format="fp8_pb")
