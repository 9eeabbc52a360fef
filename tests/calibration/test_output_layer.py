"""The output layer is called where it is measured, and makes no logits of all tokens for nothing."""

from pathlib import Path

import torch

from megatron_export import calibrate

from ..support.live import blank
from ..support.models import assert_same, read_json
from ..support.ranks import Ranks


def called(config: dict, head: bool) -> tuple[dict[str, torch.Tensor], int, bool]:
    """In a rank: statistics, calls of the output layer, and whether the model ends with it afterwards."""
    calls: list[object] = []
    with blank(config, 8) as (model, _):
        hook = model.output_layer.register_forward_hook(lambda *given: calls.append(None))
        batches = torch.arange(48).view(3, 2, 8).unbind()
        found = calibrate(model, batches, format="nvfp4_awq", head=head)
        hook.remove()
        return found, len(calls), model.post_process


def test_no_logits_are_made_unless_the_input_of_the_output_layer_is_measured(
    ranks: Ranks, models: dict[str, Path]
) -> None:
    config = read_json(models["llama31"] / "config.json")
    ((without, none, as_before),) = ranks.call(1, called, config, False)
    ((measured, some, as_before_too),) = ranks.call(1, called, config, True)
    assert (none, some) == (0, 3)
    assert as_before
    assert as_before_too
    assert measured.pop("output_layer.input_amax") > 0
    assert_same(without, measured)
