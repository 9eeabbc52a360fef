"""What is offered for a misspelt word: what differs by a few letters, and nothing that is another thing."""

import pytest

from megatron_export.common.errors import ExportError
from megatron_export.common.text import near
from megatron_export.formats import FORMATS
from megatron_export.models import ARCHITECTURES, architecture_of


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("nvfp", "nvfp4"),
        ("fp4", "nvfp4"),
        ("int4", "int4_awq"),
        ("fp8_bp", "fp8_pb"),
        ("FP8", "fp8"),
        ("bf15", "bf16"),
        ("gptq", None),
        ("marlin", None),
        ("float32", None),
        ("", None),
        ("x" * 10**6, None),
    ],
)
def test_a_format(word: str, meant: str | None) -> None:
    assert near(word, FORMATS) == meant


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LlamaForCausalLm", "LlamaForCausalLM"),
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("Qwen3MoeForCasualLM", "Qwen3MoeForCausalLM"),
        ("GlmMoeForCausalLM", "Glm4MoeForCausalLM"),
        ("MinistralForCausalLM", None),
        ("PhiForCausalLM", None),
        ("Qwen2MoeForCausalLM", None),
        ("Qwen4ForCausalLM", None),
        ("Glm4ForCausalLM", None),
        ("DeepseekV2ForCausalLM", None),
        ("Llama5ForCausalLM", None),
        ("GPT2LMHeadModel", None),
        ("GemmaForCausalLM", None),
    ],
)
def test_an_architecture(name: str, meant: str | None) -> None:
    assert name not in ARCHITECTURES
    with pytest.raises(ExportError) as caught:
        architecture_of({"architectures": [name]})
    said = str(caught.value)
    assert (f"Did you mean {meant!r}?" in said) if meant else ("Did you mean" not in said)
