"""Checkpoints that are not what they should be, or mean harm: refused with all that is wrong, before any tensor is read."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_export import ExportError
from megatron_export.checkpoint.torch_dist import MegatronCheckpoint
from megatron_export.checkpoint.torch_dist_iteration import find_iteration
from megatron_export.models import parameters_of

from ..support.models import make_model, read_json
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused
from ..support.saving import PLACE, metadata_changed, reading, renamed, saved_model
from .test_safe_pickle import Calls


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of two ranks, `saved`, and the HF folder of its model, `hf`."""
    base = tmp_path_factory.mktemp("saved")
    make_model(base, "qwen3_moe").rename(base / "hf")
    living(pool).call(2, saved_model, base / "hf", base / "saved", {"ep": 2}, optimizer=True)
    return base


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """One of the test's own, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "place"))


def said_of(folder: Path, iteration: int | None = None, **changes: Any) -> str:
    """What is said of a checkpoint that is refused."""
    config = read_json(folder / "hf" / "config.json") | changes
    with pytest.raises(ExportError) as caught:
        checkpoint = MegatronCheckpoint(find_iteration(folder / "saved", iteration), config)
        for one in parameters_of(config).values():
            checkpoint.shard(one, one.shape, 0, 1)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def evil(mark: Path) -> Calls:
    """Runs a command of the shell when it is read as pickles usually are."""
    return Calls(os.system, f"touch {mark}")


def in_common(folder: Path, mark: Path) -> None:
    torch.save({"args": evil(mark), "iteration": 7}, folder / "saved" / PLACE / "common.pt")


def in_metadata(folder: Path, mark: Path) -> None:
    metadata_changed(lambda held: vars(held).update(planner_data=evil(mark)))(folder / "saved" / PLACE)


def in_tensor(folder: Path, mark: Path) -> None:
    place = folder / "saved" / PLACE
    torch.save(evil(mark), place / "evil.distcp")
    size = (place / "evil.distcp").stat().st_size
    on_storage(relative_path="evil.distcp", offset=0, length=size)(place)


@pytest.mark.parametrize("plant", [in_common, in_metadata, in_tensor])
def test_a_pickle_that_runs_something_is_refused_and_not_run(plant: Callable, folder: Path, tmp_path: Path) -> None:
    plant(folder, tmp_path / "mark")
    said = said_of(folder)
    assert not (tmp_path / "mark").exists()
    assert_says(said, "system', which no checkpoint needs; nothing of it was run")
    assert plant is in_tensor or "or do not trust it" in said


def test_every_rank_refuses_it_through_the_command(folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    in_metadata(folder, tmp_path / "mark")
    said = refused(ranks, folder, *reading(folder, "bf16"), "--output", folder / "out")
    assert_says(said, f"{folder}/saved/{PLACE}/.metadata: not read (it names", "which no checkpoint needs")
    assert not (tmp_path / "mark").exists()


def test_an_output_that_would_replace_the_checkpoint_is_refused(folder: Path, ranks: Ranks) -> None:
    said = refused(ranks, folder, *reading(folder, "bf16"), "--overwrite", "--output", folder / "saved")
    assert_says(said, f"{folder / 'saved'} holds {folder / 'saved'}, which this export needs")


def legacy(place: Path) -> None:
    shutil.rmtree(place)
    (place / "mp_rank_00").mkdir(parents=True)
    (place / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")


def of_kind(kind: str) -> Callable[[Path], None]:
    return lambda place: (place / "metadata.json").write_text(json.dumps({"sharded_backend": kind}))


def truncated(place: Path) -> None:
    with (place / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)


def overwritten(place: Path) -> None:
    for path in place.glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))


def linked(place: Path) -> None:
    (place / "__0_0.distcp").rename(place.parent / "elsewhere")
    (place / "__0_0.distcp").symlink_to(place.parent / "elsewhere")


def without(key: str) -> Callable[[Path], None]:
    return metadata_changed(lambda held: held.state_dict_metadata.pop(key))


def with_another(held: Any) -> None:
    held.state_dict_metadata["decoder.layers.2.mlp.gate.weight"] = held.state_dict_metadata["output_layer.weight"]
    held.storage_data |= {
        type(index)("decoder.layers.2.mlp.gate.weight", index.offset): info
        for index, info in list(held.storage_data.items())
        if index.fqn == "output_layer.weight"
    }


def on_storage(**changes: Any) -> Callable[[Path], None]:
    """Change what is said of where the final norm lies."""

    def change(held: Any) -> None:
        for index, info in held.storage_data.items():
            if index.fqn == "decoder.final_layernorm.weight":
                info.__dict__.update(changes)

    return metadata_changed(change)


def smaller(held: Any) -> None:
    held.state_dict_metadata["decoder.final_layernorm.weight"].chunks[0].sizes = torch.Size([32])


Q = "decoder.layers.0.self_attention.linear_qkv.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "legacy": (legacy, ("is a checkpoint of the old kind", "--ckpt-convert-format torch_dist --ckpt-convert-save DIR")),
    "zarr": (of_kind("zarr"), ("is a zarr checkpoint", "--ckpt-format torch_dist")),
    "another kind": (of_kind("x"), ("sharded_backend is 'x'; only 'torch_dist' is read",)),
    "interrupted": (lambda place: (place / ".metadata").unlink(), ("has no .metadata, which is written last",)),
    "file lost": (lambda place: (place / "__0_0.distcp").unlink(), ("__0_0.distcp is missing. Copy or save",)),
    "file truncated": (truncated, ("__0_0.distcp has 1,000 bytes, but .metadata means at least",)),
    "file overwritten": (overwritten, (".distcp: not read (no archive of torch.save", "Copy or save")),
    "file elsewhere": (linked, ("__0_0.distcp is a symbolic link out of its folder",)),
    "metadata truncated": (
        lambda place: (place / ".metadata").write_bytes((place / ".metadata").read_bytes()[:999]),
        (".metadata: not read (a damaged pickle",),
    ),
    "metadata of something else": (
        lambda place: (place / ".metadata").write_bytes(pickle.dumps([1])),
        (".metadata: not read (it does not say where tensors lie)",),
    ),
    "common state broken": (  # if there is such a file, it speaks
        lambda place: (place / "common.pt").write_bytes(b"PK"),
        ("common.pt: not read (no archive of torch.save",),
    ),
    "tensor lost": (without(Q), (f"there is no {Q}, which config.json calls for",)),
    "tensors too many": (metadata_changed(with_another), ("there is a tensor decoder.layers.2.mlp.gate.weight that config.json",)),
    "a way out": (on_storage(relative_path="../x"), ("'../x' is not the name of a file in this folder",)),
    "compressed": (on_storage(transform_descriptors=["zstd"]), ("'decoder.final_layernorm.weight' is compressed",)),
    "beyond the end": (on_storage(length=10**9), ("bytes, but .metadata means at least 1,000,",)),
    "at another place": (on_storage(offset=3), (".distcp: not read (no archive of torch.save",)),
    "a hole": (metadata_changed(smaller), ("the parts of 'decoder.final_layernorm.weight' do not make it whole",)),
    "two names": (
        lambda place: renamed(place, lambda key: key.replace("layers.1.mlp.linear_fc2", "layers.0.mlp.linear_fc2")),
        ("there is no decoder.layers.1.mlp.linear_fc2.weight", "there is a tensor decoder.layers.0.mlp.linear_fc2.weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, folder: Path) -> None:
    harm, words = DAMAGES[damage]
    harm(folder / "saved" / PLACE)
    assert_says(said_of(folder), *words)


@pytest.mark.parametrize(
    ("tracker", "iteration", "words"),
    [
        ("8", None, ("has no iter_0000008. There are iter_0000007, release",)),
        ("soon", None, ("says 'soon', no iteration", "Choose one with --iteration")),
        (None, None, ("has no latest_checkpointed_iteration.txt", "There are iter_0000007, release")),
        ("7", 12, ("has no iter_0000012",)),
    ],
)
def test_an_iteration_that_cannot_be_found_is_told_with_those_that_can(
    tracker: str | None, iteration: int | None, words: tuple, folder: Path
) -> None:
    (folder / "saved" / "release").mkdir()
    (folder / "saved" / "latest_checkpointed_iteration.txt").unlink()
    if tracker:
        (folder / "saved" / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert_says(said_of(folder, iteration), *words)


def test_iterations_are_found_by_the_tracker_by_number_and_by_their_own_folder(folder: Path) -> None:
    saved = folder / "saved"
    assert find_iteration(saved, None) == find_iteration(saved, 7) == find_iteration(saved / PLACE, None)
    (saved / PLACE).rename(saved / "release")
    (saved / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert find_iteration(saved, None) == saved / "release"
    with pytest.raises(ExportError, match="is one iteration already, not number 7. Leave out --iteration"):
        find_iteration(saved / "release", 7)


RUN = """
model:
  _target_: megatron.bridge.models.qwen.Qwen3MoEModelProvider
  activation_func: !!python/object/apply:os.system ["touch mark"]
  num_layers: 4
  hidden_size: 65
  share_embeddings_and_output_weights: true
  moe_router_topk: 2
