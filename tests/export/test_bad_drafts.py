"""Drafts that are not exported, and what is asked of them in vain: one message on all ranks, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_export import export_hf_checkpoint, export_hf_checkpoint_async, iter_hf_tensors
from megatron_export.export import pipeline

from ..support.eagle import FP8, drafted, quantize
from ..support.live import refusal
from ..support.models import assert_same, tensors
from ..support.ranks import Ranks
from .test_drafts import BASE, amax, exported, without_draft


def configured(**changes: object) -> Callable[[nn.Module], None]:
    """A draft's `eagle_config` says something else."""

    def change(model: nn.Module) -> None:
        for name, value in changes.items():
            setattr(model.eagle_config, name, value)

    return change


def unconfigured(model: nn.Module) -> None:
    del model.eagle_config


def partly_quantized(model: nn.Module) -> None:
    quantize(model.eagle_module, FP8, amax)
    for quantizer in model.eagle_module.decoder.layers[0].mlp.linear_fc2.children():
        quantizer._disabled = True


def remapped(model: nn.Module) -> None:
    model.eagle_module.d2t += 300


def holding(name: str, draft: str = "eagle_module") -> Callable[[nn.Module], None]:
    """A model, or its draft, with one more module."""

    def change(model: nn.Module) -> None:
        holder = model.get_submodule(draft) if draft else model
        holder.add_module(name, nn.Linear(4, 4))

    return change


def without_fc(model: nn.Module) -> None:
    del model.eagle_module.fc


def another(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        del model.eagle_module
        holding(name, "")(model)

    return change


def without(model: nn.Module) -> None:
    del model.eagle_module


BAD: dict[str, tuple[Callable[[nn.Module], None], dict, str]] = {
    "no eagle_config": (unconfigured, {}, "the model has eagle_module and no eagle_config"),
    "another base": (configured(hidden_size=256), {}, "the draft's hidden_size is 256, its base's 128"),
    "no layers": (configured(eagle_aux_hidden_state_layer_ids=[0, 2]), {}, "are [0, 2], not a list of layers of its base"),
    "no ids": (configured(eagle_aux_hidden_state_layer_ids=[]), {}, "are [], not a list of layers of its base"),
    "no rope": (configured(rotary_base=None), {}, "the draft's eagle_config has no rope_theta"),
    "other norms": (configured(qk_layernorm=True), {}, "the draft has qk_layernorm = True, and engines compute it with False"),
    "other sizes": (configured(draft_vocab_size=100), {}, "d2t is (256,) on each of 2 ranks, but config.json means (100,) in all"),
    "unknown tokens": (remapped, {}, "and its base has 512: token i of the draft is token i + d2t[i]"),
    "partly quantized": (partly_quantized, {}, "layers.0.mlp.down_proj.weight), and engines know no layers of a draft by name"),
    "one folder": (lambda model: None, {"draft_output": "{}"}, "Give a folder beside it"),
    "inside the base": (lambda model: None, {"draft_output": "{}/draft"}, "Give a folder beside it"),
    "no statistics": (lambda model: None, {"draft_format": "fp8"}, "needs calibration"),
    "an engine": (lambda model: None, {"target": "sglang"}, "--target: SGLang will not load the draft: it hands out layers 0 to 0"),
    "another format": (lambda model: None, {"draft_format": "mxfp8"}, "--draft-format 'mxfp8': a draft has none of this"),
    "heads in parallel": (holding("parallel_draft_heads"), {}, "it has parallel draft heads, which no engine serves"),
    "MTP": (holding("hnorm"), {}, "it is an EAGLE-MTP draft, which no engine serves. Train an EAGLE-3 draft"),
    "EAGLE": (without_fc, {}, "it is an EAGLE draft without hidden states of several layers"),
    "DFlash": (another("dflash_module"), {}, "a DFlash or DSpark draft is not exported. Write it with ModelOpt's"),
    "two drafts": (holding("dflash_module", ""), {}, "the model has several drafts, "),
    "no draft": (without, {"draft_output": "elsewhere"}, "--draft-output has no effect: the model has no draft"),
}  # fmt: skip


def tried(name: str, out: Path) -> str:
    """In a rank: what is said of a model with a bad draft."""
    change, asked, _ = BAD[name]
    asked = {key: value.format(out) for key, value in asked.items()}
    with drafted(BASE, 2) as (model, _):
        change(model)
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, format="bf16", **asked)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_draft_is_refused_on_all_ranks_before_anything_is_written(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    said = ranks.call(2, tried, name, tmp_path / "out")
    assert BAD[name][2] in said[0]
    assert len(set(said)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_draft_may_be_left_out(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.call(1, exported, tmp_path / "out", 1, 1, "fp8", {"draft_output": "none"}) == [""]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_draft_goes_where_it_is_told(ranks: Ranks, tmp_path: Path) -> None:
    asked = {"draft_output": str(tmp_path / "small"), "draft_format": "nvfp4", "input_scale": 0.5, "format": "fp8"}
    assert ranks.call(1, exported, tmp_path / "out", 1, 1, "bf16", asked) == [""]
    held = tensors(tmp_path / "small")
    assert float(held["layers.0.mlp.up_proj.input_scale"]) == 0.5
    assert held["layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert {path.name for path in tmp_path.iterdir()} == {"out", "small"}


def failing(out: Path) -> str:
    """In a rank: the draft cannot be written once its base is."""
    done = pipeline.exported

    def fail(here: object, opening: object, target: Path, *rest: object) -> object:
        if target.name.endswith("-draft"):
            opening.origin.draft.module.fc.weight.data[0, 0] = float("nan")
        return done(here, opening, target, *rest)

    with drafted(BASE) as (model, _), mock.patch.object(pipeline, "exported", fail):
        return refusal(export_hf_checkpoint, model, out, hf_model=BASE, format="bf16")


def test_an_error_says_which_of_both_is_there(ranks: Ranks, tmp_path: Path) -> None:
    (said,) = ranks.call(1, failing, tmp_path / "out")
    assert said == f"{tmp_path}/out is published, and its draft {tmp_path}/out-draft is not: NaN or Inf in fc.weight"
    assert not (tmp_path / "out-draft").exists()
    ranks.call(1, without_draft, tmp_path / "alone")
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "alone"))
    asked = {"resume": True}
    assert ranks.call(1, exported, tmp_path / "out", 1, 1, "bf16", asked) == [""]  # goes on with the draft
    assert (tmp_path / "out-draft" / "config.json").is_file()


def streaming(out: Path) -> tuple[str, list[str]]:
    """In a rank: what an export in the background says of a draft, and the names that a stream has."""
    with drafted(BASE) as (model, _):
        said = refusal(export_hf_checkpoint_async, model, out, hf_model=BASE, format="bf16")
        return said, [name for name, _ in iter_hf_tensors(model, hf_model=BASE, format="bf16")]


def test_a_stream_and_an_export_in_the_background_are_of_the_base(ranks: Ranks, tmp_path: Path) -> None:
    ((said, names),) = ranks.call(1, streaming, tmp_path / "out")
    assert "no draft is written in the background. Leave it out with draft_output='none'" in said
    assert sorted(names) == sorted(load_file(BASE / "model.safetensors"))
    assert list(tmp_path.iterdir()) == []
