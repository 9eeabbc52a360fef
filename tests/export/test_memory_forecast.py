"""What an export will send and hold on every rank, forecast from config.json alone."""

from megatron_export.export.memory_forecast import Forecast, forecast
from megatron_export.planning.plan import assumed
from megatron_export.planning.rank_placement import grid_of

from ..support.configs import LLAMA
from ..support.plans import plan_for


def told(config: dict, tp: int = 1, etp: int | None = None, form: str = "bf16", **sizes: int) -> Forecast:
    """The forecast for GPUs."""
    held = assumed(config, tp, etp, **sizes)
    return forecast(plan_for(config, held, format=form), held, grid_of(config, tp, etp, **sizes), "cuda")


def test_what_is_sent_is_what_rank_0_does_not_hold() -> None:
    """In bfloat16, where bytes are those of the weights; no vocabulary is padded, no norm is too short to align."""
    config = LLAMA | {"vocab_size": 1024}
    assert told(config).sent == (0,)
    halves = told(config, 2)
    cut = halves.nbytes - 13 * 256 * 2  # all but the norms, which rank 0 has whole
    assert halves.sent == (0, cut // 2)
    stages = told(config, 2, pp=2)
    assert stages.sent[2] == stages.sent[3] + 7 * 256 * 2
    assert stages.sent[1] == (cut // 2) - stages.sent[3]


def test_replicas_hold_weights_and_send_nothing() -> None:
    found = told(LLAMA, 2, pp=2, world=8)
    assert [sent > 0 for sent in found.sent] == [False, True, False, False, True, True, False, False]
    assert found.gpu[3] == found.gpu[2]
    assert found.gpu[2] > 0


def test_a_weight_whose_tiles_are_cut_travels_to_its_first_rank() -> None:
    found = told(
        LLAMA, 8, form="fp8_pb"
    )  # each rank has 64 rows of gate and up, a half of a block, and as little of all others
    qkv, o_proj, gate_up, down = 64 * 256, 256 * 32, 2 * 64 * 256, 256 * 64
    assert found.gathered == (0, *[6 * 2 * (qkv + o_proj + gate_up + down)] * 7)
    assert told(LLAMA, 4, form="nvfp4").gathered == (0,) * 4


def test_memory_of_a_rank_is_its_weights_and_copies_of_a_bucket() -> None:
    """Of the only bucket in bfloat16: q, k, v, which are copied apart; all else is written from where it is."""
    found = told(LLAMA)
    padding, qkv = 2 * 24 * 256 * 2, 6 * (16 * 32) * 256 * 2
    assert found.gpu == (found.nbytes + padding + qkv,)


def test_a_larger_model_takes_more_for_its_weights_alone() -> None:
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000}
    few, many = (told(wide | {"num_hidden_layers": layers}) for layers in (12, 48))
    assert many.nbytes - few.nbytes > 3_000_000_000
    assert abs((many.gpu[0] - few.gpu[0]) - (many.nbytes - few.nbytes)) < 100 << 20
