"""Calibration keeps the stages of a pipeline busy: each works on its own micro-batch at the same time."""

import time
from pathlib import Path

import torch

from megatron_export import calibrate

from ..support.live import blank
from ..support.models import read_json
from ..support.ranks import Ranks

MICRO_BATCHES = 6
WORK = 0.1  # seconds that a stage takes at least


def busy(config: dict) -> list[tuple[float, float]]:
    """In a rank: when its stage began and ended each micro-batch."""
    times: list[tuple[float, float]] = []
    begun: list[float] = []
    with blank(config, 8, pp=2) as (model, _):

        def ended(*called: object) -> None:
            time.sleep(WORK)
            times.append((begun.pop(), time.monotonic()))

        model.register_forward_pre_hook(lambda *called: begun.append(time.monotonic()))
        model.register_forward_hook(ended)
        calibrate(model, torch.zeros(MICRO_BATCHES, 1, 8, dtype=torch.int64).unbind(), format="fp8")
    return times


def test_the_first_stage_works_on_the_next_micro_batch_while_the_second_has_this_one(
    ranks: Ranks, models: dict[str, Path]
) -> None:
    first, second = ranks.call(2, busy, read_json(models["llama31"] / "config.json"))
    shared = [min(a[1], b[1]) - max(a[0], b[0]) for a, b in zip(first[1:], second, strict=False)]
    assert len(shared) == MICRO_BATCHES - 1
    assert sorted(shared)[1] > WORK / 2, (first, second)  # of all but one, which a busy machine may hold up
