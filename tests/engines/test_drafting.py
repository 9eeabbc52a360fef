"""A real vLLM, on a CPU, with drafts that were exported beside their base: it writes what the base writes alone."""

import shutil
from pathlib import Path

import pytest

from ..export.test_drafts import exported
from ..support.ranks import Ranks, living
from .asking import tried

pytestmark = pytest.mark.vllm
FORMS = {"bf16-1": ("bf16", 1), "bf16-3": ("bf16", 3), "fp8-1": ("fp8", 1), "nvfp4-1": ("nvfp4", 1)}


def test_vllm_writes_with_each_draft_what_the_base_writes_alone(pool: list[Ranks], tmp_path: Path) -> None:
    """The drafts are random, so the base accepts few of their tokens; how many, with a trained one, is in docs/drafts.md."""
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


def test_vllm_refuses_a_draft_that_says_another_number_of_hidden_states(pool: list[Ranks], tmp_path: Path) -> None:
    """So that the test above would notice it."""
    assert living(pool).call(1, exported, tmp_path / "base", 1, 1, "bf16", {}) == [""]
    bad = Path(shutil.copytree(tmp_path / "base-draft", tmp_path / "bad"))
    text = (bad / "config.json").read_text()
    (bad / "config.json").write_text(text.replace('"num_aux_hidden_states": 2', '"num_aux_hidden_states": 3'))
    found = tried("vllm_drafting", tmp_path / "base", bad)
    assert "size" in found[bad]["error"] or "shape" in found[bad]["error"]
