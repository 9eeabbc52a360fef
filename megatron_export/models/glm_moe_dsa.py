"""GlmMoeDsaForCausalLM: GLM 5. As DeepSeek V3.2; from 5.2 on only some layers have an indexer."""

from . import deepseek_v32

ARCHITECTURE = deepseek_v32.ARCHITECTURE
