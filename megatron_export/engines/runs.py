"""What was seen in runs of the engines themselves, on a GPU or on a CPU: rules, and architectures in formats."""

from . import ENGINES
from .architectures import ARCHITECTURES

# nvfp4 with AWQ or without; fp8 and nvfp4 with KV scales
FORMATS = ("bf16", "fp8", "fp8_pb", "nvfp4", "KV scales", "mixes")
GPU, CPU, READ, UNWRITTEN = "GPU", "CPU", "read", "not written"
ON_GPU = {"vllm": "vLLM 0.25.1 on one H200", "sglang": "SGLang 0.5.17 on one H200"}
# Rules that a run on a GPU has shown.
_RULES: dict[str, tuple[str, ...]] = {
    "vllm": ("gpt_oss", "shared", "router"),
    "sglang": (
        *("algorithm", "old", "mixed joined", "llama blocks", "awq"),
        *("kv flag", "kv nvfp4", "window"),
    ),
}
_FIVE = FORMATS[:5]
_LATER = ("bf16", "fp8", "nvfp4", "mixes")
_THREE = FORMATS[:3]
# Architecture -> formats in which a GPU computed it, or the engine refused it there, as the rules say.
_MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        **dict.fromkeys(
            (
                *("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM"),
                *("Glm4MoeForCausalLM", "Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
            ),
            _FIVE,
        ),
        **dict.fromkeys(
            (
                *("MistralForCausalLM", "Phi3ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
                *("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
                *("KimiK25ForConditionalGeneration", "MiniMaxM2ForCausalLM"),
            ),
            _LATER,
        ),
        "Qwen3ForCausalLM": FORMATS,
        "DeepseekV3ForCausalLM": FORMATS[:4],
        "GptOssForCausalLM": ("bf16", "fp8", "nvfp4"),
        "NemotronHForCausalLM": _LATER[:3],
    },
    "sglang": {
        **dict.fromkeys(
            (
                *("Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "MixtralForCausalLM", "Glm4MoeForCausalLM"),
                *("MiniMaxM2ForCausalLM", "DeepseekV3ForCausalLM"),
            ),
            _THREE,
        ),
        **dict.fromkeys(("MistralForCausalLM", "Phi3ForCausalLM"), ("bf16", "fp8_pb")),
        "Gemma3ForCausalLM": ("bf16",),
        "LlamaForCausalLM": FORMATS[:4],
        "Qwen3ForCausalLM": FORMATS,
        "Qwen3VLForConditionalGeneration": FORMATS[:2],
        "Qwen3VLMoeForConditionalGeneration": FORMATS[:1],
        "Gemma3ForConditionalGeneration": FORMATS[:1],
    },
}
# On a CPU: of vLLM and SGLang every architecture, of TensorRT-LLM these, in every format (tests/engines/test_ENGINE.py).
ON_CPU = dict.fromkeys(("vllm", "sglang"), tuple(ARCHITECTURES)) | {
    "tensorrt_llm": (
        *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    )
}
PARTS = {"tensorrt_llm": "parts of its files "}  # of an engine that did not run as a whole
# What the exporter refuses, as no engine could use it.
_REFUSED = {
    ("GptOssForCausalLM", "fp8_pb"),
    ("DeepseekV3ForCausalLM", "KV scales"),
    ("DeepseekV32ForCausalLM", "KV scales"),
    ("GlmMoeDsaForCausalLM", "KV scales"),
    ("KimiK25ForConditionalGeneration", "KV scales"),
}


def seen_of(engine: str, rule: str, seen: bool) -> str:
    """Where a run of an engine has shown a rule that says of itself whether one has: GPU, CPU, or READ for nowhere."""
    return GPU if rule in _RULES.get(engine, ()) else CPU if seen else READ


def seen_in(engine: str, architecture: str, form: str) -> str:
    """The same of an architecture in one of FORMATS; UNWRITTEN for what the exporter refuses."""
    if (architecture, form) in _REFUSED:
        return UNWRITTEN
    if form in _MODELS.get(engine, {}).get(architecture, ()):
        return GPU
    if not getattr(ARCHITECTURES[architecture], engine).read:
        return "not known"
    return CPU if architecture in ON_CPU[engine] else READ


def coverage(engine: str) -> list[str]:
    """A line for each architecture: where it was seen in which formats."""
    lines = []
    for architecture in ARCHITECTURES:
        by: dict[str, list[str]] = {}
        for form in FORMATS:
            by.setdefault(seen_in(engine, architecture, form), []).append(form)
        lines.append(f"{architecture}: " + "; ".join(f"{how} {', '.join(forms)}" for how, forms in by.items()))
    return lines


def table() -> list[str]:
    """The same of all engines as the lines of a table, a row for each architecture."""
    rows = [("architecture", *FORMATS), *(("---",) * 7,)]
    for architecture in ARCHITECTURES:
        found = [[seen_in(engine, architecture, form) for engine in ENGINES] for form in FORMATS]
        rows.append((architecture, *(UNWRITTEN if UNWRITTEN in cell else ", ".join(cell) for cell in found)))
    return [f"| {' | '.join(row)} |" for row in rows]
