"""Medusa's heads beside their base: the same bytes on every topology and from a checkpoint, as vLLM reads them."""

from pathlib import Path

import pytest
import torch

from megatron_export import ExportError, export_hf_checkpoint
from megatron_export.engines import verdict_of
from megatron_export.mcore.model import chunks_of
from megatron_export.models import shape_of
from megatron_export.models.drafts import draft_kind
from megatron_export.models.medusa import medusa_config
from megatron_export.planning.engine_check import of_folder

from ..support.command_line import command_line
from ..support.eagle import FP8, quantize
from ..support.live import refusal
from ..support.medusa import with_heads
from ..support.models import GOLDEN, assert_same, read_json, tensors
from ..support.ranks import Ranks, command
from ..support.saving import save

BASE = GOLDEN / "models" / "llama-bf16"
PLACES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def exported(out: Path, tp: int, pp: int, blocks: int, asked: dict, quantized: bool = False, lost: str = "") -> str:
    """In a rank: export a base in bfloat16 with its heads; what is said if that is refused."""
    with with_heads(BASE, tp, pp, blocks=blocks) as (model, whole):
        chunk = chunks_of(model)[-1]
        if quantized and whole:
            blocked = tuple(name for name, _ in chunk.medusa_heads.named_modules() if name.endswith(".linear"))
            quantize(chunk.medusa_heads, FP8, lambda name: torch.tensor(2.0), also=blocked)
        if lost and whole:
            chunk.medusa_heads.get_submodule(lost).bias = None
        done = []
        asked = {"hf_model": BASE, "format": "bf16"} | asked
        said = refusal(lambda: done.append(export_hf_checkpoint(model, out, **asked)))
        told = [one for some in done for one in some.draft.plan.remarks if "quantizers of ModelOpt" in one]
        assert len(told) == (quantized and not said)
        if whole and not said:
            spelled = {
                name.replace("medusa_layers", "layers").replace(".linear", ""): one for name, one in whole.items()
            }
            of_heads = {name: one for name, one in spelled.items() if "lm_head" in name}
            expected = {f"blocks.{name}": one for name, one in spelled.items() if name not in of_heads}
            expected |= {f"lm_heads.{name.replace('.lm_head', '')}": one for name, one in of_heads.items()}
            assert_same(tensors(Path(f"{out}-draft")), expected)
        return said


@pytest.mark.parametrize("blocks", [1, 2])
def test_every_topology_writes_the_heads_that_are_there(blocks: int, ranks: Ranks, tmp_path: Path) -> None:
    for tp, pp in PLACES:
        out = tmp_path / f"tp{tp}pp{pp}"
        assert set(ranks.call(tp * pp, exported, out, tp, pp, blocks, {}, quantized=tp == 2)) == {""}
        assert read_json(Path(f"{out}-draft") / "config.json") == read_json(tmp_path / "tp1pp1-draft" / "config.json")
    draft = of_folder(tmp_path / "tp1pp1-draft")
    verdict = verdict_of(draft, "vllm", base=of_folder(tmp_path / "tp1pp1"))
    assert verdict.text == "loads: with num_speculative_tokens of at most 3"
    assert not verdict_of(draft, "vllm", "0.33").loads and not verdict_of(draft, "sglang").loads


def saved(folder: Path) -> str:
    """In a rank: export a model with heads, and save it as Megatron-LM does."""
    with with_heads(BASE, 2, 1, blocks=2) as (model, _):
        save(model, folder / "saved", read_json(BASE / "config.json"))
        return refusal(export_hf_checkpoint, model, folder / "live", hf_model=BASE, format="bf16")


def test_saved_heads_have_the_bytes_of_the_live_ones(ranks: Ranks, tmp_path: Path) -> None:
    assert set(ranks.call(2, saved, tmp_path)) == {""}
    asked = ("--device", "cpu", "--hf-model", BASE, "--megatron-checkpoint", tmp_path / "saved", "--format", "bf16")
    for status, said in ranks.call(2, command, *asked, "--tp", 2, "--output", tmp_path / "read"):
        assert status == 0, said
    assert_same(tensors(tmp_path / "read-draft"), tensors(tmp_path / "live-draft"))
    status, said = command_line("verify", tmp_path / "read-draft", "--reference", tmp_path / "live-draft")
    assert (status, "nothing wrong was found" in said) == (0, True), said


def test_heads_are_in_bfloat16_and_alike_or_refused(ranks: Ranks, tmp_path: Path) -> None:
    [said] = ranks.call(1, exported, tmp_path / "out", 1, 1, 1, {"draft_format": "fp8"})
    assert said == "--draft-format fp8: medusa_heads has only bf16"
    [said] = ranks.call(1, exported, tmp_path / "out", 1, 1, 1, {}, lost="1.medusa_layers.0.linear")
    assert said.startswith("medusa_heads: some heads have other blocks than others, or no bias")
    [said] = ranks.call(1, exported, tmp_path / "out", 1, 1, 5, {})
    assert "a head has 5 blocks, and 4 are the most that are exported. Or leave the draft out" in said
    assert not (tmp_path / "out").exists()


def test_heads_without_blocks_are_refused() -> None:
    with pytest.raises(ExportError, match="they have no blocks, as ModelOpt's have them"):
        draft_kind("medusa_heads", ["0.0.weight"])


@pytest.mark.parametrize("key", ["num_heads", "num_hidden_layers", "hidden_size", "vocab_size"])
def test_counts_that_no_heads_have_are_refused(key: str) -> None:
    right = medusa_config({"hidden_size": 8, "vocab_size": 16}, {"num_heads": 3, "num_hidden_layers": 1})
    assert shape_of(right).layers == 3
    for wrong in (0, -1, "3", None, True, 1 << 40):
        with pytest.raises(ExportError, match="needs whole numbers above 0"):
            shape_of(right | {key: wrong})


@pytest.mark.parametrize("key", ["num_medusa_heads", "num_medusa_layers"])
def test_counts_beside_a_base_that_no_heads_have_are_refused(key: str) -> None:
    right = read_json(GOLDEN / "drafts" / "draft-llama-medusa-bf16" / "config.json")
    assert (shape_of(right).medusa, shape_of(right).blocks) == (3, 1)
    for wrong in (0, -1, "3", None, True, 1 << 40):
        with pytest.raises(ExportError, match="config.json: medusa must say"):
            shape_of(right | {"medusa": right["medusa"] | {key: wrong}})
    with pytest.raises(ExportError, match="config.json: medusa must say"):
        shape_of(right | {"medusa": 3})
