"""The formats that a budget chooses: the least loss that fits, from names, shapes and saved statistics alone."""

import random
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_export.formats import Options
from megatron_export.models import is_linear_weight, parameters_of
from megatron_export.planning import budget
from megatron_export.planning.budget import budgeted, least_loss, recipe_text
from megatron_export.planning.plan import assumed, make_plan
from megatron_export.planning.request import Request

from ..support.configs import LLAMA, QWEN_MOE, SMALL_V3
from ..support.live import refusal

CONFIG = LLAMA | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}
BITS = {"nvfp4": 4.5, "w4a16_nvfp4": 4.5, "fp8": 8.0, "bf16": 16.0}


def sensitivities(config: dict, formats: tuple[str, ...] = ("nvfp4", "fp8"), seed: int = 0) -> dict[str, Tensor]:
    """Random costs, those of fewer bits the larger ones."""
    generator = torch.Generator().manual_seed(seed)
    linears = [name.removesuffix(".weight") for name in parameters_of(config) if is_linear_weight(name)]
    names = dict.fromkeys(
        name.partition(".experts.")[0] + ".experts." + name.rpartition(".")[2] if ".experts." in name else name
        for name in linears
    )
    return {
        f"{name}.sensitivity.{format}": torch.rand((), generator=generator, dtype=torch.float64) * 2 ** -BITS[format]
        for name in names
        for format in formats
    }


def layers_of(config: dict, request: Request) -> dict[str, str]:
    """HF module -> format in the plan of a request."""
    plan = make_plan(config, assumed(config, 1), request)
    return {module: form.name for module, form in plan.layers.items()}


# The knapsack.


def groups_of(seed: int) -> list[list[tuple[int, float]]]:
    """Seven groups of three choices; sizes and losses are small numbers, so that many are equal."""
    chance = random.Random(seed)
    return [[(chance.randint(1, 9), chance.randint(0, 20) / 4) for _ in range(3)] for _ in range(7)]


