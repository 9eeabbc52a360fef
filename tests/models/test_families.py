"""Architectures that are tables alone: the source's bytes come back, on every topology, from a live model or its checkpoint.

The widths are chosen so that shards are not whole tiles: a half of o_proj's 128 inputs cuts a group of 128.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_export import ExportError, calibrate, export_hf_checkpoint
from megatron_export.calibration import statistics
from megatron_export.formats import Options
from megatron_export.models import check_computed, settings_of, shape_of
from megatron_export.planning.quant_config import config_json
from megatron_export.planning.rank_placement import size_problems
from megatron_export.verify import emulation
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import export
from ..support.live import batches, loaded
from ..support.models import ARCHITECTURES, add_mtp, assert_same, auto_model, contents, make_model, read_json, tensors
from ..support.plans import plan_of
from ..support.quantized_sources import int4_kimi
from ..support.ranks import Ranks, living
from ..support.refusals import assert_says, refused
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
    "phi3": DENSE,
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
AWQ = ("nvfp4_awq", "int4_awq")
IDS = torch.arange(48).view(2, 24) * 7 % 500


def exports(source: Path, out: Path, sizes: dict, saved: bool = False) -> None:
    """In a rank: every form, with the calibration file beside `out`, which one rank alone writes; and Megatron's own checkpoint."""
    config, file = read_json(source / "config.json"), out.parent / "calibration.safetensors"
    with loaded(source, **sizes) as (model, _):
        if not file.exists():
            found = calibrate(model, batches(source), format=AWQ)
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
    ("name", "topology"),
    [  # stages do not differ from one family to another
        pytest.param(name, topology, marks=pytest.mark.slow if topology == "pp2" and name != "mistral" else ())
        for name, some in FAMILIES.items()
        for topology in some
    ],
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


def test_kimis_packed_experts_are_read_and_what_was_said_of_them_is_left_out(ranks: Ranks, tmp_path: Path) -> None:
    source, expected = int4_kimi(tmp_path)
    export(ranks, 2, "--hf-model", source, "--ep", 2, "--format", "bf16", "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected)
    config = read_json(source / "config.json")
    del config["text_config"]["quantization_config"]
    assert read_json(tmp_path / "out" / "config.json") == config | {
        "text_config": config["text_config"]
        | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        | {"architectures": ["DeepseekV3ForCausalLM"]}  # which SGLang asks for
    }


@torch.no_grad()
def test_emulation_multiplies_out_kimis_packed_experts(tmp_path: Path) -> None:
    source, expected = int4_kimi(tmp_path)
    packed = emulation.load(source)(IDS).logits
    save_file({name: tensor.clone() for name, tensor in expected.items()}, source / "model.safetensors")
    config = read_json(source / "config.json")
    del config["text_config"]["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    assert torch.equal(packed, emulation.load(source)(IDS).logits)


def test_a_predicting_layer_has_an_indexer_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, "glm_moe_dsa")
    add_mtp(source)
    export(ranks, 2, "--hf-model", source, "--pp", 2, "--format", "bf16", "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), tensors(source))
    assert "model.layers.4.self_attn.indexer.wk.weight" in tensors(source)


def test_float32_of_an_indexer_comes_back_in_float32(ranks: Ranks, tmp_path: Path) -> None:
    """Its numbers were those of bfloat16, which is what Megatron's model has."""
    source = make_model(tmp_path, "deepseek_v32")
    held = tensors(source)
    wide = [name for name in held if name.endswith((".k_norm.weight", ".k_norm.bias", ".weights_proj.weight"))]
    save_file(held | {name: held[name].float() for name in wide}, source / "model.safetensors", {"format": "pt"})
    export(ranks, 2, "--hf-model", source, "--tp", 2, "--format", "fp8_pb", "--output", tmp_path / "out")
    assert {tensors(tmp_path / "out")[name].dtype for name in wide} == {torch.float32}
    assert len(wide) == 3 * 4
    assert inspected(tmp_path / "out", source, Wanted()).problems == []


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("mistral3", "vision_tower.", "no tensor vision_tower.*, which is copied from the original model"),
        ("qwen3_vl", "model.visual.", "no tensor model.visual.*, which is copied from the original model"),
        ("kimi_k25", "mm_projector.", "no tensor mm_projector.*, which is copied from the original model"),
    ],
)
def test_a_missing_vision_part_is_refused(name: str, lost: str, message: str, ranks: Ranks, tmp_path: Path) -> None:
    source = make_model(tmp_path, name)
    held = {one: tensor for one, tensor in tensors(source).items() if not one.startswith(lost)}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    said = refused(ranks, tmp_path, "--hf-model", source, "--format", "bf16", "--output", tmp_path / "out")
    assert_says(said, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral3", {"model_type": "ministral"}, "model_type = 'ministral' is not supported; only 'mistral' is"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        (
            "gemma3",
            {"layer_types": ["full"] * 4},
            "layer_types is ['full', 'full', 'full', 'full'], not 'full_attention'",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head' is not supported"),
        ("qwen3_vl_moe", {"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
    ],
)
def test_a_value_that_the_tables_are_wrong_for_is_refused(name: str, changes: dict, message: str, models: dict) -> None:
    config = read_json(models[name] / "config.json")
    inner = "text_config" in config
    config |= {"text_config": config["text_config"] | changes} if inner else changes
    with pytest.raises(ExportError, match=re.escape(message)):
        settings_of(config)


def test_norms_of_all_heads_are_on_no_more_ranks_than_heads_of_keys(models: dict) -> None:
    config = read_json(models["minimax_m2"] / "config.json") | {"num_key_value_heads": 2}
    assert size_problems(config, tp=4, etp=1, ep=1) == [
        "num_key_value_heads 2 does not divide by --tp 4. Give a --tp that divides it"
    ]


def test_samples_beyond_what_an_indexer_chooses_are_refused(models: dict) -> None:
    config = read_json(models["deepseek_v32"] / "config.json")
    check_computed(config, 64)
    with pytest.raises(ExportError, match="samples of 65 tokens: beyond index_topk 64 attention is sparse"):
        check_computed(config, 65)


def test_samples_beyond_which_ministral_scales_queries_are_refused(models: dict) -> None:
    config = read_json(models["ministral3"] / "config.json")
    check_computed(config, 48)
    with pytest.raises(ExportError, match="samples of 49 tokens: beyond 48 this model scales its queries"):
        check_computed(config, 49)


def test_groups_of_phis_joined_linears_are_not_clipped_one_by_one(models: dict) -> None:
    config = read_json(models["phi3"] / "config.json") | {"hidden_size": 128, "intermediate_size": 256}
    with pytest.raises(ExportError, match="--awq-clip: the rows of decoder.layers.0.self_attention.linear_qkv.weight"):
        plan_of(config, format="int4_awq", options=Options(awq_clip=True))
    plan_of(config, format="int4_awq")


def test_a_config_that_transformers_saved_says_what_engines_ask_of_minimax(models: dict) -> None:
    """vLLM 0.32 refuses the bias of a router where config.json does not say that there is one."""
    config = {
        key: value for key, value in read_json(models["minimax_m2"] / "config.json").items() if key != "scoring_func"
    }
    written = config_json(plan_of(config, format="bf16"))
    assert {key: written[key] for key in ("use_routing_bias", "scoring_func", "use_qk_norm")} == {
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
    }
