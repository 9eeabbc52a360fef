"""Models with a format for each module, against what ModelOpt 0.47 wrote of the same recipe: NVFP4 in MLPs and experts, FP8 in
attention, the first layer's o_proj in bfloat16.
"""

from pathlib import Path

import pytest

from ..support.models import GOLDEN, read_json, same, tensors
from ..support.ranks import Ranks, living
from . import test_golden_experts as experts
from . import test_golden_models as dense
from .test_topologies import export

pytestmark = pytest.mark.whole

MODELS = GOLDEN / "models"
RECIPE = """
published: nobody
formats:
  - "*": nvfp4
  - "*.self_attn.*": fp8
  - model.layers.0.self_attn.o_proj: bf16
"""
FUSED = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")
TOPOLOGIES = {
    "llama": (1,),
    "qwen3": (2, "--tp", 2),
    "qwen3moe": (4, "--tp", 2, "--ep", 2),
    "deepseekv3": (2, "--ep", 2, "--quantize-mla"),
}


@pytest.fixture(params=TOPOLOGIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def exported(name: str, pool: list[Ranks], tmp_path: Path) -> Path:
    """An export with ModelOpt's statistics, which are the same for every format."""
    (tmp_path / "own.yaml").write_text(RECIPE)
    if name in experts.SOURCES:
        experts.save(dense.modelopt_statistics(name, experts.STATES[name]), name, tmp_path / "c.safetensors")
    else:
        config = read_json(MODELS / f"{name}-bf16" / "config.json")
        dense.save(dense.modelopt_statistics(name), tmp_path / "c.safetensors", config)
    export(living(pool), *TOPOLOGIES[name], "--hf-model", MODELS / f"{name}-bf16", "--recipe", tmp_path / "own.yaml",
        "--load-calibration", tmp_path / "c.safetensors", "--output", tmp_path / "out")  # fmt: skip
    return tmp_path / "out"


def test_every_tensor_and_both_configs_equal_modelopts(name: str, exported: Path) -> None:
    """But for the FP8 of linears that engines fuse, which ModelOpt's HF route scales apart and its Megatron route does not; and for
    the list of what is left out, which its HF route does not write beside quantized_layers, and its Megatron route does.
    """
    ours, theirs = tensors(exported), tensors(MODELS / f"{name}-MIXED")
    fused = {key for key in theirs if key.split(".")[-2] in FUSED and key.endswith((".weight", ".weight_scale"))}
    theirs |= {key: tensor for key, tensor in tensors(MODELS / f"{name}-FP8-mcore").items() if key in fused}
    assert sorted(ours) == sorted(theirs)
    latent = {key for key in fused if "kv_a_proj" in key}  # tests/export/test_golden_experts.py has their numbers
    biases = {key for key in theirs if key.endswith("e_score_correction_bias")}  # float32, as DeepSeek publishes it
    assert [key for key in theirs.keys() - latent - biases if not same(ours[key], theirs[key])] == []
    assert len(theirs.keys() - latent - biases) > 40
    nested, flat = experts.descriptions(exported)
    golden_nested, golden_flat = experts.descriptions(MODELS / f"{name}-MIXED")
    left = nested.pop("exclude_modules")
    assert left == flat.pop("ignore")
    assert {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.o_proj"} <= set(left)
    assert nested == golden_nested
    assert flat == {key: value for key, value in golden_flat.items() if key != "ignore"}
