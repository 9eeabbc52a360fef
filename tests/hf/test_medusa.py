"""Medusa's heads in live transformers models, against what ModelOpt 0.47 wrote of the same, and as vLLM reads them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_export import export_hf_checkpoint
from megatron_export.engines import verdict_of
from megatron_export.models.medusa import spelled
from megatron_export.planning.engine_check import of_folder

from ..export.test_drafts import BASE, DRAFTS
from ..support.command_line import command_line
from ..support.live import refusal
from ..support.live_hf import assert_untouched, digest, hang_quantizers, loaded, state_of, traces_of
from ..support.models import assert_same, read_json, tensors
from .test_golden import joined

WEIGHTS = DRAFTS / "draft-llama-medusa-bf16"
QUANTIZED = DRAFTS / "draft-llama-medusa-FP8"


def headed(quantized: bool, blocks: int = 1) -> nn.Module:
    """The model that ModelOpt exported: a Llama with three heads, in FP8 if `quantized`; more blocks are the first one again."""
    model = loaded(BASE)
    model.config.medusa = {"num_medusa_heads": 3, "num_medusa_layers": blocks}
    model.medusa_heads = nn.ModuleList(nn.ModuleList(nn.Module() for _ in range(blocks + 1)) for _ in range(3))
    for name, tensor in load_file(WEIGHTS / "live.safetensors").items():
        _, head, at, *_, leaf = name.split(".")
        for block in range(blocks) if "linear" in name else [blocks]:
            module = model.medusa_heads[int(head)][block]
            if "linear" in name:
                module = module._modules.setdefault("linear", nn.Module())
            module.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    if quantized:
        hang_quantizers(model, QUANTIZED)
    return model


def test_fp8_heads_beside_their_base_are_modelopts(tmp_path: Path) -> None:
    """But for q, k, v and gate, up, which ModelOpt gives scales of their own."""
    model = headed(quantized=True)
    state, traces = state_of(model), traces_of(model)
    export_hf_checkpoint(model, tmp_path / "out", medusa_layout="combined")
    assert_untouched(model, state, traces)
    ours, theirs = tensors(tmp_path / "out"), read_json(QUANTIZED / "tensors.json")
    assert ours.keys() == theirs.keys()
    differing = {name for name, tensor in ours.items() if digest(tensor) != theirs[name]}
    assert differing == joined(load_file(QUANTIZED / "live.safetensors"), ours)
    assert not any("medusa" in name for name in differing)
    said, meant = (read_json(folder / "config.json") for folder in (tmp_path / "out", QUANTIZED))
    assert said == meant
    assert verdict_of(of_folder(tmp_path / "out"), "tensorrt_llm").loads
    status, told = command_line("check", tmp_path / "out", "--engine", "tensorrt_llm")
    assert status == 0 and "with trtllm-build; its PyTorch backend has no Medusa" in told, told
    export_hf_checkpoint(headed(quantized=False), tmp_path / "plain", format="bf16", medusa_layout="combined")
    status, told = command_line("verify", tmp_path / "out", "--reference", tmp_path / "plain")
    assert (status, "nothing wrong was found" in told) == (0, True), told


def test_bf16_heads_beside_their_base_are_modelopts(tmp_path: Path) -> None:
    export_hf_checkpoint(headed(quantized=False), tmp_path / "out", format="bf16", medusa_layout="combined")
    heads = load_file(WEIGHTS / "live.safetensors")
    assert_same(tensors(tmp_path / "out"), load_file(BASE / "model.safetensors") | heads)
    assert read_json(tmp_path / "out" / "config.json") == read_json(WEIGHTS / "config.json")
    found = verdict_of(of_folder(tmp_path / "out"), "tensorrt_llm")
    assert found.loads is False and "it reads heads in FP8 alone" in found.why


@pytest.mark.parametrize("blocks", [1, 2])
def test_heads_in_a_folder_of_their_own_are_plain_and_say_so(blocks: int, tmp_path: Path) -> None:
    model = headed(quantized=blocks == 1, blocks=blocks)
    done = export_hf_checkpoint(model, tmp_path / "out", **({} if blocks == 1 else {"format": "bf16"}))
    held: dict[str, Tensor] = {
        spelled(name.removeprefix("medusa_heads.")): one
        for name, one in state_of(model).items()
        if name.startswith("medusa_heads.") and "_quantizer" not in name
    }
    assert_same(tensors(tmp_path / "out-draft"), held)
    assert {name.split(".")[0] for name in held} == {"blocks", "lm_heads"}
    remarks = [
        one for one in done.draft.plan.remarks if "have quantizers of ModelOpt, and are written in bfloat16" in one
    ]
    assert len(remarks) == (blocks == 1)
    base = of_folder(tmp_path / "out")
    assert "medusa" not in base.config and not any("medusa" in name for name in base.whole.tensors)
    assert verdict_of(of_folder(tmp_path / "out-draft"), "vllm", base=base).loads


@pytest.mark.parametrize(
    ("blocks", "asked", "said"),
    [
        (
            2,
            {"input_scale": 0.05, "format": "fp8"},
            "heads have 2 blocks, and TensorRT-LLM reads the scales of the last one",
        ),
        (1, {"format": "fp8", "exclude": ("medusa_heads.0.1",)}, "medusa_heads.0.lm_head stays in bfloat16 (1 such)"),
        (1, {"format": "nvfp4"}, "For this architecture there are bf16 and fp8"),
        (1, {"format": "bf16", "draft_format": "bf16"}, "--draft-format has no effect with --medusa-layout combined"),
    ],
)
def test_what_tensorrt_llm_does_not_read_is_refused(blocks: int, asked: dict, said: str, tmp_path: Path) -> None:
    model = headed(quantized=False, blocks=blocks)
    assert said in refusal(export_hf_checkpoint, model, tmp_path / "out", medusa_layout="combined", **asked)
    assert list(tmp_path.iterdir()) == []


def test_a_layout_of_heads_that_are_not_there_is_refused(tmp_path: Path) -> None:
    for layout in ("combined", "draft"):
        said = refusal(export_hf_checkpoint, loaded(BASE), tmp_path / "out", format="bf16", medusa_layout=layout)
        assert said.startswith("--medusa-layout has no effect: the model has no heads of Medusa")


def test_measured_inputs_or_one_scale_serve_heads_without_quantizers(tmp_path: Path) -> None:
    asked = {"format": "fp8", "medusa_layout": "combined"}
    export_hf_checkpoint(headed(quantized=False), tmp_path / "out", input_scale=0.05, **asked)
    ours, theirs = tensors(tmp_path / "out"), read_json(QUANTIZED / "tensors.json")
    scales = {name for name in ours if name.startswith("medusa_heads.") and name.endswith("input_scale")}
    assert len(scales) == 6 and {float(ours[name]) for name in scales} == {float(torch.tensor(0.05))}
    for name in (name for name in ours if name.startswith("medusa_heads.") and name not in scales):
        assert digest(ours[name]) == theirs[name], name
