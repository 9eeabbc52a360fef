"""Small originals as their publishers quantize them, and the bfloat16 tensors that they mean, worked out one number at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .models import make_model, read_json, tensors

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SIZES = {"hidden_size": 64, "intermediate_size": 64}
OPENAI = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
INT4 = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax",
    "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
KIMI = {
    "config_groups": {
        "group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": INT4}
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def random_blocks(rows: int, inputs: int, powers: tuple[int, int] = (-9, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 bytes uint8 [rows, inputs/2], e8m0 scales uint8 [rows, inputs/32] of powers of two between two, and their values
    float32 [rows, inputs].
    """
    packed = torch.randint(0, 256, (rows, inputs // 2), dtype=torch.uint8)
    power = torch.randint(powers[0], powers[1] + 1, (rows, inputs // 32))
    values = [
        [
            (-1 if code > 7 else 1) * E2M1[code % 8] * 2.0 ** powers_of_row[column // 32]
            for column, code in enumerate(code for byte in row for code in (byte % 16, byte // 16))
        ]
        for row, powers_of_row in zip(packed.tolist(), power.tolist(), strict=True)
    ]
    return packed, (power + 127).to(torch.uint8), torch.tensor(values)


def mxfp4_gpt_oss(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """GPT-OSS in OpenAI's own files."""
    source = make_model(folder, "gpt_oss", **SIZES)
    held, expected = {}, {}
    for name, tensor in tensors(source).items():
        expected[name] = tensor
        if not name.endswith(("gate_up_proj", "down_proj")):
            held[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        made = [random_blocks(outputs, inputs) for _ in range(experts)]
        packed, scales, values = (torch.stack(parts) for parts in zip(*made, strict=True))
        held[f"{name}_blocks"], held[f"{name}_scales"] = packed.unflatten(2, (-1, 16)), scales
        expected[name] = values.transpose(1, 2).to(torch.bfloat16).contiguous()
    return rewritten(source, held, OPENAI), expected


def int4_deepseek(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """DeepSeek V3 with routed experts in packed integers, as Kimi K2 Thinking."""
    return _experts_of_deepseek(folder, _int4, KIMI)


def mxfp4_deepseek(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The same in MXFP4, as compressed-tensors packs it."""
    weights = INT4 | {"type": "float"}
    groups = {"group_0": {"input_activations": None, "targets": ["Linear"], "weights": weights}}
    return _experts_of_deepseek(
        folder, _packed_mxfp4, KIMI | {"format": "mxfp4-pack-quantized", "config_groups": groups}
    )


def int4_kimi(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Kimi K2.5, which says how it is quantized among the settings of its language model."""
    source, expected = _experts_of_deepseek(folder, _int4, KIMI, "kimi_k25")
    config = read_json(source / "config.json")
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    return source, expected


def _experts_of_deepseek(
    folder: Path, kept: Callable, quantization: dict, name: str = "deepseek_v3"
) -> tuple[Path, dict[str, Tensor]]:
    source = make_model(folder, name, **SIZES, moe_intermediate_size=64)
    held, expected = {}, {}
    for name, tensor in tensors(source).items():
        made, expected[name] = kept(*tensor.shape) if ".mlp.experts." in name else ({"": tensor}, tensor)
        held |= {name + suffix: data for suffix, data in made.items()}
    return rewritten(source, held, quantization), expected


def _int4(rows: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    words = torch.randint(-(2**31), 2**31, (rows, inputs // 8), dtype=torch.int32)
    scales = (torch.rand(rows, inputs // 32) / 50 + 1e-3).to(torch.bfloat16)
    values = [
        [((word >> 4 * place & 15) - 8) * scale[column // 4] for column, word in enumerate(row) for place in range(8)]
        for row, scale in zip(words.tolist(), scales.tolist(), strict=True)
    ]
    made = {"_packed": words, "_scale": scales, "_shape": torch.tensor([rows, inputs])}
    return made, torch.tensor(values, dtype=torch.float64).to(torch.bfloat16)


def _packed_mxfp4(rows: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
    packed, scales, values = random_blocks(rows, inputs)
    return {"_packed": packed, "_scale": scales}, values.to(torch.bfloat16)


def rewritten(source: Path, held: dict[str, Tensor], quantization: dict) -> Path:
    """The same folder with other tensors and a `quantization_config`."""
    for path in source.glob("*.safetensors"):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, source / "model.safetensors")
    config = read_json(source / "config.json") | {"quantization_config": quantization}
    (source / "config.json").write_text(json.dumps(config))
    return source
