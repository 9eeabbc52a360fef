"""Medusa's heads in one folder with their Megatron base: the same bytes on every topology and from a checkpoint."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from megatron_export import export_hf_checkpoint
from megatron_export.engines import verdict_of
from megatron_export.mcore.model import chunks_of
from megatron_export.planning.engine_check import of_folder

from ..support.eagle import FP8, Quantizer, quantize
from ..support.live import refusal
from ..support.live_hf import digest
from ..support.medusa import of_rank, with_heads
from ..support.models import GOLDEN, assert_same, read_json, tensors
from ..support.ranks import Ranks, command
from ..support.saving import save

BASE, QWEN3 = GOLDEN / "models" / "llama-bf16", GOLDEN / "models" / "qwen3-bf16"
DRAFTS = GOLDEN / "drafts"
PLACES = [(1, 1), (2, 1), (1, 2)]


def hang(module: nn.Module, amaxes: dict[str, torch.Tensor]) -> None:
    for part in ("weight_quantizer", "input_quantizer"):
        amax = amaxes.get(part)
        module.add_module(part, Quantizer(amax, **FP8))


def as_modelopt_has_them(chunk: nn.Module, rank: int, tp: int, outputs: bool) -> None:
    """Weights and amaxes of the heads as in ModelOpt's live Megatron model. That has none for output layers; with `outputs`, they
    have those of its transformers model.
    """
    weights = load_file(DRAFTS / "draft-llama-medusa-bf16" / "live.safetensors")
    ours, theirs = (load_file(DRAFTS / f"draft-llama-medusa-FP8{kind}" / "live.safetensors") for kind in ("-mcore", ""))
    for number in range(3):
        head, start = chunk.medusa_heads.get_submodule(str(number)), f"medusa_heads.{number}"
        block = head.medusa_layers[0].linear
        for leaf in ("weight", "bias"):
            block.get_parameter(leaf).data.copy_(weights[f"{start}.0.linear.{leaf}"])
        head.lm_head.weight.data.copy_(of_rank("lm_head.weight", weights[f"{start}.1.weight"], rank, tp))
        both = ("weight_quantizer", "input_quantizer")
        hang(block, {part: ours[f"{start}.medusa_layers.0.linear.{part}._amax"] for part in both})
        hang(head.lm_head, {part: theirs[f"{start}.1.{part}._amax"] for part in both} if outputs else {})


def quantize_all(model: nn.Module | list[nn.Module], tp: int, outputs: bool) -> None:
    for chunk in chunks_of(model):
        heads = chunk._modules.pop("medusa_heads", None)
        quantize(chunk, FP8, lambda name: torch.tensor(2.0))
        if heads is not None:
            chunk.medusa_heads = heads
            as_modelopt_has_them(chunk, torch.distributed.get_rank() % tp, tp, outputs)


def exported(out: Path, tp: int, pp: int, outputs: bool, asked: dict) -> str:
    """In a rank: export a base in FP8 with its heads in one folder; what is said if that is refused."""
    with with_heads(BASE, tp, pp) as (model, _):
        quantize_all(model, tp, outputs)
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, **asked)


def test_every_topology_writes_modelopts_codes(ranks: Ranks, tmp_path: Path) -> None:
    """Of heads that ModelOpt's Megatron export leaves out; its transformers export has the same weights with the same amaxes."""
    for tp, pp in PLACES:
        out = tmp_path / f"tp{tp}pp{pp}"
        assert set(ranks.call(tp * pp, exported, out, tp, pp, True, {"medusa_layout": "combined"})) == {""}
        assert_same(tensors(out), tensors(tmp_path / "tp1pp1"))
        for file in ("config.json", "hf_quant_config.json"):
            assert read_json(out / file) == read_json(tmp_path / "tp1pp1" / file)
    assert not (tmp_path / "tp1pp1-draft").exists()
    ours, theirs = tensors(tmp_path / "tp1pp1"), read_json(DRAFTS / "draft-llama-medusa-FP8" / "tensors.json")
    own = load_file(DRAFTS / "draft-llama-medusa-FP8-mcore" / "live.safetensors")
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if name.startswith("medusa_heads.") and digest(ours[name]) != theirs[name]}
    assert differing == {
        f"medusa_heads.{head}.0.linear.input_scale" for head in range(3)
    }  # of another run of the model
    for head in range(3):
        amax = own[f"medusa_heads.{head}.medusa_layers.0.linear.input_quantizer._amax"].float()
        assert torch.equal(ours[f"medusa_heads.{head}.0.linear.input_scale"], amax / 448)
    excluded = read_json(tmp_path / "tp1pp1" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert excluded == ["lm_head", "model.embed_tokens"]
    assert verdict_of(of_folder(tmp_path / "tp1pp1"), "tensorrt_llm").loads


def test_what_no_engine_reads_together_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    combined = {"medusa_layout": "combined"}
    [said] = ranks.call(1, exported, tmp_path / "out", 1, 1, False, combined)
    assert said.startswith("medusa_heads.0.lm_head stays in bfloat16 (3 such), and TensorRT-LLM reads FP8 heads alone")
    [said] = ranks.call(1, of_qwen3, tmp_path / "out")
    assert said.startswith(
        "--medusa-layout combined: TensorRT-LLM reads Medusa's heads beside LlamaForCausalLM and Qwen2"
    )
    assert not (tmp_path / "out").exists()


def of_qwen3(out: Path) -> str:
    with with_heads(QWEN3) as (model, _):
        return refusal(export_hf_checkpoint, model, out, hf_model=QWEN3, format="bf16", medusa_layout="combined")


def saved(folder: Path) -> str:
    """In a rank: export a model with heads to one folder, and save it as Megatron-LM does."""
    with with_heads(BASE, 2, 1) as (model, _):
        save(model, folder / "saved", read_json(BASE / "config.json"))
        asked = {"format": "fp8", "input_scale": 0.05, "medusa_layout": "combined"}
        return refusal(export_hf_checkpoint, model, folder / "live", hf_model=BASE, **asked)


def test_saved_heads_have_the_bytes_of_the_live_ones(ranks: Ranks, tmp_path: Path) -> None:
    assert set(ranks.call(2, saved, tmp_path)) == {""}
    asked = ("--device", "cpu", "--hf-model", BASE, "--megatron-checkpoint", tmp_path / "saved", "--format", "fp8")
    asked += ("--medusa-layout", "combined", "--output", tmp_path / "read")
    [(status, said)] = ranks.call(1, command, *asked, "--input-scale", 0.05)
    assert status == 0, said
    assert_same(tensors(tmp_path / "read"), tensors(tmp_path / "live"))
    assert read_json(tmp_path / "read" / "config.json") == read_json(tmp_path / "live" / "config.json")
    [(status, said)] = ranks.call(1, command, *asked, "--overwrite")
    assert status == 1 and "calibration runs no heads of Medusa" in said


def saved_quantized(folder: Path) -> str:
    """In a rank: export a model with heads that ModelOpt quantized, and save it as Megatron-LM does."""
    with with_heads(BASE, 2, 1) as (model, _):
        quantize_all(model, 2, True)
        save(model, folder / "saved", read_json(BASE / "config.json"))
        return refusal(export_hf_checkpoint, model, folder / "live", hf_model=BASE, medusa_layout="combined")


def test_saved_quantizers_of_heads_are_read_or_told_of(ranks: Ranks, tmp_path: Path) -> None:
    assert set(ranks.call(2, saved_quantized, tmp_path)) == {""}
    asked = ("--device", "cpu", "--hf-model", BASE, "--megatron-checkpoint", tmp_path / "saved", "--format", "fp8")
    for layout in ("combined", "draft"):
        [(status, said)] = ranks.call(1, command, *asked, "--medusa-layout", layout, "--output", tmp_path / layout)
        assert status == 0, said
    assert_same(tensors(tmp_path / "combined"), tensors(tmp_path / "live"))
    assert not (tmp_path / "combined-draft").exists() and (tmp_path / "draft-draft").exists()
    assert "draft note" in said and "medusa_heads have quantizers of ModelOpt, and are written in bfloat16" in said
