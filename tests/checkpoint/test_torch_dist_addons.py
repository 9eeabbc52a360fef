"""Checkpoints with LoRA adapters or ModelOpt's quantizers in them, by stand-ins with the keys of the real ones: the bytes of the
live model. `calibration/test_modelopt.py` has the real quantizers.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_export import export_hf_checkpoint
from megatron_export.models import parameters_of

from ..export.test_topologies import calibration_flags, export
from ..support.additions import (
    FOUR_OVER_SIX,
    FP8,
    FP8_PB,
    INT4,
    NVFP4,
    OFF,
    STATIC,
    adapt,
    describe_adapters,
    prepare_to_save,
    quantize,
)
from ..support.live import loaded
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, command, living
from ..support.refusals import assert_says, refused
from ..support.saving import PLACE, assert_keys, changing, export_and_save, reading, renamed, save, without_weights

pytestmark = pytest.mark.whole

FORMS = ("bf16", "fp8_pb", "fp8")
SAVED: dict[str, tuple[str, str, dict]] = {
    "bridge": ("llama31", "bridge", {"tp": 2}),
    "modelopt": ("llama31", "modelopt", {"tp": 2}),
    "bridge, experts": ("mixtral", "bridge", {"ep": 2}),
    "modelopt, experts": ("mixtral", "modelopt", {"tp": 2}),
}
KEYS = {
    "bridge": {
        "decoder.layers.mlp.linear_fc1.adapter.linear_in.weight": (4, 8, 64),
        "decoder.layers.mlp.linear_fc1.adapter.linear_out.weight": (4, 192, 8),
    },
    "modelopt": {"decoder.layers.3.mlp.linear_fc1.lora_b_default.weight": (192, 8)},
    "bridge, experts": {"decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_out.weight": (4, 4, 192, 8)},
    "modelopt, experts": {"decoder.layers.0.mlp.experts.experts.linear_fc2.lora_a_default.weight": (4, 8, 96)},
}


def save_adapted(source: Path, folder: Path, style: str, sizes: dict) -> None:
    """In a rank: export a model with adapters in every form, and save it."""
    with loaded(source, **sizes) as (model, _):
        adapt(model, style)
        export_and_save(model, source, folder, FORMS, alike=True, merge_lora=True)
        if torch.distributed.get_rank() == 0:
            describe_adapters(folder / "saved" / PLACE, style)


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with the checkpoint, the live model's merged exports, their calibration, an HF folder without weights."""
    folders = {}
    for case, (name, style, sizes) in SAVED.items():
        base = tmp_path_factory.mktemp("saved")
        source = make_model(base, name)
        living(pool).call(2, save_adapted, source, base / "live", style, sizes)
        without_weights(source, base / "live" / "hf")
        folders[case] = base / "live"
    return folders


