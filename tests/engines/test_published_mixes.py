"""Mixed checkpoints of NVIDIA's: their sections as published, and the same formats in an architecture with rules.

`golden/configs` has what config.json and hf_quant_config.json say of quantization, of two or three layers and two experts.
"""

import copy
import re

import pytest

from megatron_export.engines import ENGINES, CheckpointView, Header, verdict_of
from megatron_export.planning.engine_check import expected_of

from ..support.configs import LLAMA, QWEN, QWEN_MOE
from ..support.models import GOLDEN, read_json
from ..support.published import coded

PUBLISHED = {path.stem: read_json(path) for path in sorted((GOLDEN / "configs").glob("*.json"))}
TEXT = (r"model\.language_model\.", "model."), (r"layers\.3\.", "layers.1.")
MIXER = (
    *(
        (r"^backbone\.layers\.[01]\.mixer\.experts", "model.layers.0.mlp.experts"),
        (r"layers\.5\.mixer", "layers.1.self_attn"),
    ),
    *((r"^backbone\.layers\.0\.mixer\.out_proj", "model.layers.0.self_attn.o_proj"), (r"^backbone", "model")),
)
MINIMAX = (
    *((r"^language_model\.", ""), (r"layers\.3\.", "layers.1."), (r"block_sparse_moe", "mlp")),
    *((r"\.w1$", ".gate_proj"), (r"\.w2$", ".down_proj"), (r"\.w3$", ".up_proj")),
)
V4 = (r"^layers", "model.layers"), (r"ffn", "mlp"), (r"\.attn\.", ".self_attn."), (r"^head$", "lm_head")
# The checkpoint, what becomes of its names, in which model, the suffix of MXFP8's scales, vLLM's release, and all that vLLM, SGLang
# and TensorRT-LLM find.
CASES = {
    "Qwen3.6-27B in Qwen 3": ("Qwen3.6-27B", TEXT, QWEN, "", "0.32", "", "mixed joined", "machine"),
    "Qwen3.6-27B in Llama": ("Qwen3.6-27B", TEXT, LLAMA, "", "0.32", "", "mixed joined", "machine"),
    "Qwen3.6-35B-A3B in Qwen 3 MoE": (
        *("Qwen3.6-35B-A3B", TEXT, QWEN_MOE, "", "0.32"),
        *("", "", "two configs, machine"),  # SGLang takes the KV cache from the file
    ),
    "MiniMax-M3 in Qwen 3 MoE": (
        *("MiniMax-M3", MINIMAX, QWEN_MOE, "weight_scale_inv", "0.32"),
        *("scale, extra", "", "scale, extra, two configs, machine"),
    ),
    "MiniMax-M3 in Qwen 3 MoE, scales named as ModelOpt does": (
        *("MiniMax-M3", MINIMAX, QWEN_MOE, "weight_scale", "0.32"),
        *("", "scale, extra", "two configs, machine"),
    ),
    "Nemotron 3.5 in Qwen 3 MoE": (
        "Nemotron-3.5-Lightning-30B-A3B",
        MIXER,
        QWEN_MOE,
        "",
        "0.32",
        "config",
        "",
        "machine",
    ),
    "Nemotron 3.5 in Qwen 3 MoE, later": (
        *("Nemotron-3.5-Lightning-30B-A3B", MIXER, QWEN_MOE, "", "0.33"),
        *("", "", "machine"),
    ),
    "DeepSeek V4 in Qwen 3 MoE": (
        *("DeepSeek-V4", V4, QWEN_MOE, "", "0.32"),
        *("dtype, scale, extra", "", "left out, machine"),
    ),
}


def sections(said: dict) -> list[dict]:
    """Those of config.json, if it has one, and of hf_quant_config.json."""
    flat = said["config"].get("quantization_config")
    return [*filter(None, [flat]), said["quant"]["quantization"]]


def algorithm_of(module: str, layers: dict[str, dict], beside: str) -> str:
    """As a section means it: of the module, or of the experts that hold it; `beside` if it is not listed."""
    container = f"{module.partition('.experts.')[0]}.experts"
    found = next((one for name, one in layers.items() if name == module), None)
    of_experts = (one for name, one in layers.items() if name == container or name.startswith(f"{container}."))
    if found is None and ".experts." in module:
        found = next(of_experts, None)
    return found["quant_algo"] if found else beside


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_architecture_without_rules_is_not_known(name: str) -> None:
    said = PUBLISHED[name]
    layers = sections(said)[-1]["quantized_layers"]
    modules = [
        f"{module}.0.{part}" if module.endswith("experts") else module
        for module in layers
        for part in (("w1", "w2", "w3") if module.endswith("experts") else ("",))
    ]
    held = {"model.norm.weight": Header("BF16", (128,))}
    for module in modules:
        tensors = coded(256, 128, algorithm_of(module, layers, ""))
        held |= {f"{module}.{suffix}": header for suffix, header in tensors.items()}
    checkpoint = CheckpointView(
        said["config"], said["quant"], {"model.safetensors": held}, None, *expected_of(said["config"])
    )
    for engine in ENGINES:
        verdict = verdict_of(checkpoint, engine)
        [finding] = verdict.findings
        assert (finding.rule, verdict.loads) == ("architecture", None)


@pytest.mark.parametrize("case", CASES)
def test_the_same_formats_in_an_architecture_with_rules(case: str) -> None:
    name, renames, like, mx_scale, release, *rules = CASES[case]
    said = copy.deepcopy(PUBLISHED[f"{name}-NVFP4"])
    config = like | {"num_hidden_layers": 2}
    expected, _ = expected_of(config)
    modules = {tensor.removesuffix(".weight") for tensor in expected}
    modules |= {f"{module.partition('.experts.')[0]}.experts" for module in modules if ".experts." in module}

    def renamed(text: str) -> str:
        for pattern, into in renames:
            text = re.sub(pattern, into, text)
        return text

    for section in sections(said):
        for key in {"ignore", "exclude_modules"} & section.keys():
            section[key] = [new for one in section[key] if (new := renamed(one)) in modules or "*" in new]
        layers = {renamed(one): entry for one, entry in section["quantized_layers"].items()}
        section["quantized_layers"] = {one: entry for one, entry in layers.items() if one in modules}
        assert section["quantized_layers"]
    layers = sections(said)[-1]["quantized_layers"]
    beside = "blocks" if sections(said)[0].get("quant_method") == "fp8" else ""
    held: dict[str, Header] = {}
    for tensor, shape in expected.items():
        module = tensor.removesuffix(".weight")
        algorithm = algorithm_of(module, layers, beside if module.endswith("_proj") else "")
        tensors = coded(*shape, algorithm, mx_scale) if algorithm else {"weight": Header("BF16", shape)}
        held |= {f"{module}.{suffix}": header for suffix, header in tensors.items()}
    words = said["config"] | {"architectures": config["architectures"]}
    view = CheckpointView(config | words, said["quant"], {"model.safetensors": held}, None, expected)
    found = [verdict_of(view, engine, release if engine == "vllm" else None).findings for engine in ENGINES]
    assert [", ".join(dict.fromkeys(one.rule for one in of_engine)) for of_engine in found] == rules
