"""Checkpoints of other tools, made here from what their formats mean: judged where that is possible, decoded where it is known,
and refused with one line where it is neither. A wrong scale is found in each.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..support.command_line import command_line
from ..support.models import make_model, read_json, tensors
from ..support.quantized_sources import int4_kimi, mxfp4_deepseek

LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 24}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OUT = "model.layers.0.self_attn.o_proj"
DEEPSEEK = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
Made = tuple[dict[str, Tensor], Tensor]  # tensors by suffix, and the float32 weight that they mean


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama31", **SIZES)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v3", moe_intermediate_size=160)


def written(folder: Path, model: Path, held: dict[str, Tensor], quantization: dict | None, file: str = "") -> Path:
    """A checkpoint; what it says of its quantization is in config.json, or in hf_quant_config.json (`file`), or in "both"."""
    folder.mkdir()
    save_file({name: tensor.clone().contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    own = {} if file == "alone" or quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(read_json(model / "config.json") | own))
    if file:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return folder


def verified(folder: Path, reference: Path) -> tuple[int, dict | str]:
    status, said = command_line("verify", folder, "--reference", reference, "--json")
    return status, json.loads(said[said.index("{") :]) if status < 2 else said


def differing(one: Path, other: Path) -> dict:
    """What `diff` says of weights that do not have the same values."""
    status, said = command_line("diff", one, other, "--json")
    assert status == 1, said
    found = json.loads(said[said.index("{") :])["weights"]
    return {name: said for name, said in found.items() if said["snr"] is not None}, found.keys()


def amax_of(name: str, found: dict[str, Tensor]) -> Tensor:
    """The largest magnitude of a linear and those fused with it."""
    group = next((parts for parts in FUSED if any(f"{part}.weight" in name for part in parts)), ())
    own = next((part for part in group if part in name), "")
    return torch.stack([found[name.replace(own, part)].float().abs().max() for part in group or ("",)]).max()


def nvfp4_codes(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of e2m1 codes, ties to even, under the scale of each 16 inputs; and the values of the codes."""
    ratio = weight.float() / scales.repeat_interleave(16, 1)
    distance = (ratio.abs()[..., None] - LEVELS).abs()
    best = distance.min(-1, keepdim=True).values
    codes = torch.arange(8).add(torch.arange(8) % 2 * 100).where(distance == best, torch.tensor(999)).argmin(-1)
    values = torch.where(ratio < 0, -LEVELS[codes], LEVELS[codes])
    codes = codes + 8 * (ratio < 0)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), values


def block_scales(weight: Tensor, total: Tensor) -> Tensor:
    """e4m3 scales of 16 inputs, under the scale of all."""
    return (weight.float().unflatten(1, (-1, 16)).abs().amax(-1) / 6 / total).clamp(2**-9, 448).to(torch.float8_e4m3fn)


def modelopt_fp8(weight: Tensor, amax: Tensor) -> dict[str, Tensor]:
    codes = (weight.float() / (amax / 448)).to(torch.bfloat16).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": amax / 448}


def modelopt_nvfp4(weight: Tensor, amax: Tensor) -> dict[str, Tensor]:
    total = amax / (6 * 448)
    scales = block_scales(weight, total)
    return {"": nvfp4_codes(weight, scales.float() * total)[0], "_scale": scales, "_scale_2": total}


def modelopt_mixed(folder: Path, model: Path, file: str, excluded: bool, stacked: bool, damaged: bool = False) -> Path:
    """Attention in FP8 and the rest in NVFP4, as ModelOpt lists them: of experts each, or those of a layer together."""
    found, held, layers = tensors(model), {}, {}
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            held[name] = tensor
            continue
        attention, amax = ".self_attn." in name, amax_of(name, found)
        made = (modelopt_fp8 if attention else modelopt_nvfp4)(tensor, amax)
        held |= {name + suffix: data for suffix, data in made.items()} | {f"{module}.input_scale": torch.tensor(0.01)}
        listed = module.split(".experts.")[0] + ".experts" if stacked and ".experts." in module else module
        layers[listed] = {"quant_algo": "FP8"} if attention else {"quant_algo": "NVFP4", "group_size": 16}
    if damaged:
        held[f"{OUT}.weight_scale"] *= 2
    said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "quant_method": "modelopt"}
    list_of = ["lm_head", "model.layers.*.mlp.gate"] if excluded else []
    return written(folder, model, held, said | {"ignore": list_of, "exclude_modules": list_of}, file)


