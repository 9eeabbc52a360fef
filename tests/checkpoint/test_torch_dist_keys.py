"""Keys that layer specs give tensors, which cannot be built here: those of a saved checkpoint renamed. The same parameters."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_export.checkpoint.torch_dist import MegatronCheckpoint
from megatron_export.checkpoint.torch_dist_iteration import find_iteration
from megatron_export.common.piece import Axis
from megatron_export.models import parameters_of

from ..support.models import add_mtp, assert_same, make_model, read_json
from ..support.ranks import Ranks, living
from ..support.saving import PLACE, changing, renamed, saved_model

pytestmark = pytest.mark.whole

NAMES = ("qwen3", "mixtral", "deepseek_v3")


@pytest.fixture(scope="module")
def saved(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Model -> its HF folder, and its checkpoint of two tensor-parallel ranks."""
    folders = {}
    for name in NAMES:
        source = make_model(tmp_path_factory.mktemp("hf"), name)
        if name == "deepseek_v3":
            add_mtp(source)
        folder = tmp_path_factory.mktemp("saved")
        living(pool).call(2, saved_model, source, folder, {"tp": 2})
        folders[name] = source, folder
    return folders


def parameters(source: Path, folder: Path) -> dict[str, Tensor]:
    """Every parameter of a checkpoint, whole."""
    config = read_json(source / "config.json")
    checkpoint = MegatronCheckpoint(find_iteration(folder, None), config)
    return {n: checkpoint.shard(one, one.shape, 0, 1) for n, one in parameters_of(config).items()}


def hybrid(key: str) -> str:
    """As `HybridModel` has them: what attends and what follows it are layers of their own."""
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", key)
    if found is None:
        return key.replace("decoder.final_layernorm", "decoder.final_norm")
    return f"decoder.layers.{2 * int(found[1]) + found[2].startswith('mlp.')}.{found[2]}"


DIALECTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "norms apart": (
        "qwen3",
        changing(
            (r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight"),
            (r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ),
    ),
    "experts of transformer engine": ("mixtral", changing((r"mlp\.linear_fc1\.layer_norm_", "pre_mlp_layernorm."))),
    "hybrid": ("mixtral", hybrid),
    "latent attention of transformer engine": (
        "deepseek_v3",
        changing(
            (r"self_attention\.(q|kv)_layernorm\.weight", r"self_attention.linear_\1_up_proj.layer_norm_weight"),
            (r"layers\.0\.pre_mlp_layernorm\.weight", "layers.0.mlp.linear_fc1.layer_norm_weight"),
        ),
    ),
    "predicting layers of later versions": ("deepseek_v3", changing((r"transformer_layer", "mtp_model_layer"))),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_has_the_same_parameters(dialect: str, saved: dict, tmp_path: Path) -> None:
    name, rename = DIALECTS[dialect]
    source, folder = saved[name]
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    renamed(other / PLACE, rename)
    old, new = ((place / PLACE / ".metadata").read_bytes() for place in (folder, other))
    assert old != new
    assert_same(parameters(source, other), parameters(source, folder))


def test_a_hybrid_model_says_how_many_halves_of_layers_it_has(saved: dict, ranks: Ranks, tmp_path: Path) -> None:
    source, folder = saved["mixtral"]
    args = {"num_layers": 8, "moe_layer_freq": 1, "hybrid_override_pattern": "*E*E*E*E"}
    ranks.call(1, saved_model, source, tmp_path, {}, args=args)
    renamed(tmp_path / PLACE, hybrid)
    assert_same(parameters(source, tmp_path), parameters(source, folder))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_shards_of_any_number_of_ranks_make_the_whole(count: int, saved: dict) -> None:
    """Of 8, more than there are query groups, and a vocabulary that is padded further than it was saved."""
    source, folder = saved["qwen3"]
    checkpoint = MegatronCheckpoint(find_iteration(folder, 7), read_json(source / "config.json"))
    held = checkpoint.held({"tp": count, "etp": count, "pp": 1, "ep": 1, "vpp": 1, "world": count})
    for name, whole in parameters(source, folder).items():
        one, layout = checkpoint.sources[name], checkpoint.sources[name].layout
        ranks = range(count if one.cut else 1)
        shards = [checkpoint.shard(one, held[name].shape, n, count) for n in ranks]
        assert {tuple(shard.shape) for shard in shards} == {held[name].shape}
        if one.cut is Axis.IN or not layout.splits(shards[0].shape[0]):
            assert torch.equal(torch.cat(shards, dim=int(one.cut is Axis.IN)), whole)
            continue
        parts = [layout.split(shard, n, len(ranks)) for n, shard in enumerate(shards)]
        for part, rows in layout.split(whole, 0, 1).items():
            assert torch.equal(torch.cat([found[part] for found in parts]), rows)