def every(groups: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Bytes and loss of every choice there is."""
    return [(sum(s for s, _ in chosen), sum(loss for _, loss in chosen)) for chosen in product(*groups)]


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_finds_what_trying_everything_finds(seed: int) -> None:
    groups = groups_of(seed)
    all_of_them = every(groups)
    least = min(size for size, _ in all_of_them)
    for room in (least, least + 3, least + 11, 63):
        picked = [group[number] for group, number in zip(groups, least_loss(groups, room), strict=True)]
        assert sum(size for size, _ in picked) <= room
        assert sum(loss for _, loss in picked) == min(loss for size, loss in all_of_them if size <= room)


def test_a_knapsack_that_keeps_few_states_fits_and_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_STATES", 2)
    worse = []
    for seed in range(20):
        groups, room = groups_of(seed), 30
        picked = [group[number] for group, number in zip(groups, least_loss(groups, room), strict=True)]
        assert sum(size for size, _ in picked) <= room
        worse.append(sum(loss for _, loss in picked) - min(loss for size, loss in every(groups) if size <= room))
    assert 0 <= min(worse) <= max(worse) < 3  # of losses up to 35
    assert sum(worse) > 0  # or it kept all states


def test_hundreds_of_layers_are_chosen_for_in_seconds() -> None:
    chance = random.Random(0)
    groups = [[(9 * n, chance.random()), (16 * n, chance.random() / 16), (32 * n, 0.0)] for n in range(1000, 1200)]
    sizes = [group[number][0] for group, number in zip(groups, least_loss(groups, 3_000_000), strict=True)]
    assert 2_990_000 < sum(sizes) <= 3_000_000


# The choice.


@pytest.mark.parametrize("bits", [4.5, 4.8, 5.6, 8.0, 12.0, 16.0])
def test_the_checkpoint_has_at_most_the_bits_and_what_engines_fuse_has_one_format(bits: float) -> None:
    request = Request(effective_bits=bits).plain()
    chosen = budgeted(CONFIG, request, sensitivities(CONFIG))
    named = {line.glob: line.format for line in chosen.recipe_lines}
    sizes = {
        n: s for p in parameters_of(CONFIG).values() if is_linear_weight(p.canonical) for n, s in sizes_of(p).items()
    }
    assert named.keys() == sizes.keys()
    taken = sum(BITS[named[module]] * size for module, size in sizes.items())
    assert bits * sum(sizes.values()) - 8 * 128 * 256 * 2 <= taken <= bits * sum(sizes.values())  # but for one group
    for layer in range(2):
        for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({named[f"model.layers.{layer}.{part}_proj"] for part in fused}) == 1
    quantized = {module: format for module, format in named.items() if format != "bf16"}
    assert not quantized or layers_of(CONFIG, chosen) == quantized


def sizes_of(source: object) -> dict[str, int]:
    rows = source.layout.split(torch.empty(source.shape, device="meta"), 0, 1)
    return {source.names()[part].removesuffix(".weight"): tensor.numel() for part, tensor in rows.items()}


@pytest.mark.parametrize(
    ("config", "bits", "fields", "bf16"),
    [
        (QWEN_MOE, 7.0, {}, ()),
        (SMALL_V3, 7.0, {"quantize_mla": True}, ()),
        (SMALL_V3, 12.0, {}, (".self_attn.",)),  # the budget is spent on what is left
        (QWEN_MOE, 7.0, {"exclude": ("*.o_proj",)}, (".o_proj",)),
    ],
    ids=["experts", "latent", "latent in bfloat16", "excluded"],
)
def test_the_recipe_file_says_the_same_formats_again(
    config: dict, bits: float, fields: dict, bf16: tuple[str, ...], tmp_path: Path
) -> None:
    chosen = budgeted(
        config, Request(effective_bits=bits, kv_cache="fp8", kv_scale=1.0, **fields).plain(), sensitivities(config)
    )
    (tmp_path / "recipe.yaml").write_text(recipe_text(chosen))
    again = Request(recipe=str(tmp_path / "recipe.yaml")).plain()
    layers = layers_of(config, again)
    assert layers == layers_of(config, chosen)
    assert len(set(layers.values())) == 2
    assert not any(word in module for module in layers for word in bf16)
    assert (again.kv_cache, again.kv_scale) == ("fp8", 1.0)
    assert again.quantize_mla == fields.get("quantize_mla", False)


def test_a_line_of_the_users_own_counts_and_the_rest_is_chosen_around_it() -> None:
    request = Request(effective_bits=6.0, set=("*.0.mlp.down_proj=bf16",)).plain()
    chosen = budgeted(CONFIG, request, sensitivities(CONFIG))
    layers = layers_of(CONFIG, chosen)
    assert "model.layers.0.mlp.down_proj" not in layers
    assert "model.layers.1.mlp.down_proj" in layers


def test_equal_statistics_in_another_order_choose_the_same() -> None:
    found = sensitivities(CONFIG)
    flat = dict.fromkeys(found, torch.tensor(0.5, dtype=torch.float64))
    for costs in (found, flat):
        request = Request(effective_bits=6.0).plain()
        one, other = (budgeted(CONFIG, request, dict(order)) for order in (costs.items(), reversed(costs.items())))
        assert recipe_text(one) == recipe_text(other)


def test_a_width_that_a_format_cannot_cut_is_given_to_another() -> None:
    config = CONFIG | {"intermediate_size": 264}  # no multiple of 16
    layers = layers_of(config, budgeted(config, Request(effective_bits=6.0).plain(), sensitivities(config)))
    assert {format for module, format in layers.items() if module.endswith("down_proj")} <= {"fp8"}


def test_an_option_of_a_format_that_was_not_chosen_is_no_mistake() -> None:
    request = Request(effective_bits=16.0, options=Options(nvfp4_scales="mse")).plain()
    found = {key.replace("nvfp4", "nvfp4_mse"): cost for key, cost in sensitivities(CONFIG).items()}
    assert list(budgeted(CONFIG, request, found).forms()) == ["bf16"]


@pytest.mark.parametrize(
    ("asked", "nvfp4", "fp8"),
    [
        ({"options": Options(nvfp4_scales="mse")}, "nvfp4_mse", "fp8"),
        ({"input_scale": 0.5}, "nvfp4_input_3f000000", "fp8_input_3f000000"),
        (
            {"options": Options(nvfp4_scales="four_over_six"), "input_scale": 1.0},
            "nvfp4_four_over_six_input_3f800000",
            "fp8_input_3f800000",
        ),
    ],
)
def test_costs_count_for_the_options_that_they_were_measured_with(asked: dict, nvfp4: str, fp8: str) -> None:
    request, found = Request(effective_bits=6.0, **asked).plain(), sensitivities(CONFIG)
    first = "decoder.layers.0.mlp.linear_fc1.sensitivity"
    said = refusal(budgeted, CONFIG, request, found)
    assert said.startswith(
        f"the calibration has no {first}.{nvfp4}, which --effective-bits chooses by. It was measured with "
    )
    assert "measured with other options, as nvfp4. Calibrate" in said
    own = {
        key.removesuffix("nvfp4").removesuffix("fp8") + (nvfp4 if key.endswith("nvfp4") else fp8): v
        for key, v in found.items()
    }
    globs = [
        [(line.glob, line.format) for line in budgeted(CONFIG, one, costs).recipe_lines]
        for one, costs in ((request, own), (Request(effective_bits=6.0).plain(), found))
    ]
    assert globs[0] == globs[1]


# Refusals.


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"effective_bits": 4.4}, "4.4 cannot be met: with --from nvfp4,fp8,bf16 this model takes 4.500 to 16.000 bits"),
        ({"effective_bits": 17.0}, "--effective-bits 17 cannot be met"),
        ({"effective_bits": 1e308}, "--effective-bits 1e+308 cannot be met"),
        ({"effective_bits": 8.1, "candidates": "nvfp4,fp8"}, "with --from nvfp4,fp8 this model takes 4.500 to 8.000 bits"),
        ({"effective_bits": float("nan")}, "--effective-bits must be a number above 0, not nan"),
        ({"effective_bits": 5.0, "candidates": "nvfp4,int4_awq"}, "--from int4_awq: AWQ prepares its weights"),
        ({"effective_bits": 5.0, "candidates": "nvfp4,fp"}, "unknown format 'fp'. Known: bf16, "),
        ({"effective_bits": 5.0, "format": "fp8"}, "--format has no effect with --effective-bits"),
        ({"effective_bits": 5.0, "recipe": "nvfp4_mlp_only"}, "--recipe has no effect with --effective-bits"),
        ({"candidates": "nvfp4,bf16"}, "--from has no effect without --effective-bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused_before_anything_is_measured(fields: dict, said: str) -> None:
    assert said in refusal(lambda: budgeted(CONFIG, Request(**fields).plain(), None))


def test_a_format_that_the_architecture_refuses_is_refused_by_name() -> None:
    options = Options(fp8_pb_spelling="modelopt")
    request = Request(effective_bits=7.0, candidates="nvfp4,fp8_pb", options=options).plain()
    assert refusal(budgeted, QWEN_MOE, request, None).startswith("--fp8-pb-spelling modelopt: no engine loads experts")
    budgeted(LLAMA, request, None)


@pytest.mark.parametrize(("change", "said"), [
    (lambda found, key: found.pop(key), "the calibration has no {}, which --effective-bits chooses by"),
    (lambda found, key: found.update({key: torch.tensor(float("nan"))}), "the calibration's {} is no number of at least 0"),
])  # fmt: skip
def test_statistics_without_a_sensitivity_are_refused_by_its_name(change: object, said: str) -> None:
    found, key = sensitivities(CONFIG), "decoder.layers.1.mlp.linear_fc2.sensitivity.fp8"
    change(found, key)
    assert refusal(budgeted, CONFIG, Request(effective_bits=6.0).plain(), found).startswith(said.format(key))
