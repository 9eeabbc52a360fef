"""A transformers model as it is handed in: what is taken from it, and what is refused in a sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_export import (
    ExportError,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    iter_hf_tensors,
    plan_hf_tensors,
)

from ..support.live_hf import (
    Quantizer,
    assert_untouched,
    loaded,
    put,
    state_of,
    take_experts_apart,
    traces_of,
)
from ..support.models import assert_same, contents, read_json, tensors

FP8 = {"_num_bits": (4, 3), "_disabled": False, "_axis": None, "_block_sizes": None}
NVFP4 = {"_num_bits": (2, 1), "_disabled": False, "_block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


def quantize(model: nn.Module, linear: str, settings: dict) -> None:
    """Hang the quantizers of one linear into a model."""
    for kind in ("input", "weight"):
        put(model, f"{linear}.{kind}_quantizer", settings, {"_amax": torch.tensor(2.0, dtype=torch.bfloat16)})


def quantize_all(model: nn.Module, settings: dict = FP8) -> None:
    """Every linear of a model without experts."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantize(model, name, settings)


class Tokenizer:
    """What is called of a tokenizer of transformers."""

    def save_pretrained(self, save_directory: str) -> None:
        Path(save_directory, "tokenizer.json").write_text('{"its": "own"}')


def test_nothing_but_a_model_and_a_folder_is_needed(models: dict, tmp_path: Path) -> None:
    model = loaded(models["llama31"])
    quantize_all(model)
    report = export_hf_checkpoint(model, tmp_path / "out")
    assert report.plan.format == "fp8"
    written = read_json(tmp_path / "out" / "config.json")
    assert written.pop("quantization_config")["quant_algo"] == "FP8"
    assert written == read_json(models["llama31"] / "config.json")
    assert (
        tmp_path / "out" / "chat_template.jinja"
    ).read_text() == "{{ messages }}"  # of the folder that it was loaded from


def test_a_tokenizer_is_an_object_or_a_folder_and_counts_before_the_models_own(models: dict, tmp_path: Path) -> None:
    model, folder = loaded(models["llama31"]), tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"a": "folder"}')
    for number, (tokenizer, text) in enumerate(((Tokenizer(), '{"its": "own"}'), (folder, '{"a": "folder"}'))):
        export_hf_checkpoint(model, tmp_path / str(number), format="bf16", tokenizer=tokenizer)
        assert (tmp_path / str(number) / "tokenizer.json").read_text() == text
        assert (tmp_path / str(number) / "generation_config.json").is_file()
    model.name_or_path = model.config._name_or_path = ""
    report = export_hf_checkpoint(model, tmp_path / "none", format="bf16")
    assert any("tokenizer" in remark for remark in report.plan.remarks)


def test_the_folder_that_a_model_or_its_tokenizer_came_from_is_not_overwritten(models: dict, tmp_path: Path) -> None:
    home, other = (Path(shutil.copytree(models["llama31"], tmp_path / name)) for name in ("home", "other"))
    (other / "tokenizer.json").write_text("{}")
    model, before = loaded(home), {path.name: path.read_bytes() for path in home.iterdir()}
    for target, more in ((home, {}), (home, {"hf_model": other}), (other, {"tokenizer": other}), (tmp_path, {})):
        with pytest.raises(ExportError, match=f"{target} holds .*, which this export needs"):
            export_hf_checkpoint(model, target, format="bf16", overwrite=True, **more)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    assert (other / "tokenizer.json").read_text() == "{}"


