"""Transformers models whose tensors are cut over ranks, by FSDP2 or by tensor parallelism: the bytes of the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_export import calibrate, export_hf_checkpoint, iter_hf_tensors
from megatron_export.models.statistic_names import hf_keys

from ..support.live import batches, refusal
from ..support.live_hf import LIVE, loaded, rebuilt
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks
from .test_other import made as other

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
ODD = {"hidden_size": 80, "intermediate_size": 144, "num_hidden_layers": 1, "vocab_size": 333, "num_attention_heads": 5,
       "num_key_value_heads": 5, "head_dim": 16}  # fmt: skip
MODELS = {name: WIDE for name in ("llama31", "qwen3", "qwen3_moe", "mixtral")}
MODELS |= {
    "qwen2": ODD,
    "qwen3": WIDE | {"tie_word_embeddings": False},
    "deepseek_v3": WIDE | {"num_nextn_predict_layers": 0},
}
FORMATS = ("fp8", "nvfp4", "fp8_pb", "mxfp8", "bf16")


def made_up(source: Path) -> dict[str, Tensor]:
    """Statistics as calibration would find, but for their values."""
    keys = [key for key in hf_keys(read_json(source / "config.json")) if key.endswith("amax")]
    return {key: torch.tensor(1.0 + number % 7) for number, key in enumerate(keys)}


def by_fsdp(source: Path, name: str) -> nn.Module:
    """In a rank: its part of a model that FSDP2 cut."""
    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), loaded(source, name)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_tensor_parallelism(source: Path, name: str) -> nn.Module:
    """In a rank: its part of a model that transformers cut by its own plan, as `tp_plan="auto"` does."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model, world = loaded(source, name), dist.get_world_size()
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_plan="auto", tp_size=world))
    return apply_tensor_parallelism(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)), plan)


def by_experts(source: Path, name: str) -> nn.Module:
    """In a rank: a model of which it has some experts of each layer, and all else whole."""
    model, mesh = loaded(source, name), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for leaf, weight in list(module._parameters.items()):
            if leaf in ("gate_up_proj", "down_proj") and weight is not None:
                module._parameters[leaf] = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    return model


def export_all(source: Path, folder: Path, name: str, shard: Callable[[Path, str], nn.Module]) -> dict[str, str]:
    """In a rank: export a model that is cut in every format; returns refusals."""
    dist.init_process_group("gloo")
    try:
        model, statistics = shard(source, name), made_up(source)
        before = {
            key: tensor.to_local().clone() for key, tensor in model.state_dict().items() if hasattr(tensor, "to_local")
        }
        refused = {
            form: refusal(
                export_hf_checkpoint, model, folder / form, format=form, calibration=statistics, writers="all"
            )
            for form in FORMATS
        }
        after = {key: tensor.to_local() for key, tensor in model.state_dict().items() if hasattr(tensor, "to_local")}
        assert len(before) >= 2
        assert_same(before, after)
        return refused
    finally:
        dist.destroy_process_group()


QUICK = ((by_fsdp, "llama31"), (by_fsdp, "qwen2"), (by_tensor_parallelism, "llama31"), (by_experts, "qwen3_moe"))
CASES = [(shard, name) for shard in (by_fsdp, by_tensor_parallelism) for name in MODELS]
CASES += [(by_experts, name) for name in ("qwen3_moe", "mixtral")]


@pytest.mark.parametrize(
    ("shard", "name"), [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.whole]) for case in CASES]
)
def test_a_model_that_is_cut_has_the_bytes_of_the_whole_one(
    shard: Callable, name: str, ranks: Ranks, tmp_path: Path
) -> None:
    source = make_model(tmp_path, name, **MODELS[name])
    refused = ranks.call(2, export_all, source, tmp_path / "cut", name, shard)
    whole, statistics = loaded(source, name), made_up(source)
    for form in FORMATS:
        said = refusal(export_hf_checkpoint, whole, tmp_path / form, format=form, calibration=statistics)
        assert [one[form] for one in refused] == [said, said]
        if not said:
            assert_same(tensors(tmp_path / "cut" / form), tensors(tmp_path / form))
            cut, alone = (read_json(out / "export_manifest.json") for out in (tmp_path / "cut" / form, tmp_path / form))
            assert cut["identity"] == alone["identity"]


def export_quantized(folder: Path, out: Path, asked: dict) -> list[str]:
    """In a rank: cut a model that ModelOpt quantized, and export it; then take all its tensors. Returns their names."""
    dist.init_process_group("gloo")
    try:
        model, mesh = rebuilt(folder), init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        export_hf_checkpoint(model, out, **asked)
        given = {name: tensor.clone() for name, tensor in iter_hf_tensors(model, everywhere=True, **asked)}
        assert_same(given, tensors(out))
        return sorted(given)
    finally:
        dist.destroy_process_group()


