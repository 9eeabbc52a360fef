"""GlmMoeDsaForCausalLM: GLM 5. As DeepSeek V3.2; from 5.2 on only some layers have an indexer."""

from dataclasses import replace

from . import deepseek_v32

ARCHITECTURE = replace(deepseek_v32.ARCHITECTURE, model_type="glm_moe_dsa", unsaid=("indexer_rope_interleave",))