def test_a_plain_model_in_bf16_is_itself(models: dict, tmp_path: Path) -> None:
    for name in ("qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "llama4_vision"):
        model = loaded(models[name], name)
        state, traces = state_of(model), traces_of(model)
        export_hf_checkpoint(model, tmp_path / name, format="bf16")
        assert_untouched(model, state, traces)
        assert_same(tensors(tmp_path / name), tensors(models[name]))


def test_names_of_mixtral_in_memory_are_written_as_the_hub_has_them(models: dict, tmp_path: Path) -> None:
    """Fused experts have one quantizer for gate and up, and one input quantizer for all experts."""
    model = loaded(models["mixtral"])
    amax = torch.tensor(2.0, dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            for linear in ("gate_up_proj", "down_proj"):
                put(model, f"{name}.{linear}_input_quantizer", NVFP4, {"_amax": amax})
                for number in range(4):
                    put(model, f"{name}.{linear}_weight_quantizers.{number}", NVFP4, {"_amax": amax + number})
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantize(model, name, NVFP4)
    export_hf_checkpoint(model, tmp_path / "out")
    made = tensors(tmp_path / "out")
    for number in range(4):
        for leaf in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{number}.{leaf}"
            assert made[f"{name}.weight"].dtype == torch.uint8
            assert made[f"{name}.weight_scale_2"] == torch.tensor(2.0 + number) / torch.tensor(6 * 448.0)
            assert made[f"{name}.input_scale"] == torch.tensor(2.0) / torch.tensor(6 * 448.0)


def test_the_cache_of_latent_attention_has_no_scales_of_keys(models: dict, tmp_path: Path) -> None:
    """ModelOpt writes k_proj.k_scale, of a linear that there is not; no engine reads it."""
    model, amax = loaded(models["deepseek_v3"]), {"_amax": torch.tensor(2.0, dtype=torch.bfloat16)}
    take_experts_apart(model)
    quantize_all(model)
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith(".self_attn"):
            for kind in ("k_bmm", "v_bmm"):
                put(model, f"{name}.{kind}_quantizer", FP8, amax)
    with pytest.raises(ExportError, match="--kv-cache fp8 --kv-scale 1"):
        export_hf_checkpoint(model, tmp_path / "out")
    export_hf_checkpoint(model, tmp_path / "out", kv_scale=1.0)
    assert not [name for name in tensors(tmp_path / "out") if name.endswith(("k_scale", "v_scale"))]
    said = read_json(tmp_path / "out" / "hf_quant_config.json")["quantization"]
    assert (said["quant_algo"], said["kv_cache_quant_algo"]) == ("FP8", "FP8")


def test_wrapped_models_and_those_of_transformers_4_are_the_same(models: dict, tmp_path: Path) -> None:
    model = loaded(models["qwen3_moe"])
    export_hf_checkpoint(model, tmp_path / "plain", format="fp8_pb")
    export_hf_checkpoint(torch.compile(model), tmp_path / "compiled", format="fp8_pb")
    take_experts_apart(model)
    export_hf_checkpoint(model, tmp_path / "apart", format="fp8_pb")
    for one in ("compiled", "apart"):
        assert_same(tensors(tmp_path / one), tensors(tmp_path / "plain"))


class Hook:
    """What is read of a hook of accelerate: it brings weights from elsewhere before a call."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights_map, self.offload, self.execution_device = weights, True, torch.device("cpu")


def test_offloaded_weights_are_fetched_one_by_one(models: dict, tmp_path: Path) -> None:
    model = loaded(models["qwen3_moe"])
    export_hf_checkpoint(model, tmp_path / "plain", format="fp8_pb")
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "layers.1." in name and own:
            module._hf_hook = Hook({leaf: weight.detach().clone() for leaf, weight in own.items()})
            for leaf in own:
                module._parameters[leaf] = nn.Parameter(own[leaf].detach().to("meta"))
    export_hf_checkpoint(model, tmp_path / "out", format="fp8_pb")
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))


def test_tensors_come_one_by_one_for_an_engine(models: dict, tmp_path: Path) -> None:
    for name, form in (("qwen3", "mxfp8"), ("llama4_vision", "bf16")):  # of which the vision tower is copied
        model = loaded(models[name], name)
        export_hf_checkpoint(model, tmp_path / name, format=form)
        plan = plan_hf_tensors(model, format=form)
        given = dict(iter_hf_tensors(model, plan=plan))
        assert_same(given, tensors(tmp_path / name))


def spoil(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


QUERY, KEY = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
BAD: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "on meta": (lambda model: model.to("meta"), "every parameter of the model is on the meta device"),
    "one on meta": (
        lambda model: spoil(model, f"{KEY}.weight", torch.empty(32, 64, device="meta")),
        "k_proj.weight is on the meta device: it has no numbers",
    ),
    "codes without scales": (
        lambda model: spoil(model, f"{KEY}.weight", torch.zeros(32, 64, dtype=torch.uint8)),
        "its quantizer has no _scale to multiply them with. Export before mtq.compress",
    ),
    "compressed int4": (
        lambda model: (
            spoil(model, f"{KEY}.weight", torch.zeros(32, 32, dtype=torch.uint8)),
            put(model, f"{KEY}.weight_quantizer", {"_num_bits": 4, "_disabled": False}, {"_scale": torch.ones(32, 1)}),
        ),
        "only NVFP4 and FP8 with one scale are read. Export before mtq.compress",
    ),
    "q and k differ": (
        lambda model: (quantize_all(model), quantize(model, QUERY, NVFP4)),
        "linears that engines fuse to several formats",
    ),
    "not quantized beside": (
        lambda model: (quantize_all(model), quantize(model, QUERY, FP8 | {"_disabled": True})),
        f"{QUERY} to bf16, {KEY} to fp8",
    ),
    "int8": (lambda model: quantize(model, QUERY, FP8 | {"_num_bits": 8}), "no format here does that"),
    "an adapter": (
        lambda model: model.model.layers[0].mlp.up_proj.register_parameter("lora_A", nn.Parameter(torch.ones(1))),
        "lora_A is of an adapter",
    ),
    "another tensor": (
        lambda model: model.register_parameter("value_head", nn.Parameter(torch.ones(1))),
        "has a tensor value_head that its config does not call for",
    ),
    "not a number": (
        lambda model: spoil(model, f"{KEY}.weight", torch.full((32, 64), torch.nan, dtype=torch.bfloat16)),
        "NaN or Inf in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_exported_is_refused_in_one_sentence(case: str, models: dict, tmp_path: Path) -> None:
    spoiled, message = BAD[case]
    model = loaded(models["llama31"])
    spoiled(model)
    quantized = any(isinstance(module, Quantizer) for module in model.modules())
    with pytest.raises(ExportError) as raised:
        export_hf_checkpoint(model, tmp_path / "out", **({} if quantized else {"format": "bf16"}))
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_in_the_background_writes_the_same(models: dict, tmp_path: Path) -> None:
    model = loaded(models["llama31"])
    export_hf_checkpoint(model, tmp_path / "waited", format="fp8_pb")
    handle = export_hf_checkpoint_async(model, tmp_path / "background", format="fp8_pb")
    del model
    handle.wait(timeout=100)
    assert contents(tmp_path / "background") == contents(tmp_path / "waited")
    assert (tmp_path / "background" / "tokenizer_config.json").is_file()


def test_options_that_mean_nothing_are_refused(models: dict, tmp_path: Path) -> None:
    model = loaded(models["llama31"])
    for options, message in (
        ({"dtype": torch.float16}, "dtype torch.float16"),
        ({"save_modelopt_state": True}, "save_modelopt_state must be False"),
        ({"merge_lora": True}, "merge_lora is for Megatron models"),
        ({"tokenizer": tmp_path / "nowhere"}, "no such folder"),
        ({"format": "fp8"}, "needs calibration"),
    ):
        with pytest.raises(ExportError, match=message):
            export_hf_checkpoint(model, tmp_path / "out", **({"format": "bf16"} | options))
    quantize_all(model)
    with pytest.raises(ExportError, match="format is 'nvfp4', but ModelOpt quantized this model to 'fp8'"):
        export_hf_checkpoint(model, tmp_path / "out", format="nvfp4")
