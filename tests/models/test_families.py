"""Architectures that are tables alone: the source's bytes come back, on every topology, from a live model or its checkpoint.

The widths are chosen so that shards are not whole tiles: a half of o_proj's 128 inputs cuts a group of 128.
"""

from pathlib import Path

import pytest
import torch

from megatron_export import calibrate, export_hf_checkpoint
from megatron_export.calibration import statistics
from megatron_export.models import shape_of
from megatron_export.verify import emulation
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import export
from ..support.live import batches, loaded
from ..support.models import ARCHITECTURES, assert_same, auto_model, contents, make_model, read_json, tensors
from ..support.ranks import Ranks, living
from ..support.saving import reading, save, without_weights

pytestmark = pytest.mark.whole

WIDE = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
_LATENT = {"moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128}
WIDTH = {
    "qwen3_vl_moe": {
        "moe_intermediate_size": 256
    },  # no expert is square, which transformers could not tell from a turned one
    **dict.fromkeys(("gemma3", "gemma3_vision"), {"layer_types": ["sliding_attention", "full_attention"]}),
    "kimi_k25": _LATENT,
    "deepseek_v32": _LATENT,
    "glm_moe_dsa": _LATENT | {"indexer_types": ["full", "shared"]},
}
DENSE = {"tp2": {"tp": 2}, "pp2": {"pp": 2}}
EXPERTS = DENSE | {"ep2": {"ep": 2}}
FAMILIES: dict[str, dict[str, dict]] = {  # name -> topologies of two ranks
    "mistral": DENSE,
    "mistral3": DENSE,
    "qwen3_vl": DENSE,
    "qwen3_vl_moe": EXPERTS,
    "gemma3": DENSE,
    "gemma3_vision": {"tp2": {"tp": 2}},
    "minimax_m2": EXPERTS,
    "kimi_k25": {"ep2": {"ep": 2}},
    "deepseek_v32": EXPERTS,
    "glm_moe_dsa": {"ep2": {"ep": 2}},
}
FORMS: dict[str, dict] = {
    "bf16": {},
    "fp8": {"kv_cache": "fp8"},
    "fp8_pb": {},
    "nvfp4_awq": {"kv_cache": "fp8"},
    "int4_awq": {},
    "mixed": {"recipe": "nvfp4_mlp_fp8_attention", "format": None},
}
ENGINES = ("vLLM", "SGLang", "TensorRT-LLM")
IDS = torch.arange(48).view(2, 24) * 7 % 500


def exports(source: Path, out: Path, sizes: dict, saved: bool = False) -> None:
    """In a rank: every form, with the calibration file beside `out`, which one rank alone writes; and Megatron's own checkpoint."""
    config, file = read_json(source / "config.json"), out.parent / "calibration.safetensors"
    with loaded(source, **sizes) as (model, _):
        if not file.exists():
            found = calibrate(model, batches(source), format=("nvfp4_awq", "int4_awq"))
            statistics.save(found, file, config)
        measured = statistics.load(file, config)
        for form, options in FORMS.items():
            given = {"format": form, "calibration": None if form == "bf16" else measured} | options
            given = {name: value for name, value in given.items() if value is not None}
            if shape_of(config).kv_lora:
                given.pop("kv_cache", None)
            export_hf_checkpoint(model, out / form, hf_model=source, **given)
        if saved:
            save(model, out.parent / "saved", config)


@pytest.fixture(scope="module")
def families(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> its source, and the folder of what one rank exports."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        source = make_model(folder, name, **WIDE, **WIDTH.get(name, {}))
        living(pool).call(1, exports, source, folder / "alone", {})
        found[name] = (source, folder / "alone")
    return found


@pytest.mark.parametrize(
    ("name", "topology"), [(name, topology) for name, some in FAMILIES.items() for topology in some]
)
def test_every_topology_writes_the_files_of_one_rank(
    name: str, topology: str, families: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """And so does Megatron's checkpoint of that topology, without a model."""
    source, alone = families[name]
    (tmp_path / "calibration.safetensors").write_bytes((alone.parent / "calibration.safetensors").read_bytes())
    ranks.call(2, exports, source, tmp_path / "out", FAMILIES[name][topology], True)
    for form in FORMS:
        assert_same(tensors(tmp_path / "out" / form), tensors(alone / form))
        assert contents(tmp_path / "out" / form) == contents(alone / form)
    if "vision_config" not in ARCHITECTURES[name]:  # whose copied part needs the files
        without_weights(source, tmp_path / "hf")
    else:
        (tmp_path / "hf").symlink_to(source)
    cache = () if shape_of(read_json(source / "config.json")).kv_lora else ("--kv-cache", "fp8")
    said = export(ranks, 2, *reading(tmp_path, "nvfp4_awq"), *cache, "--output", tmp_path / "again")
    assert "load " not in said  # no model was built
    assert_same(tensors(tmp_path / "again"), tensors(alone / "nvfp4_awq"))


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_gives_back_every_tensor_of_the_source_bit_for_bit(name: str, families: dict) -> None:
    source, alone = families[name]
    assert_same(tensors(alone / "bf16"), tensors(source))


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_format_is_sound_and_computes(name: str, families: dict) -> None:
    source, alone = families[name]
    expected = auto_model(name).from_pretrained(source, dtype=torch.bfloat16)(IDS).logits.float()
    for form in FORMS:
        assert inspected(alone / form, source, Wanted()).problems == []
        found = emulation.load(alone / form)(IDS).logits.float()
        assert (found - expected).norm() <= (0.02 if form == "bf16" else 0.8) * expected.norm()
