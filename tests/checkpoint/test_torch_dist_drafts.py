"""An EAGLE-3 draft in a `torch_dist` checkpoint: the bytes are those of the live model that was saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_export import export_hf_checkpoint

from ..export.test_drafts import BASE, SETTINGS, amax, refusal
from ..support.eagle import FP8, drafted, quantize
from ..support.models import assert_same, read_json, tensors
from ..support.ranks import Ranks, command
from ..support.saving import PLACE, save

LAYER = "eagle_module.decoder.layers."


def saved(folder: Path, tp: int, pp: int, quantized: bool, how: dict) -> str:
    """In a rank: export a model with a draft, and save it as Megatron-LM does, with what ModelOpt says of the draft."""
    with drafted(BASE, tp, pp, **how) as (model, _):
        if quantized and hasattr(model, "eagle_module"):
            quantize(model.eagle_module, FP8, amax)
        save(model, folder / "saved", read_json(BASE / "config.json"))
        return refusal(export_hf_checkpoint, model, folder / "live", hf_model=BASE, format="bf16")


def tell(folder: Path, **changes: object) -> None:
    """Write ModelOpt's state of a draft beside an iteration, as ModelOpt does."""
    settings = {name: value for name, value in SETTINGS.items() if name != "hidden_size"} | {
        "rope_scaling": {"rope_type": "default"}
    }
    mode = ("eagle", {"config": {"eagle_architecture_config": settings | changes}, "metadata": {}})
    place = folder / "saved" / PLACE / "modelopt_state"
    place.mkdir()
    torch.save({"modelopt_state_dict": [mode], "modelopt_version": "0.47.0"}, place / "common.pt")


def read(ranks: Ranks, folder: Path, *flags: object) -> str:
    """What the command says that exports the checkpoint, on two ranks."""
    asked = ("--device", "cpu", "--hf-model", BASE, "--megatron-checkpoint", folder / "saved", "--format", "bf16")
    results = ranks.call(2, command, *asked, "--tp", 2, "--output", folder / "read", *flags)
    assert len({status for status, _ in results}) == 1
    return results[0][1]


@pytest.mark.parametrize(("tp", "pp", "layers", "quantized"), [(1, 2, 1, True), (2, 1, 3, False)])
def test_a_saved_draft_has_the_bytes_of_the_live_one(
    tp: int, pp: int, layers: int, quantized: bool, ranks: Ranks, tmp_path: Path
) -> None:
    assert set(ranks.call(2, saved, tmp_path, tp, pp, quantized, {"layers": layers})) == {""}
    tell(tmp_path, num_hidden_layers=layers)
    said = read(ranks, tmp_path, *(("--draft-format", "fp8") if quantized else ()))
    assert f"draft folder      {tmp_path}/read-draft" in said, said
    for beside in ("", "-draft"):
        assert_same(tensors(tmp_path / f"read{beside}"), tensors(tmp_path / f"live{beside}"))
        configs = [read_json(tmp_path / f"{name}{beside}" / "config.json") for name in ("read", "live")]
        assert configs[0] == configs[1]
    assert tensors(tmp_path / "read-draft")["d2t"].dtype == torch.int64


def heads(folder: Path) -> Tensor:
    return tensors(folder)["lm_head.weight"]


def test_a_draft_without_an_output_layer_has_that_of_its_base(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, saved, tmp_path, 1, 1, False, {"draft_vocab_size": 512}) == [""]
    assert torch.equal(heads(tmp_path / "live-draft"), heads(BASE))
    assert "d2t" not in tensors(tmp_path / "live-draft")
    said = read(ranks, tmp_path)
    assert "has eagle_module, and no modelopt_state beside it that says how the draft computes" in said
    assert not (tmp_path / "read").exists()
    tell(tmp_path, draft_vocab_size=512, rope_scaling={"rope_type": "llama3", "factor": 4.0})
    read(ranks, tmp_path)
    assert_same(tensors(tmp_path / "read-draft"), tensors(tmp_path / "live-draft"))
    assert read_json(tmp_path / "read-draft" / "config.json")["rope_scaling"]["factor"] == 4.0
