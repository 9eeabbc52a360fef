"""Strips of rows of large parameters: the same bytes as whole ones, and nothing larger than a strip is encoded at a time."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_export import export_hf_checkpoint, iter_hf_tensors
from megatron_export.calibration.lookup import needed_by
from megatron_export.common.piece import Axis
from megatron_export.planning import shard_files

from ..support.live import loaded
from ..support.models import assert_same, contents, read_json, tensors
from ..support.plans import plan_of
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

LIMIT = 6_000
CASES = [  # model, format, what is set besides, topology, along what large parameters are cut there
    ("llama31", "bf16", (), {"tp": 2}, {Axis.OUT, Axis.IN}),
    ("llama31", "fp8", ("lm_head=fp8",), {"tp": 2}, {Axis.OUT, Axis.IN}),
    ("llama31", "fp8_pc_pt", ("lm_head=fp8_pc_pt",), {"tp": 4}, {Axis.OUT}),
    ("llama31", "fp8_pb", ("lm_head=fp8_pb",), {"tp": 2}, {Axis.OUT}),
    ("llama31", "fp8_pb", (), {"tp": 1}, {Axis.OUT, Axis.IN}),
    ("llama31", "nvfp4", ("lm_head=mxfp8",), {"tp": 4}, {Axis.OUT}),
    ("llama31", "fp8_pc_pt", ("*.down_proj=mxfp8",), {"tp": 2, "pp": 2}, {Axis.OUT}),
    ("qwen2", "mxfp8", (), {"tp": 2}, {Axis.OUT}),
    ("qwen3_moe", "fp8", (), {"tp": 2, "etp": 1, "ep": 2}, {Axis.OUT, Axis.IN}),
    ("gpt_oss", "bf16", (), {"tp": 2, "etp": 1}, {Axis.OUT, Axis.IN}),
    ("deepseek_v3", "w4a16_nvfp4", (), {"tp": 2}, {Axis.OUT, Axis.IN}),
]
Strip = tuple[str, Axis | None, tuple[int, int], int]


def exported(source: Path, out: Path, asked: dict, sizes: dict, limit: int) -> list[Strip]:
    """In a rank: of each strip, its parameter, along what that is cut, its rows, and its encoded bytes."""
    plan = plan_of(read_json(source / "config.json"), **asked)
    statistics = {name: torch.ones(shape) for item in plan.items for name, shape in needed_by(item).items()}
    with loaded(source, length=1, **sizes) as (model, _), mock.patch.object(shard_files, "BUCKET_BYTES", limit):
        report = export_hf_checkpoint(model, out, hf_model=source, calibration=statistics, sync=False, **asked)
    items = [item for bucket in report.plan.buckets for item in bucket.items]
    return [(item.source.canonical, item.source.cut, item.rows, item.nbytes) for item in items if item.rows]


@pytest.mark.parametrize(
    ("name", "form", "sets", "sizes", "cuts"),
    CASES,
    ids=[" ".join((name, form, *sets)) for name, form, sets, *_ in CASES],
)
def test_strips_make_the_bytes_of_whole_parameters(
    name: str, form: str, sets: tuple, sizes: dict, cuts: set, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    asked = {"format": form, "set": sets} if sets else {"format": form}
    world = max(sizes["tp"] * sizes.get("pp", 1), sizes.get("ep", 1) * sizes.get("etp", 1))
    assert ranks.call(1, exported, models[name], tmp_path / "whole", asked, {"tp": 1}, 1 << 30) == [[]]
    found = ranks.call(world, exported, models[name], tmp_path / "strips", asked, sizes, LIMIT)
    assert contents(tmp_path / "strips") == contents(tmp_path / "whole")
    assert {cut for _, cut, _, _ in found[0]} >= cuts
    assert any(rows[0] for _, _, rows, _ in found[0])
    assert form == "fp8_pb" or max(nbytes for *_, nbytes in found[0]) <= LIMIT  # whose strips have 128 rows at least


def streamed(source: Path) -> list[tuple[str, torch.Tensor]]:
    """In a rank: the tensors that a loop would be given, and whether they are the model's own memory."""
    with loaded(source, length=1) as (model, _):
        mine = {parameter.data_ptr() for parameter in model.parameters()}
        given = list(iter_hf_tensors(model, hf_model=source, format="bf16", bucket_bytes=LIMIT))
        assert not mine & {tensor.data_ptr() for _, tensor in given}
        return given


def test_a_loop_is_given_whole_tensors_of_its_own(ranks: Ranks, models: dict) -> None:
    [given] = ranks.call(1, streamed, models["llama31"])
    assert_same(dict(given), tensors(models["llama31"]))
