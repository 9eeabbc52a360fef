"""Calibration statistics: on disk and back, which format a file serves, and the numbers that items are quantized with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_export.calibration.lookup import check_calibration, measured
from megatron_export.calibration.statistics import KIND, load, save, sizes_of
from megatron_export.common.errors import ExportError
from megatron_export.formats import Options
from megatron_export.formats.awq import SEARCHES, SHARED
from megatron_export.models import Source, is_linear_weight, makes_keys, parameters_of, reads_heads
from megatron_export.models.statistic_names import channels, hf_keys, kv_keys
from megatron_export.planning.parameter import Item
from megatron_export.planning.plan import Plan

from ..support.configs import LLAMA
from ..support.live import refusal
from ..support.models import assert_same, same
from ..support.plans import plan_of

CONFIG = LLAMA | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 500}
QKV, PROJ, FC1, FC2 = (
    f"decoder.layers.1.{name}"
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
)
ATTENTION, HF = "decoder.layers.1.self_attention", "model.layers.1"
ALL = ("int4_g128", "int4_g64", "nvfp4")


def statistics_of(*searches: str, clip: bool = False) -> dict[str, Tensor]:
    """What calibration gives with these searches: random numbers under all names."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, source in parameters_of(CONFIG).items():
        if not is_linear_weight(name):
            continue
        widths = {name.removesuffix("weight") + "input_amax": source.shape[1]}
        widths |= dict(zip(kv_keys(name.rsplit(".", 2)[0]), (64, 64), strict=True)) if makes_keys(name) else {}
        for key, width in widths.items():
            vector = torch.rand(width, generator=generator) * 9 + 1
            found[key] = vector.amax()
            if searches and not key.endswith("k_amax"):
                found[channels(key)] = vector
        for search in searches:
            found |= searched(source, search, clip, generator)
            if search == "nvfp4" and reads_heads(name):
                found |= searched(source, search + SHARED, clip, generator)
    return found


