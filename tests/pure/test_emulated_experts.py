"""Experts that transformers stacks, one by one as they are on disk: the same model in bfloat16, near it when quantized."""

from pathlib import Path

import pytest
import torch

from megatron_export.emulation import EmulatedExperts, EmulatedLinear, load

from ..exported import exported
from ..models import make_model

IDS = torch.arange(48).view(2, 24) * 7 % 500


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "deepseek_v3"])
@torch.no_grad()
def test_experts_compute_what_transformers_own_do(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path, name)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)(IDS).logits.float()
    plain = load(source)
    assert any(isinstance(module, EmulatedExperts) for module in plain.modules())
    ours = plain(IDS).logits.float()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()  # sums in another order, in bfloat16
    exported(source, tmp_path / "fp8", "fp8")
    quantized = load(tmp_path / "fp8")
    experts = next(module for module in quantized.modules() if isinstance(module, EmulatedExperts))
    assert all(isinstance(linear, EmulatedLinear) for expert in experts.children() for linear in expert.children())
    rounded = quantized(IDS).logits.float()
    assert 0 < (rounded - ours).norm() < 0.3 * ours.norm()
