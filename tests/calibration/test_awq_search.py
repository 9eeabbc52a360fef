"""AWQ's search does not depend on the topology: given the same weights and inputs, every cut of them gives the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export.calibration.amax import Maxima
from megatron_export.calibration.awq_clip import Clips
from megatron_export.calibration.awq_search import Alphas
from megatron_export.calibration.mcore import hooks
from megatron_export.calibration.mcore.hooks import watching
from megatron_export.common.piece import Amax, Axis
from megatron_export.distributed.topology import Topology
from megatron_export.formats import awq_gram, int4, nvfp4
from megatron_export.formats.awq import ALPHAS, SEARCHES, SHARED
from megatron_export.formats.int4 import CLIP_RATIOS
from megatron_export.mcore import parallel_state
from megatron_export.models import cut_of
from megatron_export.models.layouts import QKV, Identity, Layout, Split
from megatron_export.models.statistic_names import channels

from ..support.live import refusal
from ..support.models import GOLDEN, assert_same, same
from ..support.ranks import Ranks, living

pytestmark = pytest.mark.whole

TINY = torch.finfo(torch.float32).tiny
HEADS = QKV(queries_per_group=2, head_dim=16)  # 4 groups: one for each of 4 ranks
GATE_UP = Split(("gate", "up"))
QKV_NAME, PROJ, FC1, FC2 = (
    f"decoder.layers.0.{name}"
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
)
BOTH = ("int4_g128", "int4_g64", "nvfp4")
# Whole shape, layout, searches. Where a shard's inputs cut a group, the search is of the whole.
LINEARS: dict[str, tuple[tuple[int, int], Layout, tuple[str, ...]]] = {
    QKV_NAME: ((256, 128), HEADS, BOTH),
    PROJ: ((128, 128), Identity(), (*BOTH, f"nvfp4{SHARED}")),
    FC1: ((256, 128), GATE_UP, BOTH),
    FC2: ((128, 512), Identity(), BOTH),
    "decoder.layers.1.mlp.linear_fc2": ((128, 384), Identity(), BOTH),
    "decoder.layers.2.mlp.linear_fc2": ((128, 320), Identity(), ("int4_g64", "nvfp4")),
    "decoder.layers.3.mlp.linear_fc2": ((64, 96), Identity(), ("nvfp4",)),
}
Searches = Callable[[str], tuple[str, ...]]
BATCHES = ((13, 3), (97, 2), (7, 1))  # tokens and samples, multiples of nothing; of 194 tokens, clipping looks at 65


def linear_of(name: str) -> tuple[Tensor, list[Tensor]]:
    """The whole weight of a linear as Megatron has it, and its inputs, whose channels differ in size as in real models."""
    (rows, columns), _, _ = LINEARS[name]
    generator = torch.Generator().manual_seed(list(LINEARS).index(name))
    spread = torch.randn(columns, generator=generator).exp()
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp() * 0.05
    inputs = [torch.randn(*size, columns, generator=generator) * spread for size in BATCHES]
    return weight.to(torch.bfloat16), [batch.to(torch.bfloat16) for batch in inputs]


def mine_of(here: Topology, name: str) -> tuple[Tensor, list[Tensor]]:
    """What this rank has of them: fused rows are cut part by part, replicas take turns with the batches."""
    weight, inputs = linear_of(name)
    layout = LINEARS[name][1]
    if cut_of(f"{name}.weight") is Axis.OUT:
        parts = layout.split(weight, 0, 1)
        part_of = {part: rows.chunk(here.tp_size)[here.tp_rank] for part, rows in parts.items()}
        weight = layout.join(part_of, weight.shape[0] // here.tp_size)
    else:
        weight = weight.chunk(here.tp_size, dim=1)[here.tp_rank]
        inputs = [batch.chunk(here.tp_size, dim=2)[here.tp_rank] for batch in inputs]
    return weight, inputs[here.dp_rank :: here.dp_size]


def whole_or_cut(name: str, key: str, tp: int) -> str:
    """Whether a search at this size is of the "whole" linear, or its "rows" or "columns" are cut."""
    if cut_of(f"{name}.weight") is Axis.OUT:
        return "rows"
    return "whole" if LINEARS[name][0][1] // tp % SEARCHES[key.removesuffix(SHARED)].group else "columns"


def values_of() -> list[tuple[Tensor, Tensor]]:
    """Keys and values of one attention, [sequence, batch, groups, head_dim]."""
    generator = torch.Generator().manual_seed(99)
    return [tuple(torch.randn(2, *size, 4, 16, generator=generator).bfloat16().unbind()) for size in BATCHES]


@contextmanager
def ready(tp: int, pp: int = 1) -> Iterator[Topology]:
    with parallel_state.started(tp, pp, "cpu"), parallel_state.current() as here, torch.no_grad():
        yield here


def everything_of(
    here: Topology, mine: dict[str, tuple[Tensor, list[Tensor]]], searches: Searches
) -> tuple[dict, dict]:
    """All that is measured and chosen, and s of every alpha by name of the vector."""

    def show(observer: Maxima | Alphas | Clips) -> None:
        for name, (weight, inputs) in mine.items():
            for batch in inputs:
                observer.linear(name, weight, batch)

    maxima = Maxima(here, by_channel=True)
    show(maxima)
    for key, value in values_of()[here.dp_rank :: here.dp_size]:
        groups = slice(here.tp_rank * 4 // here.tp_size, (here.tp_rank + 1) * 4 // here.tp_size)
        maxima.attention("decoder.layers.0.self_attention", key[:, :, groups], value[:, :, groups])
    statistics, means = maxima.agreed()
    alphas = Alphas(here, means, searches, HEADS.same_in_group, {name: weight for name, (weight, _) in mine.items()})
    show(alphas)
    statistics |= alphas.agreed()
    clips = Clips(here, statistics, searches, {name: layout for name, (_, layout, _) in LINEARS.items()})
    show(clips)
    statistics |= clips.agreed() | {f"{name}.mean": mean for name, mean in means.items()}
    return statistics, {f"{n}.pre_quant_scale.{key}": s for (n, key), s in alphas.factors.items()}


def searched(way: str, tp: int, pp: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In a rank: the same for all linears, whose losses are made in this way; pipeline stages have every other one."""
    with ready(tp, pp) as here, mock.patch.object(awq_gram, "pays", lambda *sizes: way == "squares"):
        stage = here.rank // (here.world // pp)
        mine = {name: mine_of(here, name) for name in list(LINEARS)[stage::pp]}
        return everything_of(here, mine, lambda name: LINEARS[name][2])


