"""Transformers models that nvidia-modelopt itself quantized, by its export and by ours: `pytest -m modelopt`, where it is there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_export import export_hf_checkpoint

from ..support import modelopt as peer
from ..support.live import batches
from ..support.live_hf import assert_untouched, loaded, state_of, traces_of
from ..support.models import make_model, read_json, same, tensors
from .test_golden import joined

pytestmark = pytest.mark.modelopt

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
EXPERTS = WIDE | {"moe_intermediate_size": 256}
MODELS = {
    "llama31": WIDE,
    "qwen3": WIDE,
    "qwen3_moe": EXPERTS,
    "mixtral": WIDE,
    "deepseek_v3": EXPERTS | {"num_nextn_predict_layers": 0, "q_lora_rank": 64},
}
FP8, NVFP4, KEPT, COMPRESSED = "FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", False, True
QUANTIZED = [(name, form, None, KEPT) for name in MODELS for form in (FP8, NVFP4, "MXFP8_DEFAULT_CFG")]
QUANTIZED += [
    ("llama31", form, None, KEPT) for form in ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")
]
QUANTIZED += [
    ("llama31", NVFP4, "NVFP4_KV_CFG", KEPT),
    ("mixtral", NVFP4, "NVFP4_KV_CFG", KEPT),
    ("qwen3", FP8, "FP8_KV_CFG", KEPT),
]
QUANTIZED += [(name, form, None, COMPRESSED) for name in ("llama31", "qwen3_moe") for form in (FP8, NVFP4)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that groups of 128 divide."""
    return {name: make_model(tmp_path_factory.mktemp(name), name, **more) for name, more in MODELS.items()}


def quantized(source: Path, name: str, form: str, cache: str | None) -> nn.Module:
    """A model as `mtq.quantize` leaves it."""
    import modelopt.torch.quantization as mtq

    model = loaded(source, name, attn_implementation="eager").eval()
    with torch.no_grad():
        mtq.quantize(model, peer.recipe(form, cache), lambda model: [model(ids) for ids in batches(source)])
    return model


@pytest.mark.parametrize(("name", "form", "cache", "compressed"), QUANTIZED)
def test_every_tensor_equals_modelopts_but_for_scales_that_engines_join(
    name: str, form: str, cache: str | None, compressed: bool, wide: dict, tmp_path: Path
) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint as export

    model = quantized(wide[name], name, form, cache)
    if compressed:
        mtq.compress(model)
    state, traces = state_of(model), traces_of(model)
    asked = {"fp8_pb_spelling": "modelopt"} if "2D" in form else {}
    export_hf_checkpoint(model, tmp_path / "ours", **asked)
    assert_untouched(model, state, traces)
    export(model, export_dir=tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert sorted(ours) == sorted(theirs)
    theirs = {key: tensor.view(ours[key].shape) if tensor.numel() == 1 else tensor for key, tensor in theirs.items()}
    differing = {key for key, tensor in ours.items() if not same(tensor, theirs[key])}
    honest = {key for key in ours if compressed and key.endswith("weight_scale") and ours[key].dim() == 0}
    assert differing - honest == joined(state, ours) - honest
    said, wanted = (read_json(tmp_path / made / "hf_quant_config.json")["quantization"] for made in ("ours", "theirs"))
    assert said["quant_algo"].lower() == wanted["quant_algo"].lower()
    assert said.get("kv_cache_quant_algo") == wanted.get("kv_cache_quant_algo")
