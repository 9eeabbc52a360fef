"""Which tensor-parallel sizes an engine can serve a checkpoint at, by its shapes: of models that people do serve on many GPUs."""

import pytest

from megatron_export.engines import ENGINES, Effect, Verdict, targets_in, verdict_of
from megatron_export.planning.engine_check import of_plan, refusals, verdicts

from ..support import configs
from ..support.checkpoints import planned
from ..support.configs import LLAMA4, MIXTRAL, PHI3, QWEN, QWEN_MOE, SMALL_V3
from ..support.plans import plan_of

LLAMA_70B = configs.LLAMA_70B | {"num_hidden_layers": 6, "vocab_size": 1000}
QWEN_72B = LLAMA_70B | {"architectures": ["Qwen2ForCausalLM"], "intermediate_size": 29568}
QWEN_30B_A3B = QWEN_MOE | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
PHI3_MEDIUM = PHI3 | {
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "intermediate_size": 640,
}
QWEN_SMALL = QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}


def found(config: dict, form: str, tp: int, engine: str = "vllm", **settings: object) -> Verdict:
    return verdict_of(planned(config, format=form, **settings), engine, tp=tp)


@pytest.mark.parametrize(
    ("config", "form", "sizes"),
    [
        pytest.param(LLAMA_70B, "fp8_pb", {2, 4, 8, 16, 32}, id="70b-fp8_pb"),
        pytest.param(LLAMA_70B, "nvfp4", {2, 4, 8, 16, 32, 64}, id="70b-nvfp4"),
        pytest.param(QWEN_72B, "bf16", {2, 4, 8, 16, 32, 64}, id="72b-bf16"),
        pytest.param(QWEN_72B, "fp8", {2, 4, 8, 16, 32, 64}, id="72b-fp8"),
        pytest.param(QWEN_72B, "fp8_pb", set(), id="72b-fp8_pb"),  # 29568 is 231 blocks
        pytest.param(QWEN_72B, "nvfp4", {2, 4, 8}, id="72b-nvfp4"),  # and 1848 groups
        pytest.param(QWEN_30B_A3B, "fp8_pb", {2}, id="30b-a3b-fp8_pb"),  # an expert is 6 blocks wide
        pytest.param(QWEN_30B_A3B, "nvfp4", {2, 4, 8, 16}, id="30b-a3b-nvfp4"),
        pytest.param(QWEN_SMALL, "bf16", {2}, id="14-heads"),  # of keys 2; 4864 is not 14 times anything
        pytest.param(SMALL_V3, "nvfp4", {2, 4, 8}, id="latent"),
        pytest.param(SMALL_V3, "fp8_pb", set(), id="latent-fp8_pb"),
        pytest.param(PHI3_MEDIUM, "bf16", {2, 5}, id="joined-bf16"),
        pytest.param(PHI3_MEDIUM, "fp8_pb", {5}, id="joined-fp8_pb"),  # gate and up are five blocks each
        pytest.param(MIXTRAL | {"hidden_size": 1024}, "fp8_pb", {2, 4}, id="mixtral-fp8_pb"),
    ],
)
def test_sizes_at_which_each_gpu_has_whole_blocks_and_groups(config: dict, form: str, sizes: set[int]) -> None:
    candidates = (2, 3, 4, 5, 7, 8, 14, 16, 32, 64, 128)
    assert found(config, form, 1).loads
    assert {tp for tp in candidates if found(config, form, tp).loads} == sizes


def test_every_engine_says_what_a_gpu_would_have_and_what_would_do() -> None:
    why = "at a tensor-parallel size of 8 a GPU has 96 of its 768 rows, no multiple of 128"
    way = "(a size of 2 would do, or expert parallelism, or --format fp8)"
    for engine in ENGINES:
        verdict = found(QWEN_30B_A3B, "fp8_pb", 8, engine)
        assert verdict.effect is Effect.REFUSES
        assert f"model.layers.0.mlp.experts.0.gate_proj and 95 more: {why} {way}" in verdict.why, verdict.why
    heads = "it cannot deal out 14 heads, of keys 2 (a size of 2 would do)"
    assert found(QWEN_SMALL, "bf16", 4).why == f"at a tensor-parallel size of 4 {heads}"
    inputs = "a GPU has 3696 of its 29568 inputs, no multiple of 128 (no smaller size would do, or --format fp8)"
    assert inputs in found(QWEN_72B, "fp8_pb", 8).why


def test_what_is_left_in_bfloat16_has_no_blocks() -> None:
    assert not found(QWEN_72B, "fp8_pb", 8).loads
    assert found(QWEN_72B, "fp8_pb", 8, exclude=("*.mlp.*",)).loads


def test_experts_in_one_tensor_are_not_looked_at() -> None:
    assert found(LLAMA4, "bf16", 4).loads


def test_a_target_may_have_a_size() -> None:
    assert targets_in("vllm:8, tensorrt-llm") == {"vllm": 8, "tensorrt_llm": 1}
    with pytest.raises(ValueError, match="'vllm:x': 'x' is no tensor-parallel size. Write vllm:8 for eight GPUs"):
        targets_in("vllm:x")
    for odd in ("vllm:", "vllm:0", "vllm:-1", "vllm:²"):
        with pytest.raises(ValueError, match="is no tensor-parallel size"):
            targets_in(odd)
    wide = plan_of(QWEN_30B_A3B, format="fp8_pb")
    assert refusals(wide, "vllm,sglang:2") == []
    [refusal] = refusals(wide, "vllm:4,sglang")
    assert refusal.startswith("--target: vLLM will not load this: ") and "a GPU has 192 of its 768 inputs" in refusal
    assert verdicts(of_plan(wide), ["vllm"], tp=4)["vLLM"].why in refusal
