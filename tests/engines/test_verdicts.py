"""Verdicts on checkpoints of the field: dialects and models without rules, KV scales, dual chunks, one part of latent attention."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_export.engines import ENGINES, CheckpointView, Effect, Verdict, verdict_of
from megatron_export.planning.engine_check import of_folder, verdicts

from ..support.checkpoints import (
    FP8,
    FP8_KV,
    NVFP4,
    Said,
    configured,
    damaged,
    described,
    golden,
    losing,
    not_leaving_out,
    planned,
    written,
)
from ..support.command_line import command_line
from ..support.configs import LLAMA, SMALL_V3
from ..support.models import make_model, tensors


def found(checkpoint: CheckpointView) -> list[list[str]]:
    """The rules that each engine finds."""
    return [[finding.rule for finding in verdict_of(checkpoint, engine).findings] for engine in ENGINES]


def say_compressed_tensors(said: Said) -> None:
    """As llm-compressor writes NVFP4: codes are called weight_packed, and there is no hf_quant_config.json."""
    [held] = said["files"].values()
    for name in [name for name in held if name.endswith(".weight_scale_2")]:
        module = name.removesuffix(".weight_scale_2")
        held[f"{module}.weight_packed"] = held.pop(f"{module}.weight")
        held[f"{module}.weight_global_scale"], held[f"{module}.input_global_scale"] = held.pop(name), ["F32", [1]]
        del held[f"{module}.input_scale"]
    said["config"]["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}
    said["quant"] = None


def say_mxfp4(said: Said) -> None:
    """As OpenAI's own files have it: a dialect without rules, whose experts no rule knows."""
    [held] = said["files"].values()
    held["model.layers.0.mlp.experts.gate_up_proj_blocks"] = ["U8", [2, 64, 1, 16]]
    held["model.layers.0.mlp.experts.gate_up_proj_scales"] = ["U8", [2, 64, 1]]
    said["config"]["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    said["quant"] = None


@pytest.mark.parametrize("change", [say_compressed_tensors, say_mxfp4])
def test_a_dialect_without_rules_is_not_known_and_nothing_else(change: Callable[[Said], None], tmp_path: Path) -> None:
    said = golden(NVFP4)
    change(said)
    assert found(described(said)) == [["another"]] * 3
    status, text = command_line("check", written(said, tmp_path / "checkpoint"))
    lines, method = text.splitlines(), said["config"]["quantization_config"]["quant_method"]
    assert status == 1
    assert [line.partition(": ")[2] for line in lines[::2]] == ["not known:"] * 3
    assert lines[1::2] == [f"    no rules about quant_method {method}"] * 3


def test_an_architecture_without_rules_is_not_known_whatever_else_is_found() -> None:
    said = golden(FP8)
    for change in (
        configured(architectures=["NobodysForCausalLM"]),
        losing("model.norm.weight"),
        not_leaving_out("lm_head"),
    ):
        change(said)
    assert found(described(said)) == [["architecture"]] * 3
    assert {verdict_of(described(said), engine).effect for engine in ENGINES} == {Effect.UNKNOWN}


def test_an_embedding_model_is_not_known_and_named_as_one(tmp_path: Path) -> None:
    source = make_model(tmp_path, "qwen3")
    held = {name.removeprefix("model."): tensor for name, tensor in tensors(source).items() if "lm_head" not in name}
    save_file({name: tensor.clone() for name, tensor in held.items()}, source / "model.safetensors")
    for verdict in verdicts(of_folder(source)).values():
        assert verdict.loads is None
        assert verdict.text.startswith("not known: no rules about an embedding model: its tensors have no 'model.'")


def judged(said: Said, engine: str = "vllm") -> Verdict:
    return verdict_of(described(said), engine)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_cache_has_one_scale_for_keys_and_one_for_values_or_none(engine: str) -> None:
    assert judged(golden(FP8_KV), engine).text == "loads"
    wide = judged(damaged("a cache scale for each head"), engine)
    assert wide.loads is False
    assert "model.layers.0.self_attn.k_proj.k_scale and 3 more: it is [4], and the engine takes one number" in wide.why
    values = judged(damaged("no scales of keys"), engine)
    assert values.loads is False
    assert "model.layers.0.self_attn and 1 more: it has a v_scale and no k_scale" in values.why
    keys = judged(damaged("no scales of values"), engine)
    assert keys.effect is Effect.LOSES
    assert "the scale of the keys is taken for the values too" in keys.why


def test_scales_of_a_cache_may_have_a_dim_of_one() -> None:
    said = golden(FP8_KV)
    for name, header in next(iter(said["files"].values())).items():
        header[1] = [1] if name.endswith(("k_scale", "v_scale")) else header[1]
    assert [verdict_of(described(said), engine).text for engine in ("vllm", "sglang")] == ["loads"] * 2
    assert [finding.rule for finding in verdict_of(described(said), "tensorrt_llm").findings] == ["kv fp8"]


def test_dual_chunks_are_refused_in_bfloat16_too_where_the_engine_builds_them() -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    chunks = {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}}
    without = planned(qwen, format="bf16")
    within = planned(qwen | chunks, format="bf16")
    assert found(without) == [[], [], []]
    assert found(within) == [["chunks"], ["chunks"], []]
    assert "take dual_chunk_attention_config out of config.json" in verdict_of(within, "vllm").why
    assert found(planned(LLAMA | chunks, format="bf16")) == [[], [], []]  # whose models never look at it


ATTENTION = "model.layers.{}.self_attn"


def test_tensorrt_llm_treats_two_projections_of_latent_attention_specially_and_loads_the_others() -> None:
    def left_alone(*parts: str) -> Verdict:
        layers = range(SMALL_V3["num_hidden_layers"] + SMALL_V3.get("num_nextn_predict_layers", 0))
        exclude = tuple(f"{ATTENTION.format(layer)}.{part}" for layer in layers for part in parts)
        checkpoint = planned(SMALL_V3, format="nvfp4", quantize_mla=True, exclude=exclude)
        return verdict_of(checkpoint, "tensorrt_llm")

    q_a, q_b, kv_a, kv_b = "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"
    assert left_alone(q_a, q_b, kv_a, kv_b).loads  # o_proj alone is quantized, as in published checkpoints
    assert left_alone(kv_b).loads
    assert "it loads kv_b_proj in bfloat16 or blocks of FP8 alone" in left_alone(q_a, kv_a).why
    per_tensor = verdict_of(planned(SMALL_V3, format="fp8", quantize_mla=True), "tensorrt_llm")
    assert "it loads kv_a_proj_with_mqa in bfloat16, blocks of FP8 or NVFP4 alone" in per_tensor.why


def test_no_file_at_all_is_no_checkpoint(tmp_path: Path) -> None:
    folder = written(golden(FP8), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    status, text = command_line("check", folder)
    assert (status, text) == (1, f"error: {folder}: no .safetensors file. Give the folder that has the weights")


def test_adapters_of_peft_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}')
    save_file({"base_model.model.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    status, text = command_line("check", tmp_path)
    assert status == 1
    assert text.startswith(f"error: {tmp_path} has PEFT adapters for 'meta-llama/Llama-3.1-8B' (adapter_config.json)")
