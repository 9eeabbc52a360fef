"""Emulated linears against a slow and separate account of the rounding; what is missing or too much is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launch.bench.serving import leave_inputs
from megatron_export import formats
from megatron_export.common.errors import ExportError
from megatron_export.common.piece import Amax
from megatron_export.formats import ALGORITHMS, Options
from megatron_export.verify.emulation import EmulatedLinear, attention, bits_per_weight, load

from ..support.models import tensors

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

HIDDEN, FFN = 256, 384
LINEARS = {
    "self_attn.q_proj": (256, HIDDEN),
    "self_attn.k_proj": (128, HIDDEN),
    "self_attn.v_proj": (128, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 256),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
KEPT = ("self_attn.o_proj", "mlp.down_proj")  # these have a pre_quant_scale in the AWQ formats
WEIGHTS = sum(out * columns for out, columns in LINEARS.values())
INPUT_AMAX = torch.tensor(2.5)
PREFIX = "model.layers.0"


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """The value of the grid that is nearest, of two the one with the even code: its place in the grid of magnitudes."""
    gap = (values.abs().unsqueeze(-1) - grid).abs()
    candidates = (gap == gap.amin(dim=-1, keepdim=True)).int() * (3 - torch.arange(len(grid)) % 2)
    return torch.copysign(grid[candidates.argmax(dim=-1)], values)


def static_fp8(values: Tensor, scale: Tensor) -> Tensor:
    return nearest(values.float() / scale, E4M3) * scale


def blocks_of_16(values: Tensor, scale: Tensor) -> Tensor:
    blocks = values.float().unflatten(-1, (-1, 16))
    block_scale = blocks.abs().amax(-1, keepdim=True) / (6 * scale)
    block_scale = nearest(torch.where(block_scale == 0, 1.0, block_scale).clamp(2**-9, 448), E4M3)
    return (nearest(blocks / (block_scale * scale), E2M1) * (block_scale * scale)).flatten(-2)


def groups_of_128(values: Tensor, scale: Tensor | None = None) -> Tensor:
    groups = [group.float() for group in values.split(128, dim=-1)]
    amaxes = [group.abs().amax(-1, keepdim=True) for group in groups]
    scales = [torch.where(amax == 0, torch.ones(()), amax / 448) for amax in amaxes]
    return torch.cat([static_fp8(group, scale) for group, scale in zip(groups, scales, strict=True)], dim=-1)


def blocks_of_32(values: Tensor, scale: None = None) -> Tensor:
    blocks = values.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    power = torch.where(amax == 0, -127, (amax / 448).log2().ceil()).clamp(min=-127)
    return (nearest((blocks / 2**power).float(), E4M3) * 2**power).flatten(-2).float()


def by_token(values: Tensor, scale: None = None) -> Tensor:
    return torch.stack([all_at_once(token) for token in values.flatten(0, -2)]).view(values.shape)


def all_at_once(values: Tensor, scale: None = None) -> Tensor:
    amax = values.float().abs().max()
    return static_fp8(values, amax / 448 if amax > 0 else torch.ones(()))


def as_it_is(values: Tensor, scale: Tensor | None = None) -> Tensor:
    return values.float()


NATIVE, MODELOPT = Options(), Options(fp8_pb_spelling="modelopt")
CASES = {
    "FP8": ("fp8", NATIVE, static_fp8),
    "NVFP4": ("nvfp4", NATIVE, blocks_of_16),
    "NVFP4_AWQ": ("nvfp4_awq", Options(awq_output="modelopt"), blocks_of_16),
    "W4A16_NVFP4": ("w4a16_nvfp4", NATIVE, as_it_is),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_pc_pt", NATIVE, by_token),
    "MXFP8": ("mxfp8", NATIVE, blocks_of_32),
    "MXFP4": ("mxfp4", NATIVE, as_it_is),
    "W4A8_NVFP4_FP8": ("w4a8_nvfp4_fp8", NATIVE, static_fp8),
    "W4A8_MXFP4_FP8": ("w4a8_mxfp4_fp8", NATIVE, all_at_once),
    "W4A16_AWQ": ("int4_awq", NATIVE, as_it_is),
    "W4A8_AWQ": ("w4a8_awq", NATIVE, static_fp8),
    "FP8_BLOCK_SCALES": ("fp8_pb", NATIVE, groups_of_128),
    "fp8_pb_wo": ("fp8_pb", MODELOPT, groups_of_128),  # ModelOpt's HF route writes it in lower case
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of one layer, wide enough for groups of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": 64, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder


def quantized(plain: Path, folder: Path, algorithm: str, kv_algorithm: str | None = None) -> dict[str, Tensor]:
    """Write the same checkpoint with its linears encoded, as the package would; returns its tensors by name."""
    torch.manual_seed(5)  # for the same smoothing vectors in every call
    name, options, _ = CASES[algorithm]
    form = formats.chosen(name, options)
    found = tensors(plain)
    for linear, shape in LINEARS.items():
        weight = found.pop(f"{PREFIX}.{linear}.weight")
        assert weight.shape == shape
        for suffix, piece in formats.encode(form, weight, Amax(weight.abs().amax().float(), INPUT_AMAX)).items():
            found[f"{PREFIX}.{linear}.{suffix}"] = piece.data.contiguous()
        if form.smoothing and linear in KEPT:
            found[f"{PREFIX}.{linear}.pre_quant_scale"] = (torch.rand(shape[1]) + 0.5).to(torch.bfloat16)
    if kv_algorithm:
        found[f"{PREFIX}.self_attn.k_proj.k_scale"] = torch.tensor(3.0 / 448)
        found[f"{PREFIX}.self_attn.v_proj.v_scale"] = torch.tensor(1.7 / 448)
    write(folder, plain, found, {"quant_algo": algorithm, "kv_cache_quant_algo": kv_algorithm})
    return found


def write(folder: Path, plain: Path, found: dict[str, Tensor], quantization: dict | None) -> None:
    folder.mkdir(exist_ok=True)
    config = json.loads((plain / "config.json").read_text())
    if quantization:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": quantization["quant_algo"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("algorithm", CASES)
def test_a_linear_multiplies_its_rounded_input_with_its_decoded_weight(
    plain: Path, tmp_path: Path, algorithm: str
) -> None:
    found = quantized(plain, tmp_path, algorithm)
    name, options, rounded = CASES[algorithm]
    form = formats.chosen(name, options)
    model = load(tmp_path)
    emulated = {name: part for name, part in model.named_modules() if isinstance(part, EmulatedLinear)}
    assert sorted(emulated) == sorted(f"{PREFIX}.{linear}" for linear in LINEARS)
    for name, linear in emulated.items():
        pieces = {key.rpartition(".")[2]: t for key, t in found.items() if key.rpartition(".")[0] == name}
        weight = form.decode({suffix: formats.Piece(tensor, ()) for suffix, tensor in pieces.items()})
        if form.arithmetic.weight == "BF16":
            weight = weight.to(torch.bfloat16).float()
        inputs = torch.randn(2, 5, weight.shape[1]).to(torch.bfloat16)
        inputs[0, 0] = 0
        smoothed = inputs * pieces["pre_quant_scale"] if "pre_quant_scale" in pieces else inputs
        assert smoothed.dtype == torch.bfloat16
        expected = nn.functional.linear(rounded(smoothed, pieces.get("input_scale")), weight).to(torch.bfloat16)
        output = linear(inputs)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected), name
        untouched = nn.functional.linear(smoothed.float(), weight).to(torch.bfloat16)
        if rounded is not as_it_is:
            assert not torch.equal(output, untouched), name
        leave_inputs(linear, (form.name,))
        assert torch.equal(linear(inputs), untouched)


def test_what_is_not_quantized_is_loaded_as_it_is_and_the_model_runs(plain: Path, tmp_path: Path) -> None:
    found = quantized(plain, tmp_path, "NVFP4")
    left = f"{PREFIX}.mlp.gate_proj"
    for name in [name for name in found if name.startswith(left)]:
        del found[name]
    found[f"{left}.weight"] = tensors(plain)[f"{left}.weight"]
    write(tmp_path, plain, found, {"quant_algo": "NVFP4"})
    model = load(tmp_path)
    assert type(model.get_submodule(left)) is nn.Linear
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name]), name
    with torch.no_grad():
        assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_a_bias_is_added_before_the_product_is_rounded(plain: Path, tmp_path: Path) -> None:
    quantized(plain, tmp_path, "FP8")
    linear = load(tmp_path).get_submodule(f"{PREFIX}.self_attn.q_proj")
    inputs = torch.randn(3, HIDDEN).to(torch.bfloat16)
    with torch.no_grad():
        without = nn.functional.linear(static_fp8(inputs, linear.input_scale), linear.decoded())
        linear.bias = nn.Parameter(torch.randn(256).to(torch.bfloat16))
        assert torch.equal(linear(inputs), (without + linear.bias.float()).to(torch.bfloat16))


def test_the_last_group_of_channels_may_be_short() -> None:
    values = torch.randn(7, 200).to(torch.bfloat16)
    assert torch.equal(ALGORITHMS["FP8_BLOCK_SCALES"].arithmetic.inputs(values, None), groups_of_128(values))


@torch.no_grad()
def test_scalars_may_have_a_dim(plain: Path, tmp_path: Path) -> None:
    """So ModelOpt's Megatron route writes them."""
    found = quantized(plain, tmp_path / "none", "NVFP4")
    wider = {name: tensor if tensor.dim() else tensor.reshape(1) for name, tensor in found.items()}
    write(tmp_path / "one", plain, wider, {"quant_algo": "NVFP4"})
    left, right = (load(tmp_path / name).get_submodule(f"{PREFIX}.mlp.up_proj") for name in ("none", "one"))
    inputs = torch.randn(3, HIDDEN).to(torch.bfloat16)
    assert torch.equal(left(inputs), right(inputs))