CUT = ("llama-INT4_AWQ-hf", "llama-NVFP4_AWQ-hf", "qwen3-FP8_PB_WO-hf", "qwen3-W4A8_AWQ-hf", "deepseekv3-FP8-hf")


@pytest.mark.parametrize("name", CUT)
def test_a_quantized_model_that_is_cut_has_the_bytes_of_the_whole_one(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Also where the amaxes of blocks, and smoothing vectors, are those of whole weights."""
    asked = {"fp8_pb_spelling": "modelopt"} if "FP8_PB" in name else {}
    given = ranks.call(2, export_quantized, LIVE / name, tmp_path / "cut", asked)
    export_hf_checkpoint(rebuilt(LIVE / name), tmp_path / "whole", **asked)
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert given == [sorted(tensors(tmp_path / "whole"))] * 2


def train_on(folder: Path, out: Path) -> str:
    """In a rank: export a cut model whose weights were trained since it was calibrated; what is said."""
    dist.init_process_group("gloo")
    try:
        model = rebuilt(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[-1].mul_(2)  # which the last rank has
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return refusal(export_hf_checkpoint, model, out)
    finally:
        dist.destroy_process_group()


def test_amaxes_of_other_weights_are_found_on_the_rank_that_has_them(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.call(2, train_on, LIVE / "llama-INT4_AWQ-hf", tmp_path / "out"):
        assert "rank 1 failed to read the model's quantizers: decoder.layers.1.mlp.linear_fc2" in said
        assert "its quantizer's amaxes are not those of its weight's blocks" in said


def copy_of_other(out: Path) -> None:
    """In a rank: export a model whose norms are copied, cut by FSDP2."""
    dist.init_process_group("gloo")
    try:
        model = other("gemma2")
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        export_hf_checkpoint(model, out, format="fp8_pb")
    finally:
        dist.destroy_process_group()


def test_what_is_copied_of_a_model_that_is_cut_is_gathered(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(2, copy_of_other, tmp_path / "cut")
    export_hf_checkpoint(other("gemma2"), tmp_path / "whole", format="fp8_pb")
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))


def lacking_a_tokenizer(folder: Path) -> str:
    """In a rank: what is said where the last rank alone does not find the tokenizer of a model that is cut."""
    dist.init_process_group("gloo")
    try:
        model = fully_shard(other("gemma2"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        given = {"tokenizer": folder / "none"} if dist.get_rank() else {}
        return refusal(export_hf_checkpoint, model, folder / "out", format="fp8_pb", **given)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_fails_before_what_is_copied_is_gathered_holds_up_no_other(ranks: Ranks, tmp_path: Path) -> None:
    first, last = ranks.call(2, lacking_a_tokenizer, tmp_path, seconds=60)
    assert first == last
    assert first.startswith("rank 1 failed to read the model's shapes: tokenizer")
    assert list(tmp_path.iterdir()) == []


def export_smoothed(source: Path, folder: Path, name: str, shard: Callable, statistics: dict[str, Tensor]) -> None:
    """In a rank: export a model that is cut in AWQ's formats."""
    dist.init_process_group("gloo")
    try:
        model = shard(source, name)
        for form in ("nvfp4_awq", "int4_awq"):
            export_hf_checkpoint(model, folder / form, format=form, calibration=statistics, awq_clip=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shard", [by_fsdp, by_tensor_parallelism])
def test_smoothing_and_clipping_meet_the_rows_of_each_rank(shard: Callable, ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, "llama31", **WIDE)
    whole = loaded(source)
    statistics = calibrate(whole, batches(source), format=("nvfp4_awq", "int4_awq"), awq_clip=True)
    ranks.call(2, export_smoothed, source, tmp_path / "cut", "llama31", shard, statistics)
    for form in ("nvfp4_awq", "int4_awq"):
        export_hf_checkpoint(whole, tmp_path / form, format=form, calibration=statistics, awq_clip=True)
        assert_same(tensors(tmp_path / "cut" / form), tensors(tmp_path / form))


def on_two_axes(source: Path, out: Path) -> str:
    """In a rank of four: export two replicas of a model that FSDP2 cuts in two; then one that is cut along both axes."""
    dist.init_process_group("gloo")
    try:
        mesh, model = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")), loaded(source)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        export_hf_checkpoint(model, out, format="fp8_pb")
        model = loaded(source)
        linear = model.model.layers[0].mlp.down_proj
        linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0), Shard(1)]))
        return refusal(export_hf_checkpoint, model, out, format="fp8_pb", overwrite=True)
    finally:
        dist.destroy_process_group()


def test_replicas_are_exported_once_and_cuts_along_two_axes_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, "llama31", **WIDE)
    said = ranks.call(4, on_two_axes, source, tmp_path / "cut")
    export_hf_checkpoint(loaded(source), tmp_path / "whole", format="fp8_pb")
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert all("only tensors that are cut along one axis of their mesh are exported" in one for one in said)
