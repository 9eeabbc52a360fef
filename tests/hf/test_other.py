"""Dense decoders that are in no table: found by the names of their linears, quantized without folding, all else copied."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_export import ExportError, export_hf_checkpoint

from ..support import modelopt as peer
from ..support.models import _SMALL, read_json, same, tensors
from .test_golden import joined

OTHERS = ("granite", "gemma2", "olmo2", "cohere", "seed_oss")


def made(kind: str, **more: int) -> nn.Module:
    """A random model of a class of transformers, its norms not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(_SMALL | {"head_dim": 16, "num_hidden_layers": 2} | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.rand_like(weight) + 0.5)
    model.config.architectures = [type(model).__name__]  # which from_pretrained sets, and ModelOpt reads
    return model.eval()


@pytest.mark.parametrize("kind", OTHERS)
def test_its_linears_are_quantized_and_all_else_is_copied(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    report = export_hf_checkpoint(model, tmp_path / "out", format="nvfp4", input_scale=1.0)
    model.save_pretrained(tmp_path / "saved")
    ours, saved = tensors(tmp_path / "out"), tensors(tmp_path / "saved")
    linears = {
        f"{name}.weight" for name, one in model.named_modules() if isinstance(one, nn.Linear) and name != "lm_head"
    }
    assert len(linears) == 14
    assert {name for name in ours if not name.rpartition(".")[2].startswith(("weight_scale", "input_scale"))} == set(
        saved
    )
    assert all(ours[name].dtype == torch.uint8 for name in linears)
    assert all(same(ours[name], saved[name]) for name in saved.keys() - linears)
    assert f"{type(model).__name__} is in no table here" in report.plan.remarks[0]
    listed = read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]["exclude_modules"]
    assert listed == ["lm_head", "model.embed_tokens"]


def test_a_model_that_is_not_found_so_and_formats_that_fold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match="Starcoder2ForCausalLM is in no table here, and its linears are not found by name"
    ):
        export_hf_checkpoint(made("starcoder2"), tmp_path / "out", format="fp8_pb")
    with pytest.raises(ExportError, match="AWQ folds vectors into what is only copied here"):
        export_hf_checkpoint(made("granite"), tmp_path / "out", format="nvfp4_awq", calibration={})


@pytest.mark.modelopt
@pytest.mark.parametrize("form", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("kind", ["granite", "gemma2", "olmo2"])
def test_quantized_by_modelopt_every_tensor_is_modelopts(kind: str, form: str, tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint as export

    model = made(kind, num_key_value_heads=8)
    ids = torch.randint(0, 500, (4, 16))
    with torch.no_grad():
        mtq.quantize(model, peer.recipe(form, None), lambda model: model(ids))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_hf_checkpoint(model, tmp_path / "ours")
    export(model, export_dir=tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert sorted(ours) == sorted(theirs)
    assert {key for key in ours if not same(ours[key], theirs[key])} == joined(state, ours)