def searched(source: Source, key: str, clip: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """What a search finds for one linear."""
    module, (rows, columns) = source.canonical.removesuffix(".weight"), source.shape
    found = {
        f"{module}.pre_quant_scale.{key}": torch.rand(columns, generator=generator) + 0.5,
        f"{module}.alpha.{key}": torch.tensor(0.3),
        f"{module}.losses.{key}": torch.rand(11, generator=generator, dtype=torch.float64),
    }
    search = SEARCHES[key.removesuffix(SHARED)]
    if clip and search.per_tensor:
        return found | {f"{module}.clip_ratio.{key}": torch.tensor(0.85)}
    codes = torch.randint(0, 11, (rows, columns // search.group), generator=generator, dtype=torch.uint8)
    for part, held in source.layout.split(codes, 0, 1).items() if clip else ():
        found[f"{module}.clip.{key}.{part}".rstrip(".")] = held.contiguous()
    return found


def plan(form: str, kv_cache: str = "none", **options: object) -> Plan:
    return plan_of(CONFIG, format=form, options=Options(**options), kv_cache=kv_cache)


def item_of(plan: Plan, module: str) -> Item:
    return next(item for item in plan.items if item.source.canonical == f"{module}.weight")


# On disk.


@pytest.mark.parametrize("searches", [(), ("nvfp4",), ("int4_g64",), ALL], ids=["fp8", "nvfp4", "int4_g64", "all"])
@pytest.mark.parametrize("clip", [False, True])
def test_what_is_saved_is_loaded_to_the_bit(searches: tuple, clip: bool, tmp_path: Path) -> None:
    found = statistics_of(*searches, clip=clip)
    save(found, tmp_path / "calibration.safetensors", CONFIG)
    assert_same(load(tmp_path / "calibration.safetensors", CONFIG), found)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_fused_linears_have_every_statistic_under_each_hf_name_and_their_own_codes(tmp_path: Path) -> None:
    found = statistics_of(*ALL, clip=True)
    save(found, tmp_path / "file", CONFIG)
    held = load_file(tmp_path / "file")
    for module, parts in ((QKV, ("q", "k", "v")), (FC1, ("gate", "up"))):
        block = "self_attn" if module == QKV else "mlp"
        for part in parts:
            for kind in ("input_amax", "input_channel_amax", "pre_quant_scale.nvfp4", "alpha.int4_g64", "losses.nvfp4"):
                assert same(held[f"{HF}.{block}.{part}_proj.{kind}"], found[f"{module}.{kind}"])
            assert same(held[f"{HF}.{block}.{part}_proj.clip.int4_g128"], found[f"{module}.clip.int4_g128.{part}"])
            assert same(held[f"{HF}.{block}.{part}_proj.clip_ratio.nvfp4"], found[f"{module}.clip_ratio.nvfp4"])
    assert same(
        held[f"{HF}.self_attn.o_proj.pre_quant_scale.nvfp4_shared"], found[f"{PROJ}.pre_quant_scale.nvfp4_shared"]
    )
    assert same(held[f"{HF}.mlp.down_proj.clip.int4_g64"], found[f"{FC2}.clip.int4_g64"])
    assert same(held[f"{HF}.self_attn.k_proj.k_amax"], found[f"{ATTENTION}.k_amax"])
    assert same(held[f"{HF}.self_attn.v_proj.v_amax"], found[f"{ATTENTION}.v_amax"])
    assert same(held[f"{HF}.self_attn.v_proj.v_channel_amax"], found[f"{ATTENTION}.v_channel_amax"])
    assert not any(name.endswith((".q", ".k", ".v", ".gate", ".up")) for name in held)
    assert {hf for on_disk in hf_keys(CONFIG).values() for hf in on_disk} <= held.keys()


def rewritten(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Damage a file, but not what it says of its model."""
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={KIND: json.dumps(sizes_of(CONFIG))})


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """Why statistics of every search are not loaded after a change of their file, whose name comes first."""
    save(statistics_of(*ALL, clip=True), folder / "file", CONFIG)
    rewritten(folder / "file", change)
    said = refusal(load, folder / "file", CONFIG)
    assert said.startswith(f"{folder / 'file'}: ")
    return said.removeprefix(f"{folder / 'file'}: ")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("self_attn.k_proj.pre_quant_scale.nvfp4", f"{QKV}.pre_quant_scale.nvfp4"),
        ("mlp.up_proj.losses.int4_g64", f"{FC1}.losses.int4_g64"),
        ("mlp.gate_proj.alpha.nvfp4", f"{FC1}.alpha.nvfp4"),
        ("self_attn.v_proj.clip_ratio.nvfp4", f"{QKV}.clip_ratio.nvfp4"),
    ],
)
def test_fused_linears_that_differ_in_what_they_share_are_refused(name: str, key: str, tmp_path: Path) -> None:
    said = damaged(tmp_path, lambda held: held[f"{HF}.{name}"].mul_(1.01))
    assert said.startswith(f"the fused linears of {key} differ, but share one. Write it again")


def test_of_maxima_that_differ_the_largest_is_taken(tmp_path: Path) -> None:
    found = statistics_of("nvfp4")
    save(found, tmp_path / "file", CONFIG)
    rewritten(tmp_path / "file", lambda held: held[f"{HF}.mlp.up_proj.input_channel_amax"][3].mul_(100))
    largest = found[f"{FC1}.input_channel_amax"].clone()
    largest[3] *= 100
    assert same(load(tmp_path / "file", CONFIG)[f"{FC1}.input_channel_amax"], largest)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.input_amax",  # two layers: 0 and 1
        "lm_head.k_amax",
        "model.layers.1.mlp.fc1.input_amax",
        f"{FC1}.input_amax",
        "model.layers.1.mlp.up_proj.output_amax",
        "model.layers.1.mlp.up_proj.alpha",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.o_proj.v_amax",  # only what makes keys and values has theirs
        "model.layers.1.self_attn.q_proj.k_amax",
        "model.layers.1.mlp.gate_proj.k_amax",
        "model.layers.1.mlp.up_proj.v_channel_amax",
        "model.layers.1.mlp.up_proj.alpha.int4_g32",
        "model.layers.1.mlp.up_proj.clip.nvfp4",
    ],
)
def test_a_name_that_no_statistic_has_is_refused(name: str, tmp_path: Path) -> None:
    said = damaged(tmp_path, lambda held: held.update({name: torch.ones(())}))
    assert said == f"{name} is no statistic of this model. Write it again with --save-calibration"


@pytest.mark.parametrize("name", ["self_attn.v_proj.v_amax", "self_attn.q_proj.pre_quant_scale.nvfp4"])
def test_a_missing_copy_is_refused_by_its_hf_name(name: str, tmp_path: Path) -> None:
    assert damaged(tmp_path, lambda held: held.pop(f"{HF}.{name}")).startswith(f"{HF}.{name} is missing")


# What a file serves.


SERVED = {
    "int4_awq": plan("int4_awq"),
    "w4a8_awq": plan("w4a8_awq", "fp8"),
    "int4_awq 64": plan("int4_awq", group_size=64),
    "nvfp4_awq": plan("nvfp4_awq", "nvfp4"),
    "nvfp4_awq modelopt": plan("nvfp4_awq", awq_output="modelopt"),
    "fp8": plan("fp8", "nvfp4"),
    "nvfp4": plan("nvfp4", "fp8"),
    "fp8_pb": plan("fp8_pb", "fp8"),
    "bf16": plan("bf16"),
}
PLAIN = {"fp8", "nvfp4", "fp8_pb", "bf16"}


@pytest.mark.parametrize(
    ("searches", "awq"),
    [
        ((), set()),
        (("int4_g128",), {"int4_awq", "w4a8_awq"}),
        (("int4_g64",), {"int4_awq 64"}),
        (("nvfp4",), {"nvfp4_awq", "nvfp4_awq modelopt"}),
        (ALL, SERVED.keys() - PLAIN),
    ],
    ids=["fp8", "int4_awq", "int4_awq 64", "nvfp4_awq", "all"],
)
def test_a_file_serves_every_format_that_needs_no_more_than_it_holds(searches: tuple, awq: set, tmp_path: Path) -> None:
    save(statistics_of(*searches), tmp_path / "file", CONFIG)
    found = load(tmp_path / "file", CONFIG)
    for name, wanted in SERVED.items():
        if name in PLAIN | awq:
            check_calibration(wanted, found)
            continue
        said, search = refusal(check_calibration, wanted, found), wanted.awq.smoothing.search
        assert f"the calibration holds no smoothing {search}, which {wanted.format} needs" in said
        assert f"Calibrate with --format {wanted.format}" in said


@pytest.mark.parametrize(
    ("form", "options"),
    [("int4_awq", {}), ("w4a8_awq", {"group_size": 64}), ("nvfp4_awq", {}), ("nvfp4_awq", {"awq_output": "modelopt"})],
)
def test_clipping_needs_a_file_that_was_measured_with_it_and_no_other_export_minds(form: str, options: dict) -> None:
    clipping = plan(form, awq_clip=True, **options)
    said = f"no clipping for {clipping.awq.smoothing.search}. Calibrate with --format {form}.* --awq-clip"
    with pytest.raises(ExportError, match=said):
        check_calibration(clipping, statistics_of(*ALL))
    check_calibration(clipping, statistics_of(*ALL, clip=True))
    for wanted in SERVED.values():
        check_calibration(wanted, statistics_of(*ALL, clip=True))


def test_formats_say_that_they_need_calibration() -> None:
    for name, wanted in SERVED.items():
        if name == "bf16":
            check_calibration(wanted, None)
            continue
        with pytest.raises(ExportError, match=f"format {wanted.format} needs calibration"):
            check_calibration(wanted, None)
    check_calibration(plan("fp8_pb"), None)


def test_statistics_of_another_model_are_told_by_what_is_missing() -> None:
    found = statistics_of("nvfp4")
    del found[f"{FC2}.input_amax"]
    check_calibration(plan("nvfp4_awq"), found)  # its maxima are by channel
    said = refusal(check_calibration, plan("nvfp4"), found)
    assert f"has no {FC2}.input_amax: measured on another model" in said


@pytest.mark.parametrize(
    ("key", "index", "value", "words"),
    [
        (f"{FC2}.pre_quant_scale.nvfp4", 5, 0.0, "is 0.0 to "),
        (f"{FC2}.pre_quant_scale.nvfp4", 5, -1.0, "is -1.0 to "),
        (f"{QKV}.pre_quant_scale.nvfp4", 0, 1e-40, "is "),  # 1 / it is infinite
        (f"{FC1}.pre_quant_scale.nvfp4", 7, float("inf"), " to inf"),
        (f"{PROJ}.pre_quant_scale.nvfp4_shared", 7, float("nan"), "is nan"),
        (f"{PROJ}.input_channel_amax", 7, float("inf"), " to inf"),
        (f"{PROJ}.input_channel_amax", 7, -0.5, "is -0.5 to "),
        (f"{ATTENTION}.v_channel_amax", 63, float("nan"), "is nan"),
        (f"{ATTENTION}.k_amax", (), -2.0, "is -2.0"),
        (f"{FC1}.clip_ratio.nvfp4", (), float("nan"), "is nan"),
        (f"{FC1}.clip_ratio.nvfp4", (), 0.0, "is 0.0"),
        (f"{FC1}.clip_ratio.nvfp4", (), 5.0, "is 5.0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(key: str, index: object, value: float, words: str) -> None:
    found = statistics_of("nvfp4", clip=True)
    wanted = plan("nvfp4_awq", "fp8", awq_clip=True)
    check_calibration(wanted, found)
    found[key][index] = value
    said = refusal(check_calibration, wanted, found)
    assert f"the calibration's {key} " in said
    assert words in said


@pytest.mark.parametrize(("form", "group"), [("int4_awq", 128), ("w4a8_awq", 64)])
@pytest.mark.parametrize("module", [f"{FC2}.clip.int4_g{{}}", f"{QKV}.clip.int4_g{{}}.k"])
def test_a_clip_code_beyond_the_ratios_is_refused(form: str, group: int, module: str) -> None:
    found, wanted = statistics_of(*ALL, clip=True), plan(form, group_size=group, awq_clip=True)
    key = module.format(group)
    found[key][-1, -1] = 10
    check_calibration(wanted, found)
    found[key][-1, -1] = 11
    with pytest.raises(ExportError, match=f"the calibration's {key} is 0.0 to 11.0"):
        check_calibration(wanted, found)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"{FC2}.pre_quant_scale.int4_g128", (64,)),
        (f"{FC2}.input_channel_amax", (64,)),
        (f"{FC1}.clip.int4_g128.up", (1, 1)),
        (f"{ATTENTION}.v_channel_amax", (3,)),
        (f"{ATTENTION}.k_amax", (1,)),
    ],
)
def test_a_size_of_another_model_is_refused_by_name(key: str, shape: tuple[int, ...]) -> None:
    """w4a8_awq reads all but the maxima by channel of values, which nvfp4_awq folds o_proj into."""
    wanted = plan("nvfp4_awq", "fp8") if key.endswith("v_channel_amax") else plan("w4a8_awq", "fp8", awq_clip=True)
    found = statistics_of(*ALL, clip=True)
    check_calibration(wanted, found)
    found[key] = torch.ones(shape, dtype=found[key].dtype)
    said = f"the calibration's {key} is {found[key].dtype} {shape}, not "
    assert said in refusal(check_calibration, wanted, found)


def test_a_vector_of_another_type_is_refused_by_name() -> None:
    """In bfloat16 it would give other weights."""
    found = statistics_of("nvfp4")
    key = f"{FC2}.pre_quant_scale.nvfp4"
    found[key] = found[key].to(torch.bfloat16)
    with pytest.raises(ExportError, match=f"the calibration's {key} is torch.bfloat16 .*, not torch.float32"):
        check_calibration(plan("nvfp4_awq"), found)


def test_the_same_statistics_are_the_same_file_and_others_may_read_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(statistics_of("nvfp4"), tmp_path / name, CONFIG)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_incomplete_statistics_are_not_saved(tmp_path: Path) -> None:
    found = statistics_of()
    del found[f"{FC2}.input_amax"]
    with pytest.raises(ExportError, match=f"the statistics have no {FC2}.input_amax"):
        save(found, tmp_path / "file", CONFIG)
    assert not list(tmp_path.iterdir())


def test_one_missing_vector_is_told_by_its_name() -> None:
    found = statistics_of("nvfp4")
    del found[f"{FC2}.pre_quant_scale.nvfp4"]
    with pytest.raises(ExportError, match=f"the calibration has no {FC2}.pre_quant_scale.nvfp4"):
        check_calibration(plan("nvfp4_awq"), found)


# The numbers of an item.


def numbers(plan: Plan, module: str, found: dict[str, Tensor]) -> object:
    return measured(item_of(plan, module), found, torch.device("cpu"))


@pytest.mark.parametrize("form", ["nvfp4_awq", "w4a8_awq"])
@pytest.mark.parametrize("module", [QKV, FC1, FC2])
def test_the_amax_of_a_smoothed_input_is_that_of_its_channels_times_the_vector(form: str, module: str) -> None:
    found = statistics_of(*ALL)
    search = "nvfp4" if form == "nvfp4_awq" else "int4_g128"
    products = found[f"{module}.input_channel_amax"] * found[f"{module}.pre_quant_scale.{search}"]
    amax = numbers(plan(form), module, found).input
    assert same(amax, products.amax().bfloat16().float())  # ModelOpt has it in the model's dtype
    assert amax != found[f"{module}.input_amax"]
    assert same(numbers(plan("nvfp4"), module, found).input, found[f"{module}.input_amax"])


def test_int4_needs_no_amax_of_its_inputs() -> None:
    found = {key: value for key, value in statistics_of("int4_g128").items() if "amax" not in key}
    check_calibration(plan("int4_awq"), found)
    assert numbers(plan("int4_awq"), FC2, found).input.isnan()


@pytest.mark.parametrize(
    ("output", "search"), [("folded", "nvfp4_shared"), ("modelopt", "nvfp4")], ids=["folded", "modelopt"]
)
def test_o_proj_under_grouped_queries_takes_the_vector_of_its_output(output: str, search: str) -> None:
    found = statistics_of("nvfp4", clip=True)
    wanted = plan("nvfp4_awq", awq_output=output, awq_clip=True)
    vector = f"{PROJ}.pre_quant_scale.{search}"
    made = numbers(wanted, PROJ, found)
    assert list(made.vectors) == [vector]
    assert same(made.input, (found[f"{PROJ}.input_channel_amax"] * found[vector]).amax().bfloat16().float())
    assert item_of(wanted, PROJ).smoothed.ratio == f"{PROJ}.clip_ratio.{search}"
    assert item_of(wanted, PROJ).smoothed.kept == (output == "modelopt")


def test_the_values_amax_is_that_after_o_projs_vector_was_folded_into_v() -> None:
    """Of grouped queries, 2 for each of 4 heads of v here, the first stands for all: a shared search gives them one."""
    found = statistics_of("nvfp4")
    vector = torch.linspace(2, 0.5, 64).view(4, 1, 16).expand(4, 2, 16).reshape(-1)
    found[f"{PROJ}.pre_quant_scale.nvfp4_shared"] = vector
    k_amax, v_amax = numbers(plan("nvfp4_awq", "fp8"), QKV, found).kv
    assert same(k_amax, found[f"{ATTENTION}.k_amax"])
    by_row = found[f"{ATTENTION}.v_channel_amax"].view(4, 16) * vector.view(4, 2, 16)[:, 1]
    assert same(v_amax, by_row.amax())
    assert v_amax != found[f"{ATTENTION}.v_amax"]
    kept = numbers(plan("nvfp4_awq", "fp8", awq_output="modelopt"), QKV, found).kv
    assert same(kept[1], found[f"{ATTENTION}.v_amax"])  # where nothing is folded, v is what it was
    assert same(
        numbers(plan("w4a8_awq", "fp8"), QKV, statistics_of(*ALL)).kv[1], statistics_of(*ALL)[f"{ATTENTION}.v_amax"]
    )


def test_codes_come_by_part_and_only_where_clipping_was_asked_for() -> None:
    found = statistics_of(*ALL, clip=True)
    codes = numbers(plan("int4_awq", group_size=64, awq_clip=True), QKV, found).codes
    assert_same(codes, {part: found[f"{QKV}.clip.int4_g64.{part}"] for part in ("q", "k", "v")})
    assert_same(numbers(plan("int4_awq", awq_clip=True), FC2, found).codes, {"": found[f"{FC2}.clip.int4_g128"]})
    assert numbers(plan("int4_awq"), QKV, found).codes == {}
    assert same(numbers(plan("nvfp4_awq", awq_clip=True), FC1, found).ratio, torch.tensor(0.85))
    assert numbers(plan("nvfp4_awq"), FC1, found).ratio is None