train: {iters: 5}
"""


def test_all_contradictions_are_told_at_once(saved: Path, folder: Path, ranks: Ranks, tmp_path: Path) -> None:
    shutil.rmtree(folder / "saved")
    args = {"num_layers": 5, "rotary_base": 777, "num_experts": 8, "swiglu": False, "tokenizer_model": "x"}
    ranks.call(1, saved_model, saved / "hf", folder / "saved", {}, args=args)
    (folder / "saved" / PLACE / "run_config.yaml").write_text(RUN.replace("mark", str(tmp_path / "mark")))
    without(Q)(folder / "saved" / PLACE)
    said = said_of(folder)
    assert_says(
        said,
        "7 problems:",
        "the arguments say num_layers = 5, but config.json means 4",
        "the arguments say rotary_base = 777, but config.json means 10000.0",
        "the arguments say num_moe_experts = 8, but config.json means 4",
        "the arguments say gated_linear_unit = False, but config.json means True",
        "the settings in run_config.yaml say hidden_size = 65, but config.json means 64",
        "the settings in run_config.yaml say share_embeddings_and_output_weights = True, but config.json means False",
        f"there is no {Q}, which config.json calls for",
    )
    assert not (tmp_path / "mark").exists()


def test_config_json_of_another_model_is_refused_with_every_difference(folder: Path) -> None:
    said = said_of(folder, num_hidden_layers=5, num_experts=2, vocab_size=600, tie_word_embeddings=True)
    assert_says(
        said,
        "say num_layers = 4, but config.json means 5",
        "say num_moe_experts = 4, but config.json means 2",
        "say share_embeddings_and_output_weights = False, but config.json means True",
        "there is no decoder.layers.4.input_layernorm.weight, which config.json calls for",
        "embedding.word_embeddings.weight is (512, 64), but config.json means (600, 64)",
        "there is a tensor output_layer.weight that config.json does not call for",
        "there is a tensor decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight (and",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not YAML"),
        ("- 1", "it has no settings of a model"),
        ("&a [*a, *a]: 1", "not YAML"),
        ("x" * 2**21, "more than"),
    ],
)
def test_a_run_config_that_is_none_is_refused(text: str, words: str, folder: Path) -> None:
    (folder / "saved" / PLACE / "run_config.yaml").write_text(text)
    assert_says(said_of(folder), "run_config.yaml: not read (", words)


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(folder: Path) -> None:
    config = read_json(folder / "hf" / "config.json")
    checkpoint = MegatronCheckpoint(find_iteration(folder / "saved", None), config)
    one = checkpoint.sources["output_layer.weight"]
    checkpoint.shard(one, one.shape, 0, 1)
    for path in (folder / "saved" / PLACE).glob("*.distcp"):
        os.utime(path, ns=(0, 0))
    with pytest.raises(ExportError, match="changed while it was exported"):
        checkpoint.shard(one, one.shape, 0, 1)


def test_flags_that_say_too_little_are_bad_usage(ranks: Ranks, tmp_path: Path) -> None:
    said = refused(
        ranks, tmp_path, "--hf-model", "x", "--iteration", 3, "--format", "bf16", "--output", tmp_path / "out", status=2
    )
    assert_says(said, "--megatron-checkpoint")
