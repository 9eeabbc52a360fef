"""Both ways to make AWQ's losses choose alike on a trained model and real text."""

from unittest import mock

import pytest
from torch import Tensor

from megatron_export import calibrate
from megatron_export.calibration.data import read_samples
from megatron_export.formats import awq_gram

from ..support.live import loaded
from ..support.models import EXAMPLE
from ..support.ranks import Ranks

CLOSE = 2e-4  # of a loss: what roundings of outputs and of scaled inputs may reverse
FORMATS = ("int4_awq", "nvfp4_awq")  # whose searches serve w4a8_awq too


def searched() -> list[dict[str, Tensor]]:
    """In a rank: what is found by outputs, and by squares."""
    batches = read_samples(EXAMPLE / "calibration.txt", EXAMPLE, samples=4, length=256).split(2)
    found = []
    with loaded(EXAMPLE, length=256) as (model, _):
        for squares in (False, True):
            with mock.patch.object(awq_gram, "pays", lambda *sizes, squares=squares: squares):
                found.append(calibrate(model, batches, format=FORMATS))
    return found


@pytest.mark.whole
def test_squares_choose_the_alphas_that_outputs_choose(ranks: Ranks) -> None:
    """Or one whose outputs are as good but for `CLOSE`: the choice is between roundings there."""
    ((outputs, squares),) = ranks.call(1, searched)
    keys = [key for key in outputs if ".losses." in key]
    assert len(keys) == 4 * (4 * 2 + 1)
    others = 0
    for key in keys:
        losses, chosen = outputs[key], squares[key].argmin()
        assert losses[chosen] <= losses.min() * (1 + CLOSE)
        others += (chosen != losses.argmin()).item()
        assert (squares[key] / losses).tolist() == pytest.approx([1.0] * len(losses), abs=5e-3)
        assert losses.max() > 1.02 * losses.min()
    assert others <= 2
