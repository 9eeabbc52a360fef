"""Tensors that Megatron takes another one for: equal ones are passed over, others are refused, by an export and by verify."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.common import strips
from megatron_export.common.errors import ExportError
from megatron_export.common.file_names import INDEX
from megatron_export.models import shared_tensors
from megatron_export.verify.judge import judge

from ..export.test_topologies import export
from ..support.exported import exported
from ..support.models import add_mtp, assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, refused, rewritten

pytestmark = pytest.mark.whole

HEAD, EMBEDDING, LAYER = "lm_head.weight", "model.embed_tokens.weight", "model.layers.4."


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with its head in the files once more."""
    source = make_model(tmp_path_factory.mktemp("tied"), "llama32")
    rewritten(lambda held: held.update({HEAD: held[EMBEDDING].clone()}))(source)
    return source


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_model(tmp_path_factory.mktemp("mtp"), "glm4_moe")
    add_mtp(source)
    return source


def trained(tied: Path, folder: Path) -> Path:
    """The same with a head of its own: one number of its last row is another."""
    shutil.copytree(tied, folder)
    rewritten(lambda held: held[HEAD][-1, -1].add_(1))(folder)
    return folder


def flags(source: Path, output: Path, *more: object) -> tuple:
    return ("--hf-model", source, "--format", "bf16", "--output", output, *more)


def test_a_head_that_is_the_embedding_is_passed_over(tied: Path, ranks: Ranks, tmp_path: Path) -> None:
    export(ranks, 2, *flags(tied, tmp_path / "out"), "--tp", 2)
    assert_same(tensors(tmp_path / "out"), {name: t for name, t in tensors(tied).items() if name != HEAD})


@pytest.mark.parametrize("sizes", [("--tp", 2), ("--pp", 2)], ids=["tp2", "pp2"])
def test_a_tied_model_with_a_head_of_its_own_is_refused_and_the_way_out_works(
    sizes: tuple, tied: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    source = trained(tied, tmp_path / "model")
    said = refused(ranks, tmp_path, *flags(source, output), *sizes)
    assert_says(said, f"{source}: tensor {HEAD} is not equal to {EMBEDDING}", "transformers 5 computes with the first")
    assert_says(said, f"Set tie_word_embeddings to false in {source / 'config.json'}")
    config = read_json(source / "config.json")
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    export(ranks, 2, *flags(source, output), *sizes)
    assert_same(tensors(output), tensors(source))


def test_verify_finds_a_head_that_was_dropped(tied: Path, tmp_path: Path) -> None:
    source = trained(tied, tmp_path / "model")
    exported(tied, tmp_path / "out", "bf16")
    assert judge(tmp_path / "out", tied).problems == []
    (problem,) = judge(tmp_path / "out", source).problems
    assert problem.startswith(f"{HEAD} of the reference is not its {EMBEDDING}")
    assert "set tie_word_embeddings to false" in problem


def test_verify_finds_a_tensor_of_the_reference_that_nothing_was_made_of(tied: Path, tmp_path: Path) -> None:
    exported(tied, tmp_path / "out", "fp8")
    source = tmp_path / "model"
    shutil.copytree(tied, source)
    rewritten(lambda held: held.update({"model.layers.0.self_attn.gate.weight": torch.ones(4)}))(source)
    (problem,) = judge(tmp_path / "out", source).problems
    assert problem.startswith("model.layers.0.self_attn.gate.weight of the reference is not part of this model")


@pytest.mark.parametrize("name", ["embed_tokens", "shared_head.head"])
def test_an_embedding_or_head_that_a_predicting_layer_has_for_itself_is_refused(
    name: str, predicting: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(predicting, source)
    rewritten(lambda held: held[f"{LAYER}{name}.weight"][0, 0].add_(1))(source)
    said = refused(ranks, tmp_path, *flags(source, output))
    partner = EMBEDDING if name == "embed_tokens" else HEAD
    assert_says(said, f"tensor {LAYER}{name}.weight is not equal to {partner}", "Leave them out with --mtp drop")
    export(ranks, 2, *flags(source, output, "--mtp", "drop"))
    kept = {name: tensor for name, tensor in tensors(source).items() if not name.startswith(LAYER)}
    assert_same(tensors(output), kept)


def test_ranks_compare_every_strip_between_them(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rows in strips of 7: each difference is seen by one rank of three, whose number it decides."""
    monkeypatch.setattr(strips.strips_of, "__defaults__", (1, 7 * 64))
    pairs = shared_tensors(read_json(tied / "config.json"))
    for row in (0, 6, 7, 300, 499):
        source = tmp_path / f"{row}"
        shutil.copytree(tied, source)
        rewritten(lambda held, row=row: held[HEAD][row, 0].add_(1))(source)
        with SourceWeights(source) as weights:
            found = [weights.differing(pairs, rank, 3) for rank in range(3)]
        assert found == [[HEAD] if rank == row // 7 % 3 else [] for rank in range(3)]


def test_a_head_that_rounds_to_the_embedding_is_equal(tied: Path, tmp_path: Path) -> None:
    """Both are written in bfloat16."""
    source = tmp_path / "model"
    shutil.copytree(tied, source)
    wide = {HEAD: tensors(tied)[HEAD].float() * (1 + 2**-12)}
    rewritten(lambda held: held.update(wide))(source)
    config = read_json(source / "config.json")
    with SourceWeights(source) as weights:
        assert weights.differing(shared_tensors(config)) == []


def named(change: Callable[[dict], object], folder: Path) -> Path:
    """An index of the one file of a folder, changed."""
    index = {"weight_map": dict.fromkeys(tensors(folder), "model.safetensors")}
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_a_tensor_that_the_index_does_not_name_is_refused(source: Path) -> None:
    held: dict[str, Tensor] = tensors(source) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({name: tensor.clone() for name, tensor in held.items()}, source / "model.safetensors")
    named(lambda places: places.pop("model.layers.0.self_attn.rotary_emb.inv_freq"), source)
    SourceWeights(source)
    named(lambda places: places.pop("model.norm.weight"), source)
    with pytest.raises(ExportError, match=r"model\.norm\.weight is here, and the index does not say so"):
        SourceWeights(source)
