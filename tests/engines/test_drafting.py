"""A real vLLM, on a CPU, with drafts that were exported beside their base: it writes what the base writes alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export import export_hf_checkpoint

from ..export.test_drafts import BASE, exported
from ..support.eagle import drafted
from ..support.ranks import Ranks, living
from .asking import tried

pytestmark = pytest.mark.vllm
FORMS = {"bf16-1": ("bf16", 1), "bf16-3": ("bf16", 3), "fp8-1": ("fp8", 1), "nvfp4-1": ("nvfp4", 1)}


def test_vllm_writes_with_each_draft_what_the_base_writes_alone(pool: list[Ranks], tmp_path: Path) -> None:
    """The drafts are random, so the base accepts few of their tokens."""
    for name, (form, layers) in FORMS.items():
        assert living(pool).call(1, exported, tmp_path / name, 1, 1, form, {}, layers=layers) == [""]
    base, drafts = tmp_path / "bf16-1", [tmp_path / f"{name}-draft" for name in FORMS]
    found = tried("vllm_drafting", base, *drafts)
    alone = found.pop(base)
    assert alone["error"] is None and "drafted" not in alone
    assert {folder.name: one["error"] for folder, one in found.items()} == {folder.name: None for folder in drafts}
    for folder, one in found.items():
        assert one["tokens"] == alone["tokens"], folder.name
        assert one["drafted"] > 0


def turning(folder: Path) -> list[int]:
    """A base that writes after each of the tokens that are returned the one before it in this list: its layers do nothing."""
    ids = torch.randperm(512, generator=torch.Generator().manual_seed(3))[:100]
    held = load_file(BASE / "model.safetensors")
    for tensor in held.values():
        tensor.fill_(1 if tensor.dim() == 1 else 0)
    held["model.embed_tokens.weight"][ids, torch.arange(100)] = 1
    held["lm_head.weight"][ids.roll(1), torch.arange(100)] = 1
    folder.mkdir()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(BASE / "config.json", folder)
    return ids.tolist()


def guessing(source: Path, ids: list[int], out: Path) -> None:
    """In a rank: export it with a draft that reads a token in the base's states, and guesses two tokens on."""
    known = torch.tensor(sorted(ids))
    rows = torch.searchsorted(known, torch.tensor(ids).roll(2))
    weights = {
        "fc.weight": torch.cat([torch.eye(128), torch.zeros(128, 128)], dim=1),
        "eagle_output_layer.weight": torch.zeros(100, 128).index_put((rows, torch.arange(100)), torch.ones(100)),
        "d2t": known - torch.arange(100),
    }
    with drafted(source, weights=weights, rest=True, draft_vocab_size=100) as (model, _):
        export_hf_checkpoint(model, out, hf_model=source, format="bf16")


def test_the_base_accepts_all_that_a_draft_knows(pool: list[Ranks], tmp_path: Path) -> None:
    ids = turning(tmp_path / "source")
    living(pool).call(1, guessing, tmp_path / "source", ids, tmp_path / "base")
    prompts = json.dumps([ids[40:44], ids[7:9], ids[90:]])
    found = tried(
        "vllm_drafting", tmp_path / "base", tmp_path / "base-draft", flags=("--steps", "1", "--prompts", prompts)
    )
    alone, beside = found.values()
    assert beside["error"] is None
    written = [ids[(ids.index(json.loads(prompts)[0][-1]) - 1 - step) % 100] for step in range(48)]
    assert alone["tokens"][0] == written
    assert alone["tokens"] == beside["tokens"]
    assert beside["accepted"] == beside["drafted"] > 60


def test_vllm_refuses_a_draft_that_says_another_number_of_hidden_states(pool: list[Ranks], tmp_path: Path) -> None:
    """So that the test above would notice it."""
    assert living(pool).call(1, exported, tmp_path / "base", 1, 1, "bf16", {}) == [""]
    bad = Path(shutil.copytree(tmp_path / "base-draft", tmp_path / "bad"))
    text = (bad / "config.json").read_text()
    (bad / "config.json").write_text(text.replace('"num_aux_hidden_states": 2', '"num_aux_hidden_states": 3'))
    found = tried("vllm_drafting", tmp_path / "base", bad)
    assert "size" in found[bad]["error"] or "shape" in found[bad]["error"]
