"""Checkpoints that Megatron-FSDP saved, and others of Megatron that are plain torch.distributed.checkpoint."""

import argparse
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_export.checkpoint.torch_dist import MegatronCheckpoint
from megatron_export.models import without_mtp

from ..export.test_topologies import export
from ..support.fsdp import saved_by_fsdp
from ..support.live import refusal
from ..support.models import add_mtp, assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, living
from ..support.saving import PLACE, reading, without_weights

pytestmark = pytest.mark.whole

# Model, ranks and sizes that it was saved at, and the sizes that it is read at.
SAVED: dict[str, tuple[str, int, dict, tuple]] = {
    "dense": ("llama32", 2, {"tp": 1}, ("--tp", 2)),
    "cut both ways": ("qwen3_moe", 4, {"tp": 2, "ep": 2}, ("--pp", 2)),
    "mla": ("deepseek_v3", 2, {"ep": 2}, ("--tp", 2)),
}


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a folder with the checkpoint, `saved`, and an HF folder without weights, `hf`, beside that of the model."""
    folders = {}
    for case, (name, world, sizes, _) in SAVED.items():
        base = tmp_path_factory.mktemp("fsdp")
        source = make_model(base, name)
        if name == "deepseek_v3":
            add_mtp(source)
        (base / "live").mkdir()
        living(pool).call(world, saved_by_fsdp, source, base / "live" / "saved", sizes)
        without_weights(source, base / "live" / "hf")
        folders[case] = base / "live"
    pool.pop().close()  # Megatron-FSDP keeps its models, and these ranks with them 144 threads that poll: new ones follow
    return folders


def test_megatron_fsdp_spells_keys_and_cuts_tensors_in_these_ways(saved: dict) -> None:
    found = {
        case: FileSystemReader(saved[case] / "saved" / PLACE).read_metadata().state_dict_metadata for case in SAVED
    }
    start = "model.module.decoder.layers.0"
    gate = found["dense"][f"{start}.mlp.linear_fc1.weight_w"]
    assert (tuple(gate.size), len(gate.chunks)) == ((96, 64), 1)  # the other rank has only `_v`
    qkv = found["cut both ways"][f"{start}.self_attention.linear_qkv.weight"]
    assert len({tuple(chunk.offsets) for chunk in qkv.chunks}) == 4
    assert f"{start}.mlp.experts.local_experts.3.linear_fc1.weight_v" in found["cut both ways"]
    assert {"args", "optimizer.param_groups.0.lr"} <= found["dense"].keys()
    assert any(key.startswith("optimizer.state.") for key in found["dense"])


@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_of_megatron_fsdp_exports_the_weights_that_were_trained(
    case: str, saved: dict, ranks: Ranks, tmp_path: Path
) -> None:
    name, _, _, sizes = SAVED[case]
    said = export(ranks, 2, *reading(saved[case], "bf16"), *sizes, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(saved[case].parent / name))
    assert "load " not in said  # no model was built


def test_layers_that_predict_can_be_dropped(saved: dict) -> None:
    config = without_mtp(read_json(saved["mla"] / "hf" / "config.json"))
    found = MegatronCheckpoint(saved["mla"] / "saved" / PLACE, config, mtp_dropped=True)
    assert found.sources


@pytest.mark.parametrize("tp", [1, 2, None])
def test_a_linear_of_two_segments_in_one_tensor_is_read_if_it_was_cut_into_one(
    tp: int | None, saved: dict, tmp_path: Path
) -> None:
    """As --ckpt-format torch_dcp saves it."""
    config = read_json(saved["dense"] / "hf" / "config.json")
    trained = MegatronCheckpoint(saved["dense"] / "saved" / PLACE, config)
    whole = {name: trained.shard(source, source.shape, 0, 1) for name, source in trained.sources.items()}
    said = {} if tp is None else {"args": argparse.Namespace(tensor_model_parallel_size=tp)}
    dcp.save({"model": whole, "iteration": 7, **said}, checkpoint_id=tmp_path / "saved", no_dist=True)
    if tp == 1:
        read = MegatronCheckpoint(tmp_path / "saved", config)
        assert all(torch.equal(read.shard(read.sources[n], one.shape, 0, 1), one) for n, one in whole.items())
        return
    message = refusal(MegatronCheckpoint, tmp_path / "saved", config)
    assert "decoder.layers.0.mlp.linear_fc1.weight is one tensor of several segments" in message
    assert "the checkpoint says 2" in message or tp is None
    assert "linear_qkv" not in message


def test_arguments_that_contradict_config_json_are_refused(saved: dict) -> None:
    config = read_json(saved["dense"] / "hf" / "config.json") | {"rms_norm_eps": 0.5}
    message = refusal(MegatronCheckpoint, saved["dense"] / "saved" / PLACE, config)
    assert "the arguments say layernorm_epsilon = " in message


def test_stages_that_were_numbered_each_from_0_lack_layers(saved: dict) -> None:
    config = read_json(saved["dense"] / "hf" / "config.json") | {"num_hidden_layers": 5}
    message = refusal(MegatronCheckpoint, saved["dense"] / "saved" / PLACE, config)
    assert "there is no decoder.layers.4.self_attention.linear_qkv.weight, which config.json calls for" in message


def test_names_of_hf_are_not_taken_for_megatrons(saved: dict, tmp_path: Path) -> None:
    dcp.save({"model": {"model.embed_tokens.weight": torch.ones(4, 4)}}, checkpoint_id=tmp_path / "x", no_dist=True)
    message = refusal(MegatronCheckpoint, tmp_path / "x", read_json(saved["dense"] / "hf" / "config.json"))
    assert "has the names of an HF model (model.model.embed_tokens.weight)" in message
