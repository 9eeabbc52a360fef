"""What an original is taken for: quantized or not, adapters, an embedding model, one with more layers than config.json says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from megatron_export.checkpoint.hf_folder import read_config
from megatron_export.checkpoint.original import config_alone
from megatron_export.common.errors import ExportError

from ..export.test_topologies import export
from ..support.command_line import command_line
from ..support.models import add_mtp, assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import configured, rewritten
from ..support.saving import saved_model

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
AWQ = {"quant_method": "awq", "bits": 4}


def refusal(call: Callable, *given: object, **settings: object) -> str:
    with pytest.raises(ExportError) as caught:
        call(*given, **settings)
    return str(caught.value)


@pytest.fixture
def openai(models: dict[str, Path], tmp_path: Path) -> Path:
    """GPT-OSS with OpenAI's own config.json, which speaks of MXFP4, and no weights beside it."""
    folder = tmp_path / "openai"
    folder.mkdir()
    shutil.copy(models["gpt_oss"] / "config.json", folder)
    configured(quantization_config=MXFP4)(folder)
    return folder


NOTE = "config.json says quant_method '{}': that is left out, as it speaks of weights that are not read"


def test_a_plan_without_weights_leaves_out_what_config_json_says_of_a_dialect_that_is_not_read(openai: Path) -> None:
    read = config_alone(openai, "keep", own=True)
    assert read.config["quantization_config"] == MXFP4  # which an export would read
    stacks = ("gate_up_proj", "down_proj")
    assert read.powers == {f"model.layers.{layer}.mlp.experts.{stack}" for layer in range(4) for stack in stacks}
    configured(quantization_config=AWQ)(openai)
    status, said = command_line("plan", "--hf-model", openai, "--format", "bf16")
    assert status == 0, said
    assert NOTE.format("awq") in said
    assert "quantization_config" not in config_alone(openai, "keep", own=True).config


def test_so_does_an_export_whose_weights_come_from_megatron(
    openai: Path, models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """With HF's own quantized weights beside config.json, too."""
    ranks.call(1, saved_model, models["gpt_oss"], tmp_path / "megatron", {})
    (openai / "model.safetensors").write_bytes(b"never opened")
    flags = ("--megatron-checkpoint", tmp_path / "megatron", "--hf-model", openai, "--format", "bf16")
    said = export(ranks, 1, *flags, "--output", tmp_path / "out")
    assert NOTE.format("mxfp4") in said
    assert_same(tensors(tmp_path / "out"), tensors(models["gpt_oss"]))
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


def test_quantized_weights_that_would_be_read_are_refused_by_plan_in_the_words_of_the_export(
    openai: Path, models: dict
) -> None:
    shutil.copy(models["gpt_oss"] / "model.safetensors", openai)
    configured(quantization_config=AWQ)(openai)
    said = f"{openai} is quantized already (quant_method 'awq'); give the original model"
    assert command_line("plan", "--hf-model", openai, "--format", "bf16") == (1, f"error: {said}")
    assert refusal(config_alone, openai, "keep", weights=True, own=True) == said


def test_hf_quant_config_alone_says_that_weights_are_quantized(source: Path) -> None:
    """Older releases of ModelOpt write no quantization_config into config.json."""
    file = source / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}))
    said = f"{source} is quantized already (hf_quant_config.json says 'FP8'); give the original model"
    assert command_line("plan", "--hf-model", source) == (1, f"error: {said}")
    assert refusal(read_config, source) == said
    file.write_text(json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}))
    read_config(source)  # a cache alone is no claim about weights
    file.write_text("{")
    assert refusal(read_config, source).startswith(f"{file}: not JSON (")


