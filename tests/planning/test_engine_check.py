"""What engines are told to make of a plan, before anything is written: whether each loads it, and what to mind."""

import pytest

from megatron_export.formats import Options
from megatron_export.planning.engine_check import of_plan, verdicts

from ..support.configs import LLAMA, LLAMA4, LLAMA4_SEES, MIXTRAL, QWEN, QWEN_MOE, SMALL_V3
from ..support.plans import plan_of

YES, NO = True, False


@pytest.mark.parametrize(
    ("config", "settings", "loads"),  # by vLLM, SGLang, TensorRT-LLM
    [
        (LLAMA, {"format": "bf16"}, (YES, YES, YES)),
        (LLAMA, {"format": "fp8", "kv_cache": "fp8"}, (YES, YES, YES)),
        (QWEN, {"format": "fp8_pb"}, (YES, YES, YES)),
        (LLAMA, {"format": "fp8_pb"}, (YES, NO, YES)),  # SGLang's Llama loses weight_scale_inv
        (QWEN | {"num_key_value_heads": 2}, {"format": "fp8_pb"}, (NO, NO, YES)),  # k and v have 64 rows
        (LLAMA, {"format": "fp8_pb", "options": Options(fp8_pb_spelling="modelopt")}, (YES, NO, YES)),
        (LLAMA, {"format": "nvfp4"}, (YES, YES, YES)),
        (LLAMA, {"format": "nvfp4_awq"}, (YES, YES, YES)),
        (LLAMA, {"format": "nvfp4_awq", "options": Options(awq_output="modelopt")}, (NO, NO, YES)),
        (LLAMA, {"format": "int4_awq"}, (NO, NO, YES)),
        (LLAMA, {"format": "w4a8_awq"}, (NO, NO, YES)),
        (MIXTRAL, {"format": "fp8", "kv_cache": "fp8"}, (YES, YES, YES)),
        (QWEN_MOE, {"format": "nvfp4", "kv_cache": "fp8"}, (YES, YES, YES)),
        (SMALL_V3, {"format": "nvfp4"}, (YES, YES, YES)),
        (SMALL_V3, {"format": "fp8", "quantize_mla": True}, (YES, YES, NO)),
        (SMALL_V3, {"format": "nvfp4", "quantize_mla": True}, (YES, NO, NO)),
        (LLAMA4_SEES, {"format": "fp8"}, (YES, YES, YES)),
        (LLAMA4_SEES, {"format": "nvfp4"}, (YES, NO, YES)),
        (LLAMA4_SEES, {"format": "fp8_pb"}, (YES, YES, NO)),
        (LLAMA4, {"format": "fp8"}, (YES, NO, NO)),  # experts one by one in a model that does not see
        (LLAMA4, {"format": "fp8_pb"}, (YES, NO, NO)),
        (LLAMA4, {"format": "int4_awq"}, (NO, NO, NO)),
    ],
)
def test_engines(config: dict, settings: dict, loads: tuple) -> None:
    plan = plan_of(config, **settings)
    found = verdicts(of_plan(plan))
    assert tuple(verdict.loads for verdict in found.values()) == loads
    assert all(verdict.why for verdict in found.values() if not verdict.loads)


def test_what_to_mind_is_told_with_the_engine() -> None:
    plan = plan_of(LLAMA, format="nvfp4", kv_cache="nvfp4")
    assert {engine: verdict.text for engine, verdict in verdicts(of_plan(plan)).items()} == {
        "vLLM": "loads: its NVFP4 KV cache with FlashInfer only",
        "SGLang": "loads: its KV cache is in bfloat16, or in NVFP4 with --kv-cache-dtype nvfp4 on Blackwell",
        "TensorRT-LLM": "loads: on Blackwell",
    }
    plan = plan_of(QWEN_MOE, format="fp8_pb", kv_cache="fp8")
    assert verdicts(of_plan(plan))["SGLang"].text == (
        "loads but: ignores the scales of this architecture's KV cache; its FP8 KV cache with --kv-cache-dtype fp8_e4m3"
    )
