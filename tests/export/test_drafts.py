"""EAGLE-3 drafts beside their base: the same bytes on every topology and from a checkpoint, ModelOpt's where those are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export import export_hf_checkpoint
from megatron_export.formats import chosen
from megatron_export.models import parameters_of
from megatron_export.models.eagle3 import eagle3_config
from megatron_export.planning.engine_check import of_folder, verdicts

from ..support.eagle import FP8, NVFP4, drafted, quantize
from ..support.live import loaded, refusal
from ..support.models import GOLDEN, assert_same, read_json, same, tensors
from ..support.ranks import Ranks

BASE = GOLDEN / "models" / "llama-bf16"
DRAFTS = GOLDEN / "drafts"
KINDS = {"bf16": None, "fp8": FP8, "nvfp4": NVFP4}
PLACES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def amax(name: str) -> Tensor:
    """A number for each quantizer, on every rank the same."""
    return torch.tensor(1.0 + sum(name.encode()) % 89 / 64, dtype=torch.bfloat16)


def exported(out: Path, tp: int, pp: int, form: str, asked: dict, **how: Any) -> str:
    """In a rank: export a base in bfloat16, with a draft that has quantizers of a format; what is said if that is refused."""
    with drafted(BASE, tp, pp, **how) as (model, _):
        if KINDS[form] and hasattr(model, "eagle_module"):
            quantize(model.eagle_module, KINDS[form], amax, also=("fc", "eagle_output_layer"))
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, **{"format": "bf16"} | asked)


def without_draft(out: Path) -> None:
    """In a rank: export the base alone."""
    with loaded(BASE) as (model, _):
        export_hf_checkpoint(model, out, hf_model=BASE, format="bf16")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", KINDS)
def test_every_topology_writes_the_same_draft(form: str, layers: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(1, without_draft, tmp_path / "alone")
    for tp, pp in PLACES:
        out = tmp_path / f"tp{tp}pp{pp}"
        assert set(ranks.call(tp * pp, exported, out, tp, pp, form, {}, layers=layers)) == {""}
        draft, first = tmp_path / f"{out.name}-draft", tmp_path / "tp1pp1-draft"
        assert_same(tensors(draft), tensors(first))
        assert {path.name for path in draft.iterdir()} == {path.name for path in first.iterdir()}
        assert read_json(draft / "config.json") == read_json(first / "config.json")
        assert_same(tensors(out), tensors(tmp_path / "alone"))
        assert read_json(out / "config.json") == read_json(tmp_path / "alone" / "config.json")
    held = tensors(first)
    assert held["fc.weight"].dtype == held["lm_head.weight"].dtype == torch.bfloat16
    assert held["d2t"].dtype == torch.int64
    own = chosen(form)
    suffixes = {name.removeprefix("layers.0.mlp.up_proj.") for name in held if ".0.mlp.up_proj." in name}
    assert suffixes == ({"weight", *own.stored} if form != "bf16" else {"weight"})


def test_a_quantized_draft_is_described_for_every_engine(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(1, exported, tmp_path / "out", 1, 1, "fp8", {})
    flat = read_json(tmp_path / "out-draft" / "config.json")["quantization_config"]
    nested = read_json(tmp_path / "out-draft" / "hf_quant_config.json")
    assert flat["quant_method"] == "modelopt"
    assert flat["quant_algo"] == nested["quantization"]["quant_algo"] == "FP8"
    assert flat["ignore"] == nested["quantization"]["exclude_modules"] == ["*fc", "lm_head"]
    assert nested["quantization"]["kv_cache_quant_algo"] is None


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", KINDS)
def test_every_engine_loads_the_draft_beside_its_base(form: str, layers: int, ranks: Ranks, tmp_path: Path) -> None:
    how = {"layers": layers, "eagle_aux_hidden_state_layer_ids": [0]}  # SGLang hands out no output of the last layer
    asked = {"target": "vllm,sglang,tensorrt_llm"}
    assert ranks.call(1, exported, tmp_path / "out", 1, 1, form, asked, **how) == [""]
    found = verdicts(of_folder(tmp_path / "out-draft"), base=of_folder(tmp_path / "out"))
    assert {name: verdict.loads for name, verdict in found.items()} == dict.fromkeys(found, True), found


def test_later_layers_have_their_norm_under_both_names(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(1, exported, tmp_path / "out", 1, 1, "bf16", {}, layers=3)
    held = tensors(tmp_path / "out-draft")
    for layer in (1, 2):
        assert torch.equal(held[f"layers.{layer}.input_layernorm.weight"], held[f"layers.{layer}.hidden_norm.weight"])
    assert not torch.equal(held["layers.0.input_layernorm.weight"], held["layers.0.hidden_norm.weight"])


# Against ModelOpt's own exports.


def configs(ours: Path, theirs: str) -> list[dict]:
    return [read_json(folder / "config.json") for folder in (ours, DRAFTS / theirs)]


def golden_draft(name: str) -> dict[str, Tensor]:
    held = load_file(DRAFTS / name / "model.safetensors")
    return {key.replace("midlayer.", "layers.0."): tensor for key, tensor in held.items()}


def of_golden(out: Path) -> str:
    """In a rank: the Megatron draft that ModelOpt quantized and exported, exported by us from the same live state."""
    live = load_file(DRAFTS / "draft-llama-eagle3d-FP8-mcore" / "rank-0.safetensors")
    held = {name.removeprefix("eagle_module."): tensor for name, tensor in live.items()}
    weights = {
        name: tensor for name, tensor in held.items() if "_quantizer." not in name and "_extra_state" not in name
    }
    with drafted(BASE, weights=weights) as (model, _):
        quantize(model.eagle_module, FP8, lambda name: held[f"{name}._amax"])
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, format="bf16")


def test_a_megatron_draft_has_the_bytes_of_modelopts_export(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, of_golden, tmp_path / "out") == [""]
    ours, theirs = tensors(tmp_path / "out-draft"), golden_draft("draft-llama-eagle3d-FP8-mcore")
    assert torch.equal(
        ours.pop("d2t"), load_file(DRAFTS / "draft-llama-eagle3d-FP8-mcore" / "rank-0.safetensors")["eagle_module.d2t"]
    )
    assert_same(ours, {name: tensor.view(ours[name].shape) for name, tensor in theirs.items()})
    said, wrong = (
        read_json(folder / "config.json")
        for folder in (tmp_path / "out-draft", DRAFTS / "draft-llama-eagle3d-FP8-mcore")
    )
    assert said["rms_norm_eps"] == 1e-5 != wrong["rms_norm_eps"]  # theirs is of another model
    assert "quantization_config" in said and "quantization_config" not in wrong
    assert said["eagle_config"] == wrong["eagle_config"]
    assert said["eagle_aux_hidden_state_layer_ids"] == [1, 2]


def of_two_layers(out: Path) -> str:
    """In a rank: the transformers draft of two layers that ModelOpt quantized, as a Megatron model would hold it."""
    live = load_file(DRAFTS / "draft-llama-eagle3deep-FP8457" / "live.safetensors")
    held = {name.removeprefix("eagle_module."): one for name, one in live.items() if name.startswith("eagle_module.")}
    config = eagle3_config(read_json(BASE / "config.json"), SETTINGS | {"num_hidden_layers": 2})
    weights, names = {}, {}
    for source in parameters_of(config).values():
        parts = {part: held[name] for part, name in source.names().items() if name in held}
        name = source.canonical.replace("output_layer", "eagle_output_layer")
        one = next(iter(parts))
        weights[name] = source.layout.join(
            parts | dict.fromkeys(source.layout.parts, parts[one]) | parts, source.shape[0]
        )
        names[name.removesuffix(".weight")] = [hf.removesuffix(".weight") for hf in source.names().values()]

    def joint(name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        return torch.stack([held[f"{hf}.{part}._amax"] for hf in names[module]]).amax()

    with drafted(BASE, weights=weights, layers=2) as (model, _):
        quantize(model.eagle_module, FP8, joint, also=("fc",))
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, format="bf16")


SETTINGS = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "draft_vocab_size": 256,
    "eagle_aux_hidden_state_layer_ids": [0, 1],
}


def test_a_draft_differs_from_modelopts_where_engines_need_it_to(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, of_two_layers, tmp_path / "out") == [""]
    ours, theirs = tensors(tmp_path / "out-draft"), golden_draft("draft-llama-eagle3deep-FP8457")
    # SGLang reads fc as plain numbers; and later layers' norm is written under the name that SGLang and TensorRT-LLM read, too.
    assert {name for name in theirs if name not in ours} == {"fc.weight_scale", "fc.input_scale"}
    assert {name for name in ours if name not in theirs} == {"layers.1.hidden_norm.weight"}
    assert ours["fc.weight"].dtype == torch.bfloat16 != theirs["fc.weight"].dtype
    # Engines give q, k and v one scale, and gate and up: so they have one in the file. Of each, one part had it already.
    changed = {name for name in theirs if name in ours and not same(ours[name], theirs[name])} - {"fc.weight"}
    for fused in ("self_attn.{}_proj", "mlp.{}_proj"):
        parts = ("q", "k", "v") if "attn" in fused else ("gate", "up")
        for layer in (0, 1):
            names = [f"layers.{layer}.{fused.format(part)}" for part in parts]
            assert len({float(ours[f"{name}.weight_scale"]) for name in names}) == 1
            assert float(ours[f"{names[0]}.weight_scale"]) == max(
                float(theirs[f"{name}.weight_scale"]) for name in names
            )
            assert sum(f"{name}.weight_scale" not in changed for name in names) == 1
            changed -= {f"{name}.{leaf}" for name in names for leaf in ("weight", "weight_scale")}
    assert changed == set()
    said, wrong = (
        read_json(folder / "config.json")
        for folder in (tmp_path / "out-draft", DRAFTS / "draft-llama-eagle3deep-FP8457")
    )
    assert said["rope_scaling"] is None
    assert wrong["rope_scaling"]["rope_type"] == "yarn"  # with which it was not trained
    assert (
        "eagle_module.lm_head" in wrong["quantization_config"]["quantization"]["exclude_modules"]
    )  # is no module of a draft
    alike = (
        "num_hidden_layers",
        "hidden_size",
        "head_dim",
        "vocab_size",
        "draft_vocab_size",
        "architectures",
        "rms_norm_eps",
    )
    assert [said[key] for key in alike] == [wrong[key] for key in alike]
    assert said["eagle_config"] == wrong["eagle_config"]