# Name -> ranks, tensor and pipeline parallel sizes.
TOPOLOGIES = {"alone": (1, 1), "tp2": (2, 2), "tp4": (4, 4), "dp2": (2, 1), "tp2dp2": (4, 2), "pp2": (2, 1, 2)}


@pytest.fixture(scope="module", params=["outputs", "squares"])
def found(request: pytest.FixtureRequest, pool: list[Ranks]) -> dict[str, list]:
    """What every rank of a topology found, by the outputs of linears or by the squares of their inputs."""
    return {
        name: living(pool).call(world, searched, request.param, *sizes) for name, (world, *sizes) in TOPOLOGIES.items()
    }


def split_off(statistics: dict[str, Tensor], kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of a kind, and the others."""
    those = {key: value for key, value in statistics.items() if kind in key}
    return those, {key: value for key, value in statistics.items() if kind not in key}


@pytest.mark.parametrize("topology", list(TOPOLOGIES)[1:])
def test_every_rank_is_told_the_same(topology: str, found: dict) -> None:
    (statistics, factors), *others = found[topology]
    assert len(others) == TOPOLOGIES[topology][0] - 1
    for theirs, their_factors in others:
        assert_same(theirs, statistics)
        if topology != "pp2":
            assert_same(their_factors, factors)


@pytest.mark.parametrize("topology", ["tp2", "tp4", "tp2dp2"])
def test_tensor_parallel_ranks_measure_and_choose_exactly_what_one_rank_does(topology: str, found: dict) -> None:
    """Maxima, means, factors of every alpha, the alpha, and all codes and ratios of clipping, to the bit."""
    (alone, factors), (here, their_factors) = found["alone"][0], found[topology][0]
    assert_same(their_factors, factors)
    assert_same(split_off(here, ".losses.")[1], split_off(alone, ".losses.")[1])


def test_maxima_and_means_are_those_of_all_tokens(found: dict) -> None:
    """A mean is of the micro-batches' means, each of which counts the same, and is rounded to bfloat16."""
    alone = found["alone"][0][0]
    for name in LINEARS:
        batches = [batch.flatten(0, 1).abs() for batch in linear_of(name)[1]]
        amax = torch.cat(batches).amax(dim=0).float()
        assert same(alone[channels(f"{name}.input_amax")], amax)
        assert same(alone[f"{name}.input_amax"], amax.amax())
        means = [batch.double().mean(dim=0).bfloat16().double() for batch in batches]
        assert same(alone[f"{name}.mean"], (sum(means) / len(means)).float())
    attention = "decoder.layers.0.self_attention"
    keys, values = (torch.cat([both[i].flatten(0, 1) for both in values_of()]).abs() for i in (0, 1))
    assert same(alone[f"{attention}.k_amax"], keys.amax().float())
    assert same(alone[f"{attention}.v_amax"], values.amax().float())
    assert same(alone[channels(f"{attention}.v_amax")], values.amax(dim=0).flatten().float())


def golden_searched(path: Path, key: str) -> dict[str, Tensor]:
    """In a rank: the search of ModelOpt's own linear, its rows cut, and its columns."""
    vector = load_file(path)
    with ready(2) as here:
        mine = {}
        for name, cut in ((QKV_NAME, Axis.OUT), (FC2, Axis.IN)):
            weight, inputs = vector["in.weight"], vector["in.x"].unflatten(0, (3, 16, 1))
            if cut is Axis.IN:
                inputs = inputs.chunk(2, dim=3)[here.tp_rank]
            mine[name] = (weight.chunk(2, dim=0 if cut is Axis.OUT else 1)[here.tp_rank], list(inputs))
        return everything_of(here, mine, lambda name: (key,))[0]


@pytest.mark.parametrize("form", ["NVFP4_AWQ", "INT4_AWQ", "INT4_AWQ_G64"])
def test_two_ranks_choose_the_vector_that_modelopt_chooses_alone(form: str, ranks: Ranks) -> None:
    path = GOLDEN / "vectors" / form / "s256x512.safetensors"
    key = {"NVFP4_AWQ": "nvfp4", "INT4_AWQ": "int4_g128", "INT4_AWQ_G64": "int4_g64"}[form]
    vector = load_file(path)
    for chosen in ranks.call(2, golden_searched, path, key):
        for name in (QKV_NAME, FC2):
            assert same(chosen[f"{name}.alpha.{key}"], vector["search.best_alpha"])
            # a float32 power differs in its last bits from one kind of CPU to another
            expected = 1 / vector["search.best_scale"]
            torch.testing.assert_close(chosen[f"{name}.pre_quant_scale.{key}"], expected, rtol=2**-20, atol=0)
            # cut columns: see below
            torch.testing.assert_close(chosen[f"{name}.losses.{key}"], vector["search.loss"], rtol=2e-4, atol=0)


def measured_with(value: float) -> str:
    """In a rank: what is said of activations of which one, on the last rank, has this value."""
    with ready(2) as here:
        maxima = Maxima(here, by_channel=True)
        inputs = mine_of(here, FC2)[1][0].clone()
        if here.tp_rank == 1:
            inputs[0, 0, -1] = value
        maxima.linear(FC2, torch.zeros(0), inputs)
        return refusal(maxima.agreed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_overflow_are_refused_by_name_on_every_rank(value: float, ranks: Ranks) -> None:
    said = ranks.call(2, measured_with, value)
    assert said[0].startswith(f"NaN or Inf in the activations of {FC2}. Check the weights")
    assert said[1] == said[0]


@pytest.mark.parametrize("tp", [2, 4])
def test_losses_under_tensor_parallelism_are_those_of_one_rank_but_for_rounding(tp: int, found: dict) -> None:
    """Equal where the whole linear is compared. Where it is cut, products are blocked otherwise (cut rows) or their sums
    are of other parts (cut columns): float32 of another order, and now and then an output that is rounded to another
    bfloat16. Losses differed by up to 6e-5 in these and like sizes, none of those with cut rows; 2e-4 are allowed.
    """
    alone, here = (split_off(found[topology][0][0], ".losses.")[0] for topology in ("alone", f"tp{tp}"))
    kinds = []
    for key in alone:
        name, _, search = key.partition(".losses.")
        kinds.append(whole_or_cut(name, search, tp))
        exact = kinds[-1] == "whole"
        torch.testing.assert_close(here[key], alone[key], rtol=0 if exact else 2e-4, atol=0, msg=key)
    assert {kind: kinds.count(kind) for kind in kinds} == {"rows": 6, "whole": 3, "columns": 10} if tp == 2 else {
        "rows": 6, "whole": 6, "columns": 7
    }  # fmt: skip


def test_replicas_that_share_the_batches_find_what_one_finds_with_all(found: dict) -> None:
    """Exactly, but that three float64 losses are added up in another order: two roundings of 2^-53."""
    (alone, factors), (here, their_factors) = found["alone"][0], found["dp2"][0]
    assert_same(their_factors, factors)
    losses, others = split_off(here, ".losses.")
    assert_same(others, split_off(alone, ".losses.")[1])
    for key, value in losses.items():
        torch.testing.assert_close(value, alone[key], rtol=2**-52, atol=0)


def test_pipeline_stages_find_together_what_one_rank_finds(found: dict) -> None:
    assert_same(found["pp2"][0][0], found["alone"][0][0])


def test_the_first_alpha_of_the_smallest_loss_makes_the_vector(found: dict) -> None:
    alone, factors = found["alone"][0]
    assert len(factors) == sum(len(searches) for _, _, searches in LINEARS.values())
    for vector, every in factors.items():
        losses = alone[vector.replace("pre_quant_scale", "losses")]
        best = losses.tolist().index(losses.min())
        assert alone[vector.replace("pre_quant_scale", "alpha")].item() == ALPHAS[best]
        assert same(alone[vector], 1 / every[best])
        assert losses.max() > 1.05 * losses.min(), "a search with nothing to find"
    chosen = {value.item() for key, value in alone.items() if ".alpha." in key}
    assert len(chosen) > 3


def searched_zeros() -> dict[str, Tensor]:
    """In a rank: the search of weights of zeros, which no rounding changes."""
    with ready(2) as here:
        mine = {name: mine_of(here, name) for name in (FC1, FC2)}
        zeros = {name: (torch.zeros_like(weight), inputs) for name, (weight, inputs) in mine.items()}
        return everything_of(here, zeros, lambda name: BOTH)[0]


def test_of_equal_losses_the_first_wins_and_a_weight_of_zeros_is_not_smoothed(ranks: Ranks) -> None:
    for statistics in ranks.call(2, searched_zeros):
        for name, key in ((name, key) for name in (FC1, FC2) for key in BOTH):
            assert not statistics[f"{name}.losses.{key}"].any()
            assert statistics[f"{name}.alpha.{key}"] == 0
            assert (statistics[f"{name}.pre_quant_scale.{key}"] == 1).all()
        codes = [value for key, value in statistics.items() if ".clip." in key]
        assert len(codes) == 2 * 3
        assert not torch.cat([value.flatten() for value in codes]).any()
        assert {value.item() for key, value in statistics.items() if ".clip_ratio." in key} == {0.5}


def test_only_a_shared_search_gives_the_queries_of_a_group_one_factor(found: dict) -> None:
    factors = found["alone"][0][1]
    for key, equal in ((f"nvfp4{SHARED}", True), ("nvfp4", False)):
        for every in factors[f"{PROJ}.pre_quant_scale.{key}"]:
            heads = every.view(4, HEADS.queries_per_group, HEADS.head_dim)
            assert (heads == heads[:, :1]).all() == equal
            assert (heads[:1] != heads).any()  # the groups differ


def test_a_shared_factor_is_that_of_the_mean_input_and_the_mean_weight_of_its_queries(found: dict) -> None:
    """Of the query group, channel by channel, to the bit; the numbers are added up here."""
    weight, batches = linear_of(PROJ)
    means = [batch.flatten(0, 1).abs().double().mean(dim=0).bfloat16().double() for batch in batches]
    inputs = (sum(means) / len(means)).float().tolist()
    blocks = weight.abs().unflatten(1, (-1, 16))
    relative = (blocks / (blocks.amax(dim=2, keepdim=True) + TINY)).flatten(1)
    weights = relative.double().mean(dim=0).bfloat16().tolist()
    queries, size = HEADS.queries_per_group, HEADS.head_dim

    def shared(values: list[float]) -> torch.Tensor:
        made = list(values)
        for channel in range(len(values)):
            group, within = channel // (queries * size), channel % size
            made[channel] = sum(values[(group * queries + q) * size + within] for q in range(queries)) / queries
        return torch.tensor(made)

    a, w = shared(inputs), shared(weights)
    every = found["alone"][0][1][f"{PROJ}.pre_quant_scale.nvfp4{SHARED}"]
    for alpha, factors in zip(ALPHAS, every, strict=True):
        expected = (a**alpha / (w ** (1 - alpha) + TINY)).clamp(1e-4, 1e4)
        assert same(factors, expected / (expected.max() * expected.min()).sqrt())


# Clipping.


def smoothed(statistics: dict[str, Tensor], name: str, key: str) -> tuple[Tensor, list[Tensor]]:
    """The smoothed weight and inputs [tokens, in] that clipping compares."""
    weight, inputs = linear_of(name)
    vector = statistics[f"{name}.pre_quant_scale.{key}"]
    return (weight.float() / vector).bfloat16(), [batch.flatten(0, 1) * vector.bfloat16() for batch in inputs]


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("name", [QKV_NAME, FC1, FC2])
def test_the_code_of_a_group_has_the_smallest_error_of_all_ratios(name: str, group: int, found: dict) -> None:
    """By the plain definition in float64: the error of a group's part of an output, squared, over the tokens that are
    looked at. float32 losses may prefer one that is as good: within 2^-18 of the smallest.
    """
    statistics = found["alone"][0][0]
    weight, inputs = smoothed(statistics, name, f"int4_g{group}")
    tokens = torch.zeros(len(CLIP_RATIOS), weight.shape[0], weight.shape[1] // group, dtype=torch.float64)
    for batch in inputs:
        sample = batch[:: max(len(batch) // 64, 1)].double()
        assert 7 <= len(sample) <= 127
        for code in range(len(CLIP_RATIOS)):
            codes = torch.full((weight.shape[0], weight.shape[1] // group), code)
            error = int4.rounded(weight, group, codes).double() - weight.double()
            for index in range(codes.shape[1]):
                columns = slice(index * group, (index + 1) * group)
                tokens[code, :, index] += (error[:, columns] @ sample[:, columns].T).square().mean(dim=1)
    layout = LINEARS[name][1]
    for part, losses in layout.split(tokens.movedim(0, 2), 0, 1).items():  # [out, in/group, ratios] in HF's rows
        codes = statistics[f"{name}.clip.int4_g{group}.{part}".rstrip(".")]
        assert (codes.dtype, codes.shape) == (torch.uint8, losses.shape[:2])
        taken = losses.gather(2, codes.long().unsqueeze(2)).squeeze(2)
        assert (taken <= losses.amin(dim=2) * (1 + 2**-18)).all()
        assert len(codes.unique()) > 4


@pytest.mark.parametrize("name", LINEARS)
def test_the_ratio_of_a_weight_has_the_smallest_error_of_all(name: str, found: dict) -> None:
    """By the plain definition: its outputs in bfloat16 against those with the weight that is not rounded. 2e-4: products
    of this process may be blocked otherwise than those of a rank, see above.
    """
    statistics = found["alone"][0][0]
    weight, inputs = smoothed(statistics, name, "nvfp4")
    losses = []
    for ratio in CLIP_RATIOS:
        amax = weight.abs().amax().float() * ratio
        rounded = nvfp4.decode(nvfp4.encode(weight, Amax(amax, amax))).bfloat16()
        losses.append(sum(((x @ rounded.T - x @ weight.T).double() ** 2).mean().item() for x in inputs))
    taken = losses[CLIP_RATIOS.index(round(statistics[f"{name}.clip_ratio.nvfp4"].item(), 2))]
    assert taken <= min(losses) * (1 + 2e-4)
    assert max(losses) > 1.05 * min(losses)


def clipped_part_by_part() -> dict[str, Tensor]:
    """In a rank: the codes of q, k, v, gate and up by themselves, as linears of one part."""
    with ready(1) as here:
        statistics, _ = everything_of(here, {n: mine_of(here, n) for n in (QKV_NAME, FC1)}, lambda name: BOTH)
        codes: dict[str, Tensor] = {}
        for name in (QKV_NAME, FC1):
            weight, inputs = linear_of(name)
            for part, rows in LINEARS[name][1].split(weight, 0, 1).items():
                clips = Clips(here, statistics, lambda name: ("int4_g64", "int4_g128"), {})
                for batch in inputs:
                    clips.linear(name, rows, batch)
                codes |= {f"{key}.{part}": value for key, value in clips.agreed().items()}
        return codes


@pytest.mark.parametrize("topology", ["alone", "tp2", "tp4"])
def test_codes_of_fused_linears_are_those_of_their_parts_in_the_order_of_hf(
    topology: str, found: dict, ranks: Ranks
) -> None:
    codes = {key: value for key, value in found[topology][0][0].items() if ".clip." in key}
    fused = {key: value for key, value in codes.items() if key.startswith((QKV_NAME, FC1))}
    assert_same(fused, ranks.call(1, clipped_part_by_part)[0])


def observed(sequence_parallel: bool) -> dict[str, Tensor]:
    """In a rank: what a search finds when a column-parallel linear is called with its whole input, or with its rank's part
    of the sequence, as under sequence parallelism.
    """
    with ready(2) as here:
        generator = torch.Generator().manual_seed(4)
        inputs = torch.randn(24, 2, 128, generator=generator).to(torch.bfloat16)
        weight = torch.randn(64, 128, generator=generator).to(torch.bfloat16)
        module = torch.nn.Identity()
        module.config = SimpleNamespace(sequence_parallel=sequence_parallel)
        module.weight = weight.chunk(2)[here.tp_rank]
        called = inputs.chunk(2)[here.tp_rank] if sequence_parallel else inputs
        name = "decoder.layers.0.mlp.linear_fc1"
        none = dict.fromkeys(("attentions_of", "experts_of"), lambda model: {}) | {"local_experts_of": lambda model: []}
        with mock.patch.multiple(hooks, linears_of=lambda model, head: {name: module}, **none):
            maxima = Maxima(here, by_channel=True)
            with watching(here, module, maxima, 1, all_experts=False):
                module(called)
            found, means = maxima.agreed()
            weights = {name: module.weight}
            alphas = Alphas(here, means, lambda name: ("nvfp4", "int4_g64"), lambda values: values, weights)
            with watching(here, module, alphas, 1, all_experts=False):
                module(called)
            return found | alphas.agreed()


def test_parts_of_a_sequence_are_put_together_before_they_are_looked_at(ranks: Ranks) -> None:
    whole, parts = ranks.call(2, observed, False), ranks.call(2, observed, True)
    for rank in (0, 1):
        assert len(whole[rank]) == 8
        assert_same(parts[rank], whole[rank])
        assert_same(whole[rank], whole[0])


def overflowing() -> str:
    """In a rank: what is said of a linear whose bfloat16 output is infinite, on the second rank alone."""
    with ready(1) as here:
        weight = torch.full((16, 128), 1e30 if here.rank else 1.0).to(torch.bfloat16)
        alphas = Alphas(here, {FC1: torch.ones(128)}, lambda name: ("nvfp4",), lambda values: values, {FC1: weight})
        alphas.linear(FC1, weight, torch.full((4, 128), 1e10).to(torch.bfloat16))
        return refusal(alphas.agreed)


def test_outputs_that_overflow_are_told_on_every_rank_and_no_alpha_is_taken(ranks: Ranks) -> None:
    for said in ranks.call(2, overflowing):
        assert f"NaN or Inf in the outputs of {FC1}" in said
