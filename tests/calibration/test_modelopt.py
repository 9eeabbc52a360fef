"""Models that nvidia-modelopt quantized, against what ModelOpt itself exports. `pytest -m modelopt`, where it is installed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..export.test_topologies import export
from ..support import modelopt as peer
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks
from ..support.saving import reading, without_weights

pytestmark = pytest.mark.modelopt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that groups of 128 divide, on two ranks too."""
    return make_model(tmp_path_factory.mktemp("models"), "llama31", hidden_size=256, intermediate_size=512,
                      num_hidden_layers=2)  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("name", "cache", "finish"),
    [
        ("FP8_DEFAULT_CFG", None, peer.keep),
        ("FP8_DEFAULT_CFG", None, peer.train),
        ("FP8_DEFAULT_CFG", "FP8_KV_CFG", peer.keep),
        ("NVFP4_DEFAULT_CFG", None, peer.train),
        ("NVFP4_DEFAULT_CFG", "NVFP4_KV_CFG", peer.keep),
        ("NVFP4_DEFAULT_CFG", None, peer.smooth),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", None, peer.keep),
        ("INT4_AWQ_CFG", None, peer.keep),
        ("W4A8_AWQ_BETA_CFG", None, peer.keep),
    ],
)
def test_every_tensor_equals_modelopts_hf_export_with_the_same_quantizers(
    name: str, cache: str | None, finish: Callable, tp: int, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    config = peer.recipe(name, cache)
    asked = {"fp8_pb_spelling": "modelopt"} if "2D" in name else {}
    found = ranks.call(tp, peer.export_ours, source, tmp_path / "ours", tp, config, finish, asked)
    states, shards = zip(*found, strict=True)
    peer.export_hf_route(source, tmp_path / "theirs", config, list(states), list(shards))
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert_same(ours, {key: tensor.view(ours[key].shape) for key, tensor in theirs.items()})
    said, wanted = (read_json(tmp_path / made / "hf_quant_config.json")["quantization"] for made in ("ours", "theirs"))
    assert said["quant_algo"].lower() == wanted["quant_algo"].lower()
    assert said.get("kv_cache_quant_algo") == wanted.get("kv_cache_quant_algo")


@pytest.mark.parametrize(
    ("name", "cache", "finish"),
    [
        ("FP8_DEFAULT_CFG", "FP8_KV_CFG", peer.train),
        ("NVFP4_DEFAULT_CFG", "NVFP4_KV_CFG", peer.train),
        ("NVFP4_DEFAULT_CFG", None, peer.smooth),
        ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", None, peer.keep),
        ("INT4_AWQ_CFG", None, peer.keep),
        ("W4A8_AWQ_BETA_CFG", None, peer.keep),
    ],
)
def test_a_checkpoint_of_a_quantized_model_exports_the_bytes_of_the_live_one(
    name: str, cache: str | None, finish: Callable, source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    asked = {"fp8_pb_spelling": "modelopt"} if "2D" in name else {}
    ranks.call(2, peer.export_and_save, source, tmp_path, 2, peer.recipe(name, cache), finish, asked)
    without_weights(source, tmp_path / "hf")
    spelling = ("--fp8-pb-spelling", "modelopt") if "2D" in name else ()
    for tp in (1, 2):
        said = export(ranks, tp, *reading(tmp_path), *spelling, "--tp", tp, "--output", tmp_path / f"out-{tp}")
        assert_same(tensors(tmp_path / f"out-{tp}"), tensors(tmp_path / "live"))
        assert "load " not in said  # no model was built
        configs = [read_json(tmp_path / made / "hf_quant_config.json") for made in (f"out-{tp}", "live")]
        assert configs[0]["quantization"] == configs[1]["quantization"]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_checkpoint_with_quantized_experts_exports_the_bytes_of_the_live_model(
    name: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """ModelOpt gives each expert keys of its own, and its gate and up too."""
    ranks.call(
        2, peer.export_and_save, models[name], tmp_path, 1, peer.recipe("FP8_DEFAULT_CFG", None), peer.keep, {}, 2
    )
    without_weights(models[name], tmp_path / "hf")
    for sizes in (("--tp", 2), ("--ep", 2)):
        out = tmp_path / "-".join(map(str, sizes))
        export(ranks, 2, *reading(tmp_path), *sizes, "--output", out)
        assert_same(tensors(out), tensors(tmp_path / "live"))


def test_a_checkpoint_with_adapters_is_merged_to_the_bytes_of_the_merged_live_model(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.call(2, peer.adapt_and_save, source, tmp_path, 2)
    without_weights(source, tmp_path / "hf")
    for tp in (1, 2):
        flags = (*reading(tmp_path, "bf16"), "--merge-lora", "--tp", tp)
        export(ranks, tp, *flags, "--output", tmp_path / f"out-{tp}")
        assert_same(tensors(tmp_path / f"out-{tp}"), tensors(tmp_path / "live"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert (tensors(tmp_path / "live")[name] - tensors(source)[name]).abs().max() > 0.01


def test_modelopts_megatron_export_equals_ours_on_one_rank_and_loses_half_of_the_model_on_two(
    source: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """It keeps rows that pad the vocabulary, and input scales are vectors of one; on two ranks it reports success."""
    config, found = peer.recipe("FP8_DEFAULT_CFG", None), {}
    for tp in (1, 2):
        ranks.call(tp, peer.export_megatron_route, source, tmp_path / f"theirs-{tp}", tp, config)
        ranks.call(tp, peer.export_ours, source, tmp_path / f"ours-{tp}", tp, config, peer.keep, {})
        found[tp] = tensors(tmp_path / f"theirs-{tp}")
    ours, on_two = tensors(tmp_path / "ours-1"), tensors(tmp_path / "ours-2")
    weights = [key for key in ours if not key.endswith("input_scale")]  # ModelOpt measured the inputs at either TP
    assert_same({key: ours[key] for key in weights}, {key: on_two[key] for key in weights})
    cut = {
        key: tensor[:500] if key in ("lm_head.weight", "model.embed_tokens.weight") else tensor
        for key, tensor in found[1].items()
    }
    assert_same(ours, {key: tensor.view(ours[key].shape) for key, tensor in cut.items()})
    assert found[2].keys() == ours.keys()
    assert found[2]["model.layers.0.mlp.up_proj.weight"].shape == (0, 256)  # here [512, 256]
    assert found[2]["model.layers.0.self_attn.q_proj.weight"].shape == (128, 256)  # here [256, 256]
    assert found[2]["model.layers.0.mlp.down_proj.weight"].shape == (256, 256)  # here [256, 512]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_experts_and_latent_attention_are_the_same_at_any_topology(
    name: str, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """But for input scales at TP 2, which ModelOpt measured there. Latent attention is quantized, as it was by ModelOpt."""
    config, found = peer.recipe("FP8_DEFAULT_CFG", None), {}
    for tp, ep in ((1, 1), (1, 2), (2, 1)):
        out = tmp_path / f"{tp}-{ep}"
        ranks.call(tp * ep, peer.export_ours, models[name], out, tp, config, peer.keep, {}, ep)
        found[tp, ep] = tensors(out)
    assert_same(found[1, 1], found[1, 2])
    weights = [key for key in found[1, 1] if not key.endswith("input_scale")]
    assert_same({key: found[1, 1][key] for key in weights}, {key: found[2, 1][key] for key in weights})
    assert found[2, 1].keys() == found[1, 1].keys()
    assert all(f"{key}_scale" in found[1, 1] for key in weights if key.endswith("_proj.weight"))
