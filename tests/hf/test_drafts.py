"""EAGLE-3 drafts in live transformers models: the bytes are those of the Megatron route, and so are the base's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from megatron_export import export_hf_checkpoint

from ..export.test_drafts import BASE, DRAFTS, SETTINGS, of_two_layers
from ..support.eagle import FP8
from ..support.live import refusal
from ..support.live_hf import assert_untouched, loaded, put, state_of, traces_of
from ..support.models import assert_same, read_json, tensors
from ..support.ranks import Ranks


def hung(model: nn.Module, held: dict[str, Tensor], **changes: object) -> nn.Module:
    """The model with a draft of these tensors, in which amaxes are those of quantizers to FP8."""
    model.eagle_module, model.eagle_config = nn.Module(), PretrainedConfig.from_dict(SETTINGS | changes)
    for name, tensor in held.items():
        *owners, leaf = name.split(".")
        if leaf == "_amax":
            put(model.eagle_module, ".".join(owners), {"_disabled": False} | FP8, {"_amax": tensor})
            continue
        module = model.eagle_module
        for owner in owners:
            if owner not in module._modules:
                module.add_module(owner, nn.Module())
            module = module._modules[owner]
        module.register_buffer(leaf, tensor) if leaf == "d2t" else module.register_parameter(
            leaf, nn.Parameter(tensor, False)
        )
    return model


def golden() -> dict[str, Tensor]:
    live = load_file(DRAFTS / "draft-llama-eagle3deep-FP8457" / "live.safetensors")
    return {name.removeprefix("eagle_module."): one for name, one in live.items() if name.startswith("eagle_module.")}


def test_a_transformers_draft_has_the_bytes_of_the_megatron_route(ranks: Ranks, tmp_path: Path) -> None:
    model = hung(loaded(BASE), golden(), num_hidden_layers=2)
    state, traces = state_of(model), traces_of(model)
    export_hf_checkpoint(model, tmp_path / "hf", format="bf16")
    assert_untouched(model, state, traces)
    assert ranks.call(1, of_two_layers, tmp_path / "mcore") == [""]
    assert_same(tensors(tmp_path / "hf-draft"), tensors(tmp_path / "mcore-draft"))
    said, same = (read_json(tmp_path / f"{route}-draft" / "config.json") for route in ("hf", "mcore"))
    assert said == same
    assert_same(tensors(tmp_path / "hf"), tensors(tmp_path / "mcore"))


def test_a_draft_without_an_output_layer_has_that_of_its_base(tmp_path: Path) -> None:
    held = {
        name: one for name, one in golden().items() if "lm_head" not in name and name != "d2t" and "_amax" not in name
    }
    model = hung(loaded(BASE), held, num_hidden_layers=2, draft_vocab_size=None)
    export_hf_checkpoint(model, tmp_path / "out", format="bf16")
    ours = tensors(tmp_path / "out-draft")
    assert torch.equal(ours["lm_head.weight"], load_file(BASE / "model.safetensors")["lm_head.weight"])
    assert "d2t" not in ours


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "the draft's hidden_size is 64, its base's 128"),
        ({"eagle_aux_hidden_state_layer_ids": [5]}, "are [5], not a list of layers of its base, which has 2"),
        ({"num_hidden_layers": 3}, "the model has no parameter decoder.layers.2."),
    ],
)
def test_a_bad_draft_is_refused_before_anything_is_written(changes: dict, said: str, tmp_path: Path) -> None:
    model = hung(loaded(BASE), golden(), **({"num_hidden_layers": 2} | changes))
    assert said in refusal(export_hf_checkpoint, model, tmp_path / "out", format="bf16")
    assert list(tmp_path.iterdir()) == []
