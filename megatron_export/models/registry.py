"""The table of architectures, by their name in config.json. docs/add-a-model.md shows how to add one."""

from ..common.errors import ExportError
from ..common.safe_files import shown
from . import (
    deepseek_v3,
    deepseek_v32,
    eagle3,
    gemma3,
    gemma3_vision,
    glm4_moe,
    glm_moe_dsa,
    gpt_oss,
    kimi_k25,
    llama,
    llama4,
    llama4_vision,
    medusa,
    minimax_m2,
    mistral,
    mistral3,
    mixtral,
    nemotron_h,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    qwen3_vl,
    qwen3_vl_moe,
)
from .architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": llama.ARCHITECTURE,
    "Qwen2ForCausalLM": qwen2.ARCHITECTURE,
    "Qwen3ForCausalLM": qwen3.ARCHITECTURE,
    "Qwen3MoeForCausalLM": qwen3_moe.ARCHITECTURE,
    "Qwen3NextForCausalLM": qwen3_next.ARCHITECTURE,
    "Qwen3_5ForCausalLM": qwen3_5.TEXT,
    "Qwen3_5MoeForCausalLM": qwen3_5.MOE_TEXT,
    "Qwen3_5ForConditionalGeneration": qwen3_5.DENSE,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5.MOE,
    "NemotronHForCausalLM": nemotron_h.ARCHITECTURE,
    "Qwen3VLForConditionalGeneration": qwen3_vl.ARCHITECTURE,
    "Qwen3VLMoeForConditionalGeneration": qwen3_vl_moe.ARCHITECTURE,
    "MistralForCausalLM": mistral.ARCHITECTURE,
    "Ministral3ForCausalLM": mistral.MINISTRAL,
    "Mistral3ForConditionalGeneration": mistral3.ARCHITECTURE,
    "Phi3ForCausalLM": phi3.ARCHITECTURE,
    "Gemma3ForCausalLM": gemma3.ARCHITECTURE,
    "Gemma3ForConditionalGeneration": gemma3_vision.ARCHITECTURE,
    "MiniMaxM2ForCausalLM": minimax_m2.ARCHITECTURE,
    "MixtralForCausalLM": mixtral.ARCHITECTURE,
    "DeepseekV3ForCausalLM": deepseek_v3.ARCHITECTURE,
    "KimiK25ForConditionalGeneration": kimi_k25.ARCHITECTURE,
    "DeepseekV32ForCausalLM": deepseek_v32.ARCHITECTURE,
    "GlmMoeDsaForCausalLM": glm_moe_dsa.ARCHITECTURE,
    "Glm4MoeForCausalLM": glm4_moe.ARCHITECTURE,
    "GptOssForCausalLM": gpt_oss.ARCHITECTURE,
    "Llama4ForCausalLM": llama4.ARCHITECTURE,
    "Llama4ForConditionalGeneration": llama4_vision.ARCHITECTURE,
}
DRAFTS: dict[str, Architecture] = {
    eagle3.NAME: eagle3.ARCHITECTURE,
    medusa.NAME: medusa.ARCHITECTURE,
}  # exported beside a model of those above

TOGETHER: dict[str, Architecture] = {
    medusa.beside(name): medusa.with_heads(ARCHITECTURES[name]) for name in medusa.BASES
}  # those of above that may be written with Medusa's heads in one folder


_OTHERS: dict[str, Architecture] = {}


def architecture_name(config: dict) -> str:
    """The first of config.json's `architectures`, "(none)" if it has none; `ExportError` if that is no list of names."""
    found = config.get("architectures") or ["(none)"]
    if not isinstance(found, list) or not isinstance(found[0], str):
        raise ExportError(f"config.json: architectures is {shown(found)}, not a list of names. Fetch it again")
    return found[0]


def known(config: dict) -> Architecture | None:
    """The table of config.json's architecture; None if it is unknown."""
    name = architecture_name(config)
    return ARCHITECTURES.get(name) or DRAFTS.get(name) or TOGETHER.get(name) or _OTHERS.get(name)


def learn(name: str, architecture: Architecture) -> None:
    """Know an architecture that is in no table from now on: that of a live model, read off its tensors."""
    _OTHERS[name] = architecture