def test_the_stand_ins_have_the_keys_of_the_real_ones(saved: dict) -> None:
    assert_keys(KEYS, saved)


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_in_a_checkpoint_are_merged_to_the_bytes_of_the_merged_live_model(
    case: str, tp: int, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for form in FORMS:
        said = export(ranks, tp, *reading(saved[case], form), "--merge-lora", "--tp", tp, "--output", tmp_path / form)
        assert_same(tensors(tmp_path / form), tensors(saved[case] / form))
        assert "load " not in said  # no model was built
    source = saved[case].parent / SAVED[case][0]
    plain, found = tensors(source), tensors(tmp_path / "bf16")
    sources = parameters_of(read_json(source / "config.json")).items()
    adapted = {hf for name, one in sources if ".linear_" in name for hf in one.names().values()}
    assert {name for name in plain if not torch.equal(plain[name], found[name])} == adapted


def test_a_model_that_is_calibrated_is_filled_with_merged_weights(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    folder = saved["bridge"]
    flags = ("--format", "fp8", *calibration_flags(folder.parent / "llama31"), "--tp", 2)
    said = export(ranks, 2, *reading(folder), "--merge-lora", *flags, "--output", tmp_path / "out")
    export(ranks, 2, "--hf-model", folder / "bf16", *flags, "--output", tmp_path / "hf")
    assert "load " in said
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


def without_model(key: str) -> str:
    return key if ".adapter." in key else f"optimizer.{key}"


def without_adapters(key: str) -> str:
    return f"optimizer.{key}" if ".adapter." in key else key


def keyed(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Other keys, by patterns."""
    return lambda place: renamed(place, changing(*pairs))


QKV, IN_LAYER_0 = r"linear_qkv\.adapter\.", "decoder.layers.0.self_attention"
# What is wrong -> case, what is done to the checkpoint, whether it is to be merged, what is said.
UNMERGED: dict[str, tuple[str, Callable[[Path], object], bool, str]] = {
    "not asked for": ("bridge", keyed(), False,
        "LoRA adapters (decoder.layers.self_attention.linear_proj.adapter.linear_in.weight, 16 in all), which an exported "
        "checkpoint has no place for. Merge them into the weights with --merge-lora"),
    "not asked for, of ModelOpt": ("modelopt", keyed(), False,
        f"LoRA adapters ({IN_LAYER_0}.linear_proj.lora_a_default.weight, 16 in all), which an exported"),
    "alone": ("bridge", lambda place: renamed(place, without_model), True,
        "16 in all) and no weights, which are in the checkpoint that was"),
    "alone, not asked for": ("bridge", lambda place: renamed(place, without_model), False,
        "--megatron-checkpoint, and this one as --lora-checkpoint"),
    "a magnitude": ("bridge", keyed((r"linear_in\.weight", "weight_magnitude")), True,
        "linear_proj.adapter.weight_magnitude is of an adapter that is not merged here, only the product of two matrices"),
    "of q alone": ("bridge", keyed((QKV, "linear_qkv.adapter.adapter_q.")), True,
        "linear_qkv.adapter.adapter_q.linear_in.weight is of an adapter that is not merged here"),
    "of no matrix": ("bridge", keyed((QKV, "core_attention.adapter.")), True,
        f"there is a LoRA adapter of {IN_LAYER_0}.core_attention.weight, which is no matrix of this model"),
    "half": ("bridge", keyed((r"mlp\.linear_fc2\.adapter\.linear_in", "linear_fc2.other")), True,
        "half of the adapter of decoder.layers.0.mlp.linear_fc2.weight is missing"),
    "without its scale": ("bridge", lambda place: (place / "run_config.yaml").unlink(), True,
        "peft.alpha in run_config.yaml does not say by how much the adapter of"),
    "without its scale, of ModelOpt": ("modelopt", lambda place: shutil.rmtree(place / "modelopt_state"), True,
        "modelopt_state does not say by how much the adapter of decoder.layers.0"),
    "the halves swapped": (
        "bridge", keyed((f"{QKV}linear_in", "x"), (f"{QKV}linear_out", "linear_qkv.adapter.linear_in"),
                        (r"\bx\b", "linear_qkv.adapter.linear_out")), True,
        f"the adapter of {IN_LAYER_0}.linear_qkv.weight is (8, 64) times (128, 8), and a product of"),
}  # fmt: skip


@pytest.mark.parametrize("problem", UNMERGED)
def test_adapters_that_cannot_be_merged_are_refused_by_every_rank(
    problem: str, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    case, harm, merge, said = UNMERGED[problem]
    for name in ("saved", "hf"):
        shutil.copytree(saved[case] / name, tmp_path / name)
    harm(tmp_path / "saved" / PLACE)
    flags = (*reading(tmp_path, "bf16"), "--tp", 2, "--output", tmp_path / "out", *(["--merge-lora"] if merge else []))
    assert_says(refused(ranks, tmp_path, *flags), said)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"*linear_qkv": {"scale": 1.5}},
        {"*": {"scale": 1.5}, "*linear_fc1": {"scale": 1.0}},
        {"*": {"scale": 1.5}, "*layers.0.*": {"scale": 2.0}},
        {"*": {"scale": "1.5"}},
        {"*": {"scale": [1.5]}},
        {"*": {"scale": float("nan")}},
        {"*": {"scale": 10**400}},
    ],
    ids=str,
)
def test_scales_that_are_not_said_once_are_not_guessed(
    patterns: dict, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """A pattern of ModelOpt's that names a layer means its number on a pipeline stage."""
    for name in ("saved", "hf"):
        shutil.copytree(saved["modelopt"] / name, tmp_path / name)
    config = {"adapter_name": "default", "adapter_cfg": patterns}
    state = {"modelopt_state_dict": [("peft", {"config": config})]}
    torch.save(state, tmp_path / "saved" / PLACE / "modelopt_state" / "common.pt")
    said = refused(ranks, tmp_path, *reading(tmp_path), "--merge-lora", "--dry-run")
    assert_says(said, "modelopt_state does not say by how much the adapter of decoder.layers.0.")


@pytest.fixture
def halves(saved: dict, tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint of "bridge" without its adapters, and one of nothing else."""
    for name, keep in (("base", without_adapters), ("adapters", without_model)):
        shutil.copytree(saved["bridge"] / "saved", tmp_path / name)
        renamed(tmp_path / name / PLACE, keep)
    (tmp_path / "base" / PLACE / "run_config.yaml").unlink()
    return tmp_path / "base", tmp_path / "adapters"


@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_alone_are_merged_into_the_checkpoint_that_they_were_trained_on(
    tp: int, saved: dict, halves: tuple, ranks: Ranks, tmp_path: Path
) -> None:
    base, adapters = halves
    flags = ("--hf-model", saved["bridge"] / "hf", "--megatron-checkpoint", base, "--lora-checkpoint", adapters)
    export(ranks, tp, *flags, "--format", "bf16", "--tp", tp, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(saved["bridge"] / "bf16"))


@pytest.mark.parametrize(
    ("base", "adapters", "said"),
    [
        ("base", "base", "--lora-checkpoint has no effect: "),
        ("base", "saved", "has weights beside its adapters (embedding.word_embeddings.weight). Give it as --megatron-checkpoint"),
        ("saved", "adapters", "has LoRA adapters of its own. Give the checkpoint that those in"),
        ("adapters", "adapters", "and no weights, which are in the checkpoint that was trained further"),
    ],
)  # fmt: skip
def test_adapters_and_weights_that_do_not_belong_together_are_refused(
    base: str, adapters: str, said: str, saved: dict, halves: tuple, ranks: Ranks, tmp_path: Path
) -> None:
    places = {"saved": saved["bridge"] / "saved", "base": halves[0], "adapters": halves[1]}
    flags = ("--megatron-checkpoint", places[base], "--lora-checkpoint", places[adapters], "--dry-run")
    assert_says(refused(ranks, tmp_path, "--hf-model", saved["bridge"] / "hf", *flags), said)


def test_merging_is_refused_where_there_is_nothing_to_merge(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    shutil.copytree(saved["bridge"] / "saved", tmp_path / "saved")
    renamed(tmp_path / "saved" / PLACE, without_adapters)
    flags = ("--hf-model", saved["bridge"] / "hf", "--merge-lora", "--dry-run")
    said = refused(ranks, tmp_path, *flags, "--megatron-checkpoint", tmp_path / "saved")
    assert_says(said, "--merge-lora has no effect: ")
    ((status, _),) = ranks.call(1, command, *flags, "--device", "cpu")
    assert status == 2


QUANTIZED: dict[str, tuple[str, dict, tuple, dict]] = {
    "fp8": ("wide", {"tp": 2}, (FP8, FP8, FP8), {}),
    "fp8 of equal layers": ("wide", {"tp": 2}, (FP8, FP8, FP8), {}),
    "nvfp4": ("wide", {"tp": 2}, (NVFP4, NVFP4, NVFP4), {}),
    "fp8_pb": ("wide", {"tp": 2}, (FP8_PB, OFF), {}),
    "int4_awq": ("wide", {"tp": 2}, (INT4, OFF), {"smoothed": True}),
    "w4a8_awq": ("wide", {"tp": 2}, (INT4, FP8), {"smoothed": True}),
    "static nvfp4": ("wide", {"tp": 2}, (STATIC, NVFP4), {"scales": "mse"}),
    "four over six": ("wide", {"tp": 2}, (FOUR_OVER_SIX, OFF), {"scales": "four_over_six"}),
    "nvfp4_awq": ("wide", {"tp": 2}, (NVFP4, NVFP4), {"smoothed": True}),
    "stale": ("wide", {"tp": 2}, (INT4, OFF), {"smoothed": True, "factor": 0.5}),
    "experts": ("qwen3_moe", {"ep": 2}, (FP8, FP8), {}),
    "grouped experts": ("qwen3_moe", {"ep": 2}, (FP8, FP8), {}),
    "adapters": ("wide", {"tp": 2}, (FP8, FP8), {}),
    "nonsense": ("wide", {"tp": 2}, (FP8, FP8 | {"_num_bits": "four"}), {}),
}
REFUSED = {"stale", "adapters", "nonsense"}


def save_quantized(source: Path, folder: Path, case: str) -> None:
    """In a rank: put quantizers into a model, export it, and save it."""
    _, sizes, how, changes = QUANTIZED[case]
    with loaded(source, **sizes) as (model, _):
        config = read_json(source / "config.json")
        if case == "adapters":
            adapt(model, "modelopt")
        quantize(model, *how, **changes)
        prepare_to_save(model, grouped=case == "grouped experts")
        apart = "equal layers" not in case
        model.config.hetereogenous_dist_checkpoint = apart
        if case not in REFUSED:
            export_hf_checkpoint(model, folder / "live", hf_model=source)
        save(model, folder / "saved", config, metadata={"singleton_local_shards": apart})
        if case == "adapters" and torch.distributed.get_rank() == 0:
            describe_adapters(folder / "saved" / PLACE, "modelopt")


@pytest.fixture(scope="module")
def quantized(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with the checkpoint, the live model's export, and an HF folder without weights."""
    folders, wide = {}, {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    for case, (name, *_) in QUANTIZED.items():
        base = tmp_path_factory.mktemp("quantized")
        source = make_model(base, "llama31", **wide) if name == "wide" else make_model(base, name)
        living(pool).call(2, save_quantized, source, base, case)
        without_weights(source, base / "hf")
        folders[case] = base
    return folders


def test_the_stand_ins_have_the_keys_of_real_quantizers(quantized: dict) -> None:
    expected: dict[str, dict] = {
        "fp8": {
            "decoder.layers.0.self_attention.linear_qkv.input_quantizer._amax": (1,),
            "decoder.layers.0.self_attention.core_attention.k_bmm_quantizer._amax": (),
            "decoder.layers.0.mlp.linear_fc1.weight_w": (512, 256),
        },
        "fp8 of equal layers": {"decoder.layers.mlp.linear_fc1.weight_quantizer._amax": (2, 1)},
        "fp8_pb": {"decoder.layers.1.mlp.linear_fc1.weight_quantizer._amax": (8, 2)},
        "w4a8_awq": {
            "decoder.layers.0.mlp.linear_fc2.weight_quantizer.0._amax": (256, 4),
            "decoder.layers.0.mlp.linear_fc2.input_quantizer._pre_quant_scale": (512,),
        },
        "experts": {"decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_quantizer._amax": (1,)},
    }
    for found in assert_keys(expected, quantized).values():
        assert any("linear_qkv._extra_state/shard_0" in key for key in found)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", sorted(QUANTIZED.keys() - REFUSED))
def test_a_quantized_checkpoint_says_itself_what_it_is_exported_to(
    case: str, tp: int, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    said = export(ranks, tp, *reading(quantized[case]), "--tp", tp, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(quantized[case] / "live"))
    assert "load " not in said  # no model was built
    configs = [read_json(place / "config.json") for place in (tmp_path / "out", quantized[case] / "live")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_dry_run_tells_what_the_quantizers_mean(quantized: dict, ranks: Ranks, tmp_path: Path) -> None:
    dry = export(ranks, 1, *reading(quantized["nvfp4"]), "--dry-run").splitlines()
    real = export(ranks, 1, *reading(quantized["nvfp4"]), "--output", tmp_path / "out").splitlines()
    assert any("nvfp4, KV cache nvfp4" in line for line in dry)
    assert not any("a calibration run" in line for line in dry)
    assert {"format", "written"} <= {line.split("  ")[0] for line in real if line in dry}


def without_settings(key: str) -> str:
    return f"optimizer.{key}" if "_extra_state" in key else key


@pytest.mark.parametrize("case", ["fp8", "nvfp4", "fp8_pb", "int4_awq", "w4a8_awq", "nvfp4_awq", "experts"])
def test_settings_that_were_not_saved_are_those_of_the_format_that_the_buffers_fit(
    case: str, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for name in ("saved", "hf"):
        shutil.copytree(quantized[case] / name, tmp_path / name)
    renamed(tmp_path / "saved" / PLACE, without_settings)
    flags = (*reading(tmp_path), "--output", tmp_path / "out")
    scalar = {"fp8": "fp8", "nvfp4": "nvfp4", "experts": "fp8"}.get(case)
    if scalar:
        said = refused(ranks, tmp_path, *flags)
        assert_says(
            said,
            "round: it was saved without its _extra_state",
            "they fit fp8 and nvfp4 and w4a8_nvfp4_fp8: say --format",
        )
        flags += ("--format", scalar, *(("--kv-cache", scalar) if case != "experts" else ()))
    export(ranks, 1, *flags)
    assert_same(tensors(tmp_path / "out"), tensors(quantized[case] / "live"))


@pytest.mark.parametrize(
    ("case", "flags", "said"),
    [
        ("fp8", ("--format", "nvfp4"), "format is 'nvfp4', but ModelOpt quantized this model to 'fp8'"),
        ("fp8", ("--kv-cache", "none"), "kv_cache is 'none', but ModelOpt quantized this model to 'fp8'"),
        ("int4_awq", ("--exclude", "*.o_proj"), "exclude cannot undo what ModelOpt has smoothed"),
        ("fp8", ("--save-calibration", "statistics.safetensors"), "--save-calibration and --calib-data have no effect"),
        ("fp8", ("--load-calibration", "statistics.safetensors"), "leave calibration out, or disable the quantizers"),
        ("stale", (), "such): its quantizer's amaxes are not those of its weight's blocks"),
        ("adapters", ("--merge-lora",), "has LoRA adapters and ModelOpt's quantizers, which were calibrated without them"),
    ],
)  # fmt: skip
def test_contradictions_of_a_quantized_checkpoint_are_refused_by_every_rank(
    case: str, flags: tuple, said: str, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    flags = (*reading(quantized[case]), *flags, "--tp", 2, "--output", tmp_path / "out")
    assert_says(refused(ranks, tmp_path, *flags), said)
