"""Checkpoints with LoRA adapters in them, by stand-ins with the keys of the real ones: the bytes of the merged live model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_export import calibrate, export_hf_checkpoint, save_calibration
from megatron_export.names import parameters_of

from ..additions import adapt, describe_adapters
from ..models import assert_same, make_model, read_json, tensors
from ..ranks import Ranks, command, living
from ..saving import built, renamed, save
from .test_checkpoint import flags_of, without_weights
from .test_topologies import calibration_flags, export

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
    with built(source, sizes) as (model, config):
        adapt(model, style)
        ids = load_file(source.parent / "ids" / "calibration.safetensors")["input_ids"]
        measured = calibrate(model, [ids[:4], ids[4:]], format="fp8")
        first = torch.distributed.get_rank() == 0
        if first:
            folder.mkdir(exist_ok=True)
            save_calibration(measured, folder / "calibration.safetensors", config)
        for form in FORMS:
            given = measured if form == "fp8" else None
            asked = {"format": form, "calibration": given, "merge_lora": True}
            export_hf_checkpoint(model, folder / form, hf_model=source, **asked)
        model.config.moe_layer_freq = 1  # not a list: then layers share tensors
        save(model, folder / "saved", config)
        if first:
            describe_adapters(folder / "saved" / "iter_0000007", style)


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
    for case, expected in KEYS.items():
        found = FileSystemReader(saved[case] / "saved" / "iter_0000007").read_metadata().state_dict_metadata
        assert {key: tuple(found[key].size) for key in expected} == expected


def loading(folder: Path, form: str) -> tuple:
    loaded = ("--load-calibration", folder / "calibration.safetensors") if form == "fp8" else ()
    return (*flags_of(folder, form), *loaded, "--merge-lora")


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_in_a_checkpoint_are_merged_to_the_bytes_of_the_merged_live_model(
    case: str, tp: int, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    for form in FORMS:
        said = export(ranks, tp, *loading(saved[case], form), "--tp", tp, "--output", tmp_path / form)
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
    merged = ("--megatron-checkpoint", folder / "saved", "--merge-lora")
    said = export(ranks, 2, "--hf-model", folder / "hf", *merged, *flags, "--output", tmp_path / "out")
    export(ranks, 2, "--hf-model", folder / "bf16", *flags, "--output", tmp_path / "hf")
    assert "load " in said
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))


def without_weights_of_the_model(key: str) -> str:
    return key if ".adapter." in key else f"optimizer.{key}"


@pytest.mark.parametrize(
    ("case", "flag", "rename", "leave_out", "said"),
    [
        (
            "bridge",
            False,
            str,
            "",
            "LoRA adapters (decoder.layers.self_attention.linear_proj.adapter.linear_in.weight, 16 in all), which an exported "
            "checkpoint has no place for. Merge them into the weights with --merge-lora",
        ),
        (
            "modelopt",
            False,
            str,
            "",
            "LoRA adapters (decoder.layers.0.self_attention.linear_proj.lora_a_default.weight, 16 in all), which an exported",
        ),
        (
            "bridge",
            True,
            without_weights_of_the_model,
            "",
            "16 in all) and no weights, which are in the checkpoint that was",
        ),
        (
            "bridge",
            False,
            without_weights_of_the_model,
            "",
            "Merge the two first, with Megatron-Bridge's examples/peft",
        ),
        (
            "bridge",
            True,
            lambda key: key.replace("linear_in.weight", "weight_magnitude"),
            "",
            "linear_proj.adapter.weight_magnitude is of an adapter that is not merged here, only the product of two matrices",
        ),
        (
            "bridge",
            True,
            lambda key: key.replace("linear_qkv.adapter.", "linear_qkv.adapter.adapter_q."),
            "",
            "linear_qkv.adapter.adapter_q.linear_in.weight is of an adapter that is not merged here",
        ),
        (
            "bridge",
            True,
            lambda key: key.replace("linear_qkv.adapter.", "core_attention.adapter."),
            "",
            "there is a LoRA adapter of decoder.layers.0.self_attention.core_attention.weight, which is no parameter of this model",
        ),
        (
            "bridge",
            True,
            lambda key: key.replace("mlp.linear_fc2.adapter.linear_in", "linear_fc2.other"),
            "",
            "half of the adapter of decoder.layers.0.mlp.linear_fc2.weight is missing",
        ),
        (
            "bridge",
            True,
            str,
            "run_config.yaml",
            "peft.alpha in run_config.yaml does not say by how much the adapter of",
        ),
        (
            "modelopt",
            True,
            str,
            "modelopt_state",
            "modelopt_state does not say by how much the adapter of decoder.layers.0",
        ),
        (
            "bridge",
            True,
            lambda key: (
                key.replace("linear_qkv.adapter.linear_in", "linear_qkv.adapter.linear_between")
                .replace("linear_qkv.adapter.linear_out", "linear_qkv.adapter.linear_in")
                .replace("linear_qkv.adapter.linear_between", "linear_qkv.adapter.linear_out")
            ),
            "",
            "the adapter of decoder.layers.0.self_attention.linear_qkv.weight is (8, 64) times (128, 8), and a product of",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_every_rank(
    case: str, flag: bool, rename: Callable, leave_out: str, said: str, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    shutil.copytree(saved[case] / "saved", tmp_path / "saved", ignore=shutil.ignore_patterns(leave_out))
    renamed(tmp_path / "saved" / "iter_0000007", rename)
    flags = ("--hf-model", saved[case] / "hf", "--megatron-checkpoint", tmp_path / "saved", "--format", "bf16")
    flags += ("--tp", 2, "--device", "cpu", "--output", tmp_path / "out", *(("--merge-lora",) if flag else ()))
    (status, text), (second, silence) = ranks.call(2, command, *flags)
    assert (status, second, silence) == (1, 1, "")
    assert said in text
    assert not (tmp_path / "out").exists()


def test_merging_is_refused_where_there_is_nothing_to_merge(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    without = tmp_path / "saved"
    shutil.copytree(saved["bridge"] / "saved", without)
    renamed(without / "iter_0000007", lambda key: f"optimizer.{key}" if ".adapter." in key else key)
    flags = ("--hf-model", saved["bridge"] / "hf", "--merge-lora", "--dry-run", "--device", "cpu")
    ((status, text),) = ranks.call(1, command, *flags, "--megatron-checkpoint", without)
    assert status == 1
    assert "--merge-lora has no effect: " in text
    ((status, text),) = ranks.call(1, command, *flags)
    assert status == 2
