"""State dicts with HF's names that torch.distributed.checkpoint saved: the bytes of the same weights in safetensors."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_export.checkpoint.hf_storage import DcpFolder
from megatron_export.checkpoint.hf_weights import SourceWeights

from ..export.test_topologies import calibration_flags, export
from ..support.dcp import spread, trained_under_fsdp2
from ..support.live import refusal
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused
from ..support.saving import metadata_changed, without_weights

pytestmark = pytest.mark.whole

# Model, ranks, how it was saved.
SAVED: dict[str, tuple[str, int, Callable]] = {
    "fsdp2": ("llama32", 2, trained_under_fsdp2),  # tied: both names are there
    "fsdp2 with experts": ("qwen3_moe", 2, trained_under_fsdp2),  # stacked, as transformers has them in memory
    "cut both ways": ("deepseek_v3", 4, spread),
}


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with the checkpoint, `saved`, an HF folder without weights, `hf`, and one with them, of the model's name."""
    folders = {}
    for case, (name, world, save) in SAVED.items():
        base = tmp_path_factory.mktemp("dcp")
        source = make_model(base, name)
        living(pool).call(world, save, source, base / "saved", *(("_orig_mod.",) if save is spread else ()))
        without_weights(source, base / "hf")
        folders[case] = base
    return folders


def flags(folder: Path) -> tuple:
    return ("--hf-model", folder / "hf", "--dcp-checkpoint", folder / "saved")


def test_what_trainers_save_looks_so(saved: dict) -> None:
    found = {
        case: FileSystemReader(folder / "saved").read_metadata().state_dict_metadata for case, folder in saved.items()
    }
    dense = found["fsdp2"]
    assert {"model.model.embed_tokens.weight", "model.lm_head.weight", "step"} <= dense.keys()
    assert len(dense["model.model.layers.0.mlp.up_proj.weight"].chunks) == 2
    assert any(key.startswith("optim.state.") for key in dense)
    assert "model.model.layers.0.mlp.experts.gate_up_proj" in found["fsdp2 with experts"]
    assert len(found["cut both ways"]["model.layers._orig_mod.0.self_attn.o_proj.weight"].chunks) == 4


@pytest.mark.parametrize("case", SAVED)
def test_the_bytes_are_those_of_safetensors(case: str, saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    source = saved[case] / SAVED[case][0]
    common = ("--format", "nvfp4", "--tp", 2, *calibration_flags(source))
    export(ranks, 2, "--hf-model", source, *common, "--output", tmp_path / "hf")
    export(ranks, 2, *flags(saved[case]), *common, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))
    left, right = (read_json(tmp_path / one / "export_manifest.json") for one in ("hf", "out"))
    assert left["identity"] == right["identity"]
    assert right["run"]["dcp_checkpoint"] == "saved"


@pytest.mark.parametrize("case", ["fsdp2", "fsdp2 with experts"])
def test_transformers_loads_it_too(case: str, saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    for world in (1, 2):
        out = tmp_path / f"{world}"
        export(ranks, world, *flags(saved[case]), "--format", "bf16", "--engine", "transformers", "--output", out)
        assert_same(tensors(out), tensors(saved[case] / SAVED[case][0]))


def test_optimizer_state_is_not_read(saved: dict) -> None:
    folder = DcpFolder(saved["fsdp2"] / "saved", read_json(saved["fsdp2"] / "hf" / "config.json"))
    assert folder.homes.keys() >= {"model.norm.weight", "lm_head.weight"}
    assert not [name for name in folder.homes if "exp_avg" in name or "optim" in name or "step" in name]
    with SourceWeights(folder) as weights:
        for name, tensor in tensors(saved["fsdp2"] / "llama32").items():
            assert torch.equal(weights.whole(name).bfloat16(), tensor)
        part = weights.read("model.embed_tokens.weight", (slice(3, 400, 7), slice(5, None)), torch.float32)
        assert torch.equal(part, weights.whole("model.embed_tokens.weight")[3:400:7, 5:])


class Running:
    def __reduce__(self) -> tuple:
        return (print, ("ran",))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda place: next(place.glob("*.distcp")).write_bytes(b"x" * 99),
        "99 bytes, but .metadata means at least",
    ),
    "a file lost": (lambda place: next(place.glob("*.distcp")).unlink(), ".distcp is missing. Copy or save"),
    "interrupted": (
        lambda place: (place / ".metadata").unlink(),
        "has no .metadata, which torch.distributed.checkpoint writes",
    ),
    "a pickle that runs": (
        lambda place: (place / ".metadata").write_bytes(pickle.dumps(Running())),
        "it names 'builtins.print', which no checkpoint needs; nothing of it was run",
    ),
    "a tensor lost": (
        metadata_changed(lambda held: held.state_dict_metadata.pop("model.model.norm.weight")),
        "tensor model.norm.weight is missing",
    ),
    "no embedding": (
        metadata_changed(lambda held: held.state_dict_metadata.pop("model.model.embed_tokens.weight")),
        "there is no model.embed_tokens.weight, which config.json means, but ",
    ),
}


def test_what_is_damaged_is_refused(source: Path, saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    config = read_json(source / "config.json")
    weights = {name: tensor for name, tensor in sorted(tensors(source).items())}
    for case, (damage, said) in DAMAGES.items():
        place = tmp_path / case
        dcp.save({"model": weights}, checkpoint_id=place, no_dist=True)
        damage(place)
        message = refusal(
            lambda place: SourceWeights(DcpFolder(place, config), config=config).check_model(config), place
        )
        assert said in message, case
    out = tmp_path / "place" / "out"
    given = ("--hf-model", source, "--dcp-checkpoint", tmp_path / "a tensor lost", "--format", "bf16", "--output", out)
    assert_says(refused(ranks, tmp_path, *given), "tensor model.norm.weight is missing")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"model": {"tok_embeddings.weight": torch.ones(2)}}, "the names are torchtitan's own"),
        (
            {"model": {"embedding.word_embeddings.weight": torch.ones(2)}},
            "the names are Megatron's. Give it as --megatron-",
        ),
        (
            {one: {"model.embed_tokens.weight": torch.ones(2)} for one in ("ema", "model")},
            "has 2 models, whose names begin with 'ema.",
        ),
        ({"step": 1}, "but no tensor and so on: give the --hf-model that belongs to it"),
    ],
)
def test_other_names_are_refused(state: dict, said: str, models: dict, tmp_path: Path) -> None:
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    config = read_json(models["llama31"] / "config.json")
    assert said in refusal(DcpFolder, tmp_path / "step-1", config)
    assert "Give one of the folders in it that have: step-1" in refusal(DcpFolder, tmp_path, config)