@torch.no_grad()
def test_the_scale_of_a_single_block_may_have_no_dims() -> None:
    """So ModelOpt's HF route writes it."""
    weight = torch.randn(96, 128).to(torch.bfloat16)
    encoded = formats.encode(formats.chosen("fp8_pb", MODELOPT), weight, Amax(torch.ones(()), torch.ones(())))
    found = {suffix: piece.data for suffix, piece in encoded.items()}
    assert found["weight_scale"].shape == (1, 1, 1, 1)
    bare = found | {"weight_scale": found["weight_scale"].reshape(())}
    left, right = (EmulatedLinear(ALGORITHMS["FP8_PB_WO"], one, None).decoded() for one in (found, bare))
    assert torch.equal(left, right)
    assert not torch.equal(left, found["weight"].float())


@torch.no_grad()
@pytest.mark.parametrize(
    ("algorithm", "rounded", "amaxes"),
    [("FP8", static_fp8, (3.0, 1.7)), ("FP8", static_fp8, (448.0, 448.0)), ("NVFP4", blocks_of_16, (3.0, 1.7))],
    ids=["FP8", "FP8 without scales", "NVFP4"],
)
def test_keys_and_values_go_through_the_cache(
    plain: Path, tmp_path: Path, algorithm: str, rounded: Callable, amaxes: tuple[float, float]
) -> None:
    found = quantized(plain, tmp_path, "W4A16_AWQ", algorithm)
    if amaxes == (448.0, 448.0):  # whose scales are 1
        without_kv_scales(found, plain, tmp_path, algorithm)
    module = load(tmp_path).get_submodule(f"{PREFIX}.self_attn")
    query = torch.randn(2, 4, 9, 64).to(torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 9, 64).to(torch.bfloat16)
    output, _ = attention(module, query, key, value, None, scaling=module.scaling)

    def attended(key: Tensor, value: Tensor) -> Tensor:
        each = (part.repeat_interleave(2, dim=1) for part in (key, value))
        return nn.functional.scaled_dot_product_attention(query, *each, is_causal=True).transpose(1, 2)

    cached = (
        rounded(part, torch.tensor(amax / 448)).to(torch.bfloat16)
        for part, amax in zip((key, value), amaxes, strict=True)
    )
    assert torch.equal(output, attended(*cached))
    assert not torch.equal(output, attended(key, value))


