"""Drafts judged against the draft that they were made from, as any model is, but for a text."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ..export.test_drafts import exported
from ..support.command_line import command_line
from ..support.models import tensors
from ..support.ranks import Ranks


@pytest.fixture
def pair(ranks: Ranks, tmp_path: Path) -> tuple[Path, Path]:
    """The same draft in FP8 and in bfloat16; their base is in the folder `bf16`."""
    for form in ("bf16", "fp8"):
        assert ranks.call(1, exported, tmp_path / form, 1, 1, form, {}) == [""]
    return tmp_path / "fp8-draft", tmp_path / "bf16-draft"


def test_a_draft_is_judged_against_its_original_and_not_on_a_text(pair: tuple[Path, Path], tmp_path: Path) -> None:
    quantized, original = pair
    status, said = command_line("verify", quantized, "--reference", original)
    assert (status, "sound" in said) == (0, True), said
    assert "7 quantized weights, 7 others, 7 equal" in said and "dB at least" in said
    text = tmp_path / "text"
    text.write_text("words " * 9999)
    status, said = command_line("verify", quantized, "--reference", original, "--text", text)
    assert status == 2
    assert said.endswith("is a draft, which writes no text without its base. Leave out --text")


@pytest.mark.parametrize(
    "name", ["d2t", "lm_head.weight", "layers.0.mlp.down_proj.weight", "layers.0.hidden_norm.weight"]
)
def test_a_changed_tensor_of_a_draft_is_named(name: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    quantized, original = pair
    held = dict(tensors(quantized))
    changed = held[name].clone().view(torch.uint8) if held[name].element_size() == 1 else held[name].clone()
    changed.view(-1)[:64] += 1
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)
    shutil.copytree(quantized, tmp_path / "changed")
    (tmp_path / "changed" / "export_manifest.json").unlink()
    save_file(held | {name: changed.view(held[name].dtype)}, tmp_path / "changed" / "model.safetensors")
    status, said = command_line("verify", tmp_path / "changed", "--reference", original)
    assert status == 1 and f"{name}" in said, said


def test_check_takes_what_was_exported_with_its_base(pair: tuple[Path, Path]) -> None:
    quantized, original = pair
    for draft in pair:
        status, said = command_line("check", draft, "--with", original.parent / "bf16", "--engine", "vllm")
        assert (status, said) == (0, "vLLM 0.32.0: loads")
    assert "SGLang 0.5.23: loads" in command_line("check", quantized)[1]
