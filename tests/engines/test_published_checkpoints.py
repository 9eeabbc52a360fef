"""What `check` says of published quantized checkpoints: every config, list of modules and layer as published, files without data.

Publishers say that vLLM, SGLang and TensorRT-LLM, or some of them, serve these: a refusal is a mistake of ours, unless named here.
"""

import json
import os
from pathlib import Path

import pytest

from megatron_export.planning.engine_check import of_folder, verdicts

from ..support.published import published, write

LOADS = ("", "", "")
FP4 = ("", "", "machine")
FP4_CACHED = ("", "", "kv fp8, machine")  # with scales of an FP8 cache
UNKNOWN = ("architecture",) * 3
UNKNOWN_PACKED = ("architecture, another",) * 3
SEES = ("", "", "sees")
# All that vLLM, SGLang and TensorRT-LLM find.
VERDICTS = {
    **dict.fromkeys(("MiniMaxAI/MiniMax-M2.5", "MiniMaxAI/MiniMax-M2.7"), LOADS),
    **dict.fromkeys(("Qwen/Qwen3-235B-A22B-FP8", "Qwen/Qwen3-30B-A3B-FP8", "Qwen/Qwen3-32B-FP8"), LOADS),
    "Qwen/Qwen3.8-2.4T-A95B-FP8": LOADS,
    # vLLM 0.32: "Model quantization method is not specified in the config."
    "Qwen/Qwen3-32B-FP8-Static-PerTensor": ("dialect", "kv ignored", "kv fp8"),
    **dict.fromkeys(("deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2"), LOADS),
    **dict.fromkeys((f"zai-org/GLM-{version}-FP8" for version in ("5", "5.1", "5.2", "5.3")), LOADS),
    "moonshotai/Kimi-K2-Instruct": LOADS,
    **dict.fromkeys(("openai/gpt-oss-20b", "openai/gpt-oss-120b"), LOADS),
    "nvidia/Llama-3.1-70B-Instruct-FP8": ("", "", "kv fp8"),
    **dict.fromkeys(("nvidia/DeepSeek-V3.1-NVFP4", "nvidia/DeepSeek-V3.2-NVFP4"), FP4),
    **dict.fromkeys((f"nvidia/GLM-{version}-NVFP4" for version in ("5", "5.1", "5.2", "5.3")), FP4),
    **dict.fromkeys(("nvidia/MiniMax-M2.5-NVFP4", "nvidia/MiniMax-M2.7-NVFP4"), FP4_CACHED),
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": FP4_CACHED,
    "nvidia/Qwen3-235B-A22B-NVFP4": ("", "kv ignored", "kv fp8, machine"),
    **dict.fromkeys(
        ("nvidia/Qwen3.5-122B-A10B-NVFP4", "nvidia/Qwen3.5-397B-A17B-NVFP4", "nvidia/Qwen3.6-27B-NVFP4"), FP4_CACHED
    ),
    "nvidia/Qwen3.6-35B-A3B-NVFP4": ("", "", "kv fp8, two configs, machine"),
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": (
        "config",
        "",
        "kv fp8, machine",
    ),  # vLLM reads it from 0.33 on
    **dict.fromkeys(("nvidia/Kimi-K2.5-NVFP4", "nvidia/Kimi-K2.6-NVFP4", "nvidia/Kimi-K2.7-Code-NVFP4"), SEES),
    "moonshotai/Kimi-K2.5": ("another",) * 3,
    **dict.fromkeys(("moonshotai/Kimi-K3", "RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8"), UNKNOWN_PACKED),
    **dict.fromkeys(("poolside/Laguna-S-2.1-FP8", "poolside/Laguna-XS.2-FP8"), UNKNOWN_PACKED),
    **dict.fromkeys(("deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"), UNKNOWN),
    **dict.fromkeys(("nvidia/DeepSeek-V4-Flash-NVFP4", "nvidia/DeepSeek-V4-Pro-NVFP4"), UNKNOWN),
    **dict.fromkeys(("sgl-project/DeepSeek-V4-Flash-FP8", "sgl-project/DeepSeek-V4-Pro-FP8"), UNKNOWN),
    **dict.fromkeys(
        ("nvidia/Gemma-4-26B-A4B-NVFP4", "nvidia/Gemma-4-31B-IT-NVFP4", "nvidia/MiniMax-M3-NVFP4"), UNKNOWN
    ),
    **dict.fromkeys(("XiaomiMiMo/MiMo-V2-Flash", "stepfun-ai/Step-3.7-Flash-FP8"), UNKNOWN),
    # Of these the algorithm alone is at hand, not the list of what is left out, nor who made it.
    **dict.fromkeys(
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-FP8"),
        ("config", "not left out, mtp left out", "not left out, kv fp8"),
    ),
    **dict.fromkeys(
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4"),
        ("config", "config", "not left out, kv fp8, machine"),
    ),
}


def test_every_published_checkpoint_has_its_verdicts() -> None:
    assert published().keys() == VERDICTS.keys()


@pytest.mark.parametrize("name", VERDICTS)
def test_a_published_checkpoint(name: str, tmp_path: Path) -> None:
    write(tmp_path / "published", published()[name])
    found = verdicts(of_folder(tmp_path / "published"))
    rules = (", ".join(dict.fromkeys(one.rule for one in verdict.findings)) for verdict in found.values())
    assert tuple(rules) == VERDICTS[name]


def test_a_mix_in_hf_quant_config_alone_loads_in_the_next_release_of_vllm(tmp_path: Path) -> None:
    write(tmp_path / "published", published()["nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4"])
    [verdict] = verdicts(of_folder(tmp_path / "published"), ["vllm"], "0.33").values()
    assert verdict.findings == ()


def test_vllm_reads_hf_quant_config_alone_only_if_modelopt_is_named(tmp_path: Path) -> None:
    """vLLM 0.32 and 0.33, transformers_utils/model_arch_config_convertor.py: else there is no quant_method."""
    said = published()["nvidia/Llama-3.1-70B-Instruct-FP8"]
    quant = {key: value for key, value in said["quant"].items() if key != "producer"}
    write(tmp_path / "published", said | {"quant": quant})
    [verdict] = verdicts(of_folder(tmp_path / "published"), ["vllm"]).values()
    [finding] = verdict.findings
    assert (finding.rule, finding.way) == ("config", 'put "producer": {"name": "modelopt"} there')


def test_a_file_that_is_larger_than_memory_is_checked(tmp_path: Path) -> None:
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert of_folder(tmp_path).files["model.safetensors"]["x"].shape == (size,)