@pytest.mark.parametrize(
    ("architecture", "file", "excluded", "stacked"),
    [
        *(("llama31", "", True, False), ("llama31", "both", False, False)),
        *(("qwen3_moe", "both", False, True), ("qwen3_moe", "alone", True, False), ("qwen3_moe", "alone", False, True)),
    ],
)
def test_mixed_checkpoints_are_judged_module_by_module(
    architecture: str, file: str, excluded: bool, stacked: bool, tmp_path: Path
) -> None:
    """Those that ModelOpt exports for Hugging Face name nothing as left out: what is not listed is not quantized."""
    model = make_model(tmp_path, architecture)
    status, said = verified(modelopt_mixed(tmp_path / "mixed", model, file, excluded, stacked), model)
    assert (status, said["problems"]) == (0, [])
    formats = {one["format"] for name, one in said["weights"].items() if "_proj" in name}
    assert formats == {"fp8", "nvfp4"}
    status, said = verified(modelopt_mixed(tmp_path / "damaged", model, file, excluded, stacked, damaged=True), model)
    [problem] = said["problems"]
    assert status == 1 and problem.startswith(f"{OUT}.weight: 64 of 64 blocks are further from the reference")
    assert "2 times what it should be" in problem


def test_a_module_in_another_format_than_listed_is_found(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama31")
    folder = modelopt_mixed(tmp_path / "mixed", model, "", True, False)
    config = read_json(folder / "config.json")
    config["quantization_config"]["quantized_layers"][OUT] = {"quant_algo": "NVFP4", "group_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    status, said = verified(folder, model)
    assert status == 1 and any(OUT in problem or "quantized_layers" in problem for problem in said["problems"])


def blocks(weight: Tensor, name: str = "_scale_inv", scales: torch.dtype = torch.float32) -> Made:
    """e4m3 in blocks of 128 x 128, the last ones partial."""
    rows, columns = ([slice(at, at + 128) for at in range(0, size, 128)] for size in weight.shape)
    codes, values = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn), torch.zeros(weight.shape)
    kept = torch.zeros(len(rows), len(columns), dtype=scales)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = weight[row, column].float()
            kept[i, j] = block.abs().max() / 448
            codes[row, column] = (block / kept[i, j].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            values[row, column] = codes[row, column].float() * kept[i, j].float()
    return {"": codes, name: kept}, values


def per_tensor(weight: Tensor) -> Made:
    scale = weight.float().abs().max().reshape(1) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale


def per_channel(weight: Tensor) -> Made:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale.float()


def packed_nvfp4(weight: Tensor) -> Made:
    divisor = 6 * 448 / weight.float().abs().max()
    scales = block_scales(weight, 1 / divisor)
    whole = scales.float() / divisor
    codes, values = nvfp4_codes(weight, whole)
    made = {"_packed": codes, "_scale": scales, "_global_scale": divisor.reshape(1)}
    return made, values * whole.repeat_interleave(16, 1)


def quantized(model: Path, how: Callable[[str, Tensor], Made]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is on disk, and the weights that it means."""
    held, meant = {}, {}
    for name, tensor in tensors(model).items():
        projected = tensor.dim() == 2 and ("_proj" in name)
        made, meant[name] = how(name, tensor) if projected else ({"": tensor}, tensor)
        held |= {name + suffix: data for suffix, data in made.items()}
    return held, meant


@pytest.mark.parametrize("said", [{}, {"scale_fmt": "ue8m0"}])
def test_deepseeks_own_fp8_is_judged(said: dict, deepseek: Path, tmp_path: Path) -> None:
    """Its config.json names neither head nor routers as left out."""
    held, meant = quantized(deepseek, lambda name, weight: blocks(weight))
    folder = written(tmp_path / "own", deepseek, held, DEEPSEEK | said)
    status, found = verified(folder, deepseek)
    assert (status, found["problems"]) == (0, [])
    assert sum(one["format"] == "fp8_pb" for one in found["weights"].values()) == len(held) - len(meant)
    assert differing(folder, written(tmp_path / "meant", deepseek, meant, None))[0] == {}
    held[f"{OUT}.weight_scale_inv"] *= 2
    status, found = verified(written(tmp_path / "damaged", deepseek, held, DEEPSEEK | said), deepseek)
    assert status == 1 and [one.split(":")[0] for one in found["problems"]] == [f"{OUT}.weight"]


def test_scales_of_blocks_in_bfloat16_are_decoded_and_not_judged(llama: Path, tmp_path: Path) -> None:
    """As Qwen publishes them."""
    held, meant = quantized(llama, lambda name, weight: blocks(weight, scales=torch.bfloat16))
    folder = written(tmp_path / "own", llama, held, DEEPSEEK)
    status, said = command_line("verify", folder, "--reference", llama)
    assert status == 2 and "weight_scale_inv is BF16, not float32, so it cannot be judged" in said
    assert differing(folder, written(tmp_path / "meant", llama, meant, None))[0] == {}


def group(stored: str, **weights: object) -> dict:
    targets = {"targets": ["Linear"], "input_activations": {"num_bits": 8, "dynamic": True, "type": "float"}}
    return targets | {"format": stored, "weights": {"symmetric": True, "type": "float", "dynamic": False} | weights}


def compressed(*groups: dict, **more: object) -> dict:
    listed = {f"group_{number}": one for number, one in enumerate(groups)}
    stored = groups[0]["format"] if len(groups) == 1 else "mixed-precision"
    said = {"quant_method": "compressed-tensors", "format": stored, "config_groups": listed, "ignore": ["lm_head"]}
    return said | {"quantization_status": "compressed", "sparsity_config": {}, "transform_config": {}} | more


NVFP4 = group("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)
TENSOR, CHANNEL = (group("float-quantized", num_bits=8, strategy=strategy) for strategy in ("tensor", "channel"))
BLOCK = group("float-quantized", num_bits=8, strategy="block", block_structure=[128, 128])
PACKED = {
    "nvfp4": (compressed(NVFP4), lambda name, weight: packed_nvfp4(weight)),
    "fp8 of tensors": (compressed(TENSOR), lambda name, weight: per_tensor(weight)),
    "fp8 of channels": (compressed(CHANNEL), lambda name, weight: per_channel(weight)),
    "fp8 of blocks": (compressed(BLOCK), lambda name, weight: blocks(weight, "_scale")),
    "mixed": (
        compressed(BLOCK, NVFP4),
        lambda name, weight: blocks(weight, "_scale") if ".self_attn." in name else packed_nvfp4(weight),
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_compressed_tensors_are_decoded_and_compared(name: str, llama: Path, tmp_path: Path) -> None:
    said, how = PACKED[name]
    held, meant = quantized(llama, how)
    folder, values = written(tmp_path / "own", llama, held, said), written(tmp_path / "meant", llama, meant, None)
    status, told = command_line("verify", folder, "--reference", llama)
    assert status == 2 and len(told.strip().splitlines()) == 1, told
    assert (
        f"decoded here but not judged. See how far it is from its original: megatron-export diff ORIGINAL {folder}"
        in told
    )
    other, names = differing(folder, values)
    assert other == {} and names == meant.keys()
    far, _ = differing(llama, folder)
    assert far.keys() == {name for name in meant if "_proj" in name}
    assert all(18 < one["snr"] < 45 for one in far.values())
    held[f"{OUT}.weight_scale"] = (held[f"{OUT}.weight_scale"].float() / 2).to(held[f"{OUT}.weight_scale"].dtype)
    other, _ = differing(written(tmp_path / "damaged", llama, held, said), values)
    assert other.keys() == {f"{OUT}.weight"} and -1 < other[f"{OUT}.weight"]["snr"] < 7


@pytest.mark.parametrize("make", [int4_kimi, mxfp4_deepseek])
def test_packed_codes_of_publishers_are_decoded(make: Callable, tmp_path: Path) -> None:
    folder, meant = make(tmp_path)
    assert differing(folder, written(tmp_path / "meant", folder, meant, None))[0] == {}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"quant_method": "gptq", "bits": 4}, "in the dialect 'gptq', which is not known here"),
        (DEEPSEEK | {"weight_block_size": [64, 64]}, "in the dialect 'fp8', which is not known here"),
        (compressed(group("int-quantized", num_bits=8)), "'int-quantized'"),
        (compressed(group("float-quantized", num_bits=8, strategy="group")), "strategy 'group'"),
        (compressed(NVFP4, transform_config={"a": 1}), "transform_config {'a': 1}"),
        (compressed(NVFP4, quantization_status="frozen"), "quantization_status 'frozen'"),
        (compressed(NVFP4, config_groups=3), "config_groups 3"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(said: dict, why: str, llama: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "own", llama, quantized(llama, lambda name, weight: packed_nvfp4(weight))[0], said)
    for command in (("verify", folder, "--reference", llama), ("diff", llama, folder), ("diff", folder, llama)):
        status, told = command_line(*command)
        assert status == 2 and why in told and len(told.strip().splitlines()) == 1, told


@pytest.mark.parametrize("suffix", ["_scale", "_global_scale", "_packed"])
def test_codes_without_their_scales_are_refused(suffix: str, llama: Path, tmp_path: Path) -> None:
    held, _ = quantized(llama, lambda name, weight: packed_nvfp4(weight))
    del held[f"{OUT}.weight{suffix}"]
    status, told = command_line("diff", llama, written(tmp_path / "own", llama, held, compressed(NVFP4)))
    assert status == 2 and "cannot be decoded: model.layers.0.self_attn.o_proj.weight" in told, told


def test_scales_that_do_not_fit_are_refused(llama: Path, deepseek: Path, tmp_path: Path) -> None:
    for number, (model, said, how) in enumerate(((llama, *PACKED["nvfp4"]), (llama, *PACKED["fp8 of channels"]), (
            deepseek, DEEPSEEK, lambda name, weight: blocks(weight)))):  # fmt: skip
        held, _ = quantized(model, how)
        name = next(name for name in (f"{OUT}.weight_scale", f"{OUT}.weight_scale_inv") if name in held)
        held[name] = torch.cat([held[name], held[name]])
        status, told = command_line("diff", model, written(tmp_path / str(number), model, held, said))
        assert status == 2 and f"{OUT}.weight" in told and "Traceback" not in told, told