def test_an_unknown_architecture_is_said_before_quantized_already(source: Path) -> None:
    configured(architectures=["Cohere2ForCausalLM"], quantization_config={"quant_method": "awq"})(source)
    assert refusal(read_config, source).startswith(
        "unknown architecture 'Cohere2ForCausalLM' in config.json. Known: Llama"
    )


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN"])
def test_a_key_that_is_not_read_may_be_infinite(value: str, source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", f'{{"time_step_limit": [0.0, {value}],', 1))
    assert command_line("plan", "--hf-model", source, "--format", "bf16")[0] == 0
    assert read_config(source)["time_step_limit"][0] == 0.0
    (source / "config.json").write_text(text.replace('"rms_norm_eps": ', f'"rms_norm_eps": {value}, "not_ours": '))
    assert "rms_norm_eps is" in refusal(config_alone, source, "keep", own=True)


def test_adapters_of_peft_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.1-8B", "r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    said = f"{tmp_path} has PEFT adapters for 'meta-llama/Llama-3.1-8B' (adapter_config.json), and no model. Merge them"
    assert refusal(config_alone, tmp_path, "keep", own=True).startswith(said)
    (tmp_path / "config.json").write_text("{}")
    assert refusal(config_alone, tmp_path, "keep", own=True).startswith(said)
    assert command_line("verify", tmp_path, "--reference", tmp_path)[1].startswith(f"error: {said}")


def without_head(held: dict[str, Tensor]) -> None:
    inner = {name.removeprefix("model."): tensor for name, tensor in held.items() if name != "lm_head.weight"}
    held.clear()
    held.update(inner)


def test_an_embedding_model_is_named_for_what_it_is(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    rewritten(without_head)(source)
    flags = ("--hf-model", source, "--format", "bf16", "--output", tmp_path / "out")
    [(status, said)] = ranks.call(1, command_on_cpu, *flags)
    assert status == 1
    assert said.strip().startswith(
        f"error: {source} is an embedding model: its tensors have no 'model.' before their names"
    )
    configured(architectures=["Qwen3Model"])(source)
    assert "It ends before its output layer, as embedding models do" in refusal(read_config, source)


def command_on_cpu(*flags: object) -> tuple[int, str]:
    from ..support.ranks import command

    return command("--device", "cpu", *flags)


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer that predicts one more token in the files, of which config.json does not speak."""
    folder = make_model(tmp_path_factory.mktemp("beyond"), "glm4_moe")
    add_mtp(folder)
    configured(num_nextn_predict_layers=0)(folder)
    return folder


def test_layers_that_only_the_files_have_are_dropped_where_that_is_asked_for(
    beyond: Path, ranks: Ranks, tmp_path: Path
) -> None:
    flags = ("--hf-model", beyond, "--format", "bf16", "--output", tmp_path / "out")
    [(status, said)] = ranks.call(1, command_on_cpu, *flags)
    assert status == 1
    assert "these files have layers that predict one more token, which config.json does not mean: --mtp drop" in said
    export(ranks, 1, *flags, "--mtp", "drop")
    kept = {name: tensor for name, tensor in tensors(beyond).items() if not name.startswith("model.layers.4.")}
    assert_same(tensors(tmp_path / "out"), kept)


def test_what_is_no_such_layer_is_not_dropped(source: Path) -> None:
    """A model cut short by a wrong config.json must not lose layers without a word."""
    configured(num_hidden_layers=3)(source)
    assert config_alone(source, "drop", weights=True, own=True).dropped == ()


def test_settings_that_no_model_has_are_refused_by_plan_too(openai: Path) -> None:
    configured(layer_types=["other"] * 4)(openai)
    status, said = command_line("plan", "--hf-model", openai, "--format", "bf16")
    assert status == 1
    assert "not 'full_attention' or 'sliding_attention' for each of num_hidden_layers 4" in said


def test_a_folder_with_adapters_beside_a_whole_model_is_that_model(source: Path) -> None:
    (source / "adapter_config.json").write_text("{}")
    config_alone(source, "keep", weights=True, own=True)
    save_file({}, source / "adapter_model.safetensors")
    config_alone(source, "keep", weights=True, own=True)