def without_kv_scales(found: dict[str, Tensor], plain: Path, folder: Path, algorithm: str) -> None:
    rest = {name: tensor for name, tensor in found.items() if not name.endswith(("k_scale", "v_scale"))}
    write(folder, plain, rest, {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": algorithm})


def test_no_engine_takes_a_scale_for_granted_in_four_bits(plain: Path, tmp_path: Path) -> None:
    without_kv_scales(quantized(plain, tmp_path, "W4A16_AWQ", "NVFP4"), plain, tmp_path, "NVFP4")
    with pytest.raises(ExportError, match="k_scale is missing"):
        load(tmp_path)


def test_a_model_attends_to_rounded_keys(plain: Path, tmp_path: Path) -> None:
    quantized(plain, tmp_path / "without", "W4A16_AWQ")
    quantized(plain, tmp_path / "with", "W4A16_AWQ", "FP8")
    with torch.no_grad():
        left, right = (load(tmp_path / name)(torch.arange(20)[None]).logits for name in ("without", "with"))
    assert not torch.equal(left, right)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlp.up_proj.weight_scale", "missing"),
        ("mlp.up_proj.input_scale", "missing"),
        ("mlp.up_proj.weight", "missing"),
        ("input_layernorm.weight", "missing"),
        ("self_attn.v_proj.v_scale", "missing"),
        ("mlp.up_proj.weight_scale_inv", "not expected"),
        ("mlp.fourth_proj.weight", "not expected"),
    ],
)
def test_tensors_that_are_missing_or_too_much_are_named(plain: Path, tmp_path: Path, name: str, said: str) -> None:
    found = quantized(plain, tmp_path, "NVFP4", "FP8")
    load(tmp_path)
    if found.pop(f"{PREFIX}.{name}", None) is None:
        found[f"{PREFIX}.{name}"] = torch.zeros(4)
    write(tmp_path, plain, found, {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"})
    with pytest.raises(ExportError, match=f"{PREFIX}.{name} is {said}"):
        load(tmp_path)


def test_scales_that_no_config_speaks_of_are_refused(plain: Path, tmp_path: Path) -> None:
    found = quantized(plain, tmp_path, "FP8", "FP8")
    write(tmp_path, plain, found, {"quant_algo": "FP8"})
    with pytest.raises(ExportError, match="k_scale is not expected"):
        load(tmp_path)
    (tmp_path / "hf_quant_config.json").unlink()
    with pytest.raises(ExportError, match="weight_scale is not expected"):
        load(tmp_path)


def test_an_unknown_algorithm_and_an_empty_folder_are_refused(plain: Path, tmp_path: Path) -> None:
    write(tmp_path, plain, tensors(plain), {"quant_algo": "W3A3"})
    with pytest.raises(ExportError, match="'W3A3' is not known here; known are FP8, "):
        load(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ExportError, match="no .safetensors file"):
        load(tmp_path / "none")


def writing(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def name_no_model(folder: Path) -> None:
    writing("config.json", '{"model_type": "nothing", "auto_map": {"AutoConfig": "evil.Config"}}')(folder)
    writing("evil.py", "raise SystemExit('was run')")(folder)


def mean_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))


def lead_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


LONG = (1 << 60).to_bytes(8, "little") + b"{}"
DAMAGES: dict[str, Callable[[Path], object]] = {  # what is said -> of what
    "not JSON": writing("config.json", "[" * 100_000),
    "no config.json of a model": name_no_model,
    "not of the model in its config.json": mean_another_size,
    "a symbolic link out of its folder": lead_out,
    "its header would have 1,152,921,504,606,846,976 bytes": writing("model.safetensors", LONG),
    "is in another file too": lambda folder: shutil.copyfile(folder / "model.safetensors", folder / "more.safetensors"),
    "quant_algo 8 is not known here": writing("hf_quant_config.json", '{"quantization": {"quant_algo": 8}}'),
    r"quantization is \[\], not a table": writing("hf_quant_config.json", '{"quantization": []}'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_folder_is_not_trusted(message: str, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    DAMAGES[message](folder)
    with pytest.raises(ExportError, match=message):
        load(folder)
    if "header" in message or "link" in message:
        with pytest.raises(ExportError, match=message):
            bits_per_weight(folder)


@pytest.mark.parametrize(
    ("algorithm", "bits", "beside"),
    [
        ("FP8", 8, 2 * 32 * len(LINEARS)),
        ("NVFP4", 4.5, 2 * 32 * len(LINEARS)),
        ("W4A16_NVFP4", 4.5, 32 * len(LINEARS)),
        ("MXFP8", 8.25, 0),
        ("W4A8_MXFP4_FP8", 4.25, 0),
        ("NVFP4_AWQ", 4.5, 2 * 32 * len(LINEARS) + 16 * (256 + FFN)),
        ("W4A16_AWQ", 4 + 32 / 128, 16 * (256 + FFN)),
        ("W4A8_AWQ", 4 + 32 / 128, 16 * (256 + FFN) + 2 * 32 * len(LINEARS)),
        ("FP8_BLOCK_SCALES", 8 + 32 / 128**2, 0),
        ("fp8_pb_wo", 8 + 32 / 128**2, 0),
    ],
)
def test_bits_per_weight_count_scales_and_smoothing(
    plain: Path, tmp_path: Path, algorithm: str, bits: float, beside: int
) -> None:
    quantized(plain, tmp_path, algorithm, "FP8")  # the scales of the cache are not counted
    assert bits_per_weight(tmp_path) == bits + beside / WEIGHTS
    assert bits_per_weight(plain) == 16
