"""Single linears against the vectors that ModelOpt 0.47 wrote: every byte, by both of its routes, and AWQ's search."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_export import formats
from megatron_export.calibration.amax import Maxima
from megatron_export.calibration.awq_search import Alphas
from megatron_export.common.piece import Amax
from megatron_export.distributed.heartbeat import Pulse
from megatron_export.distributed.topology import Cut, Topology
from megatron_export.formats import FORMATS, Form, Options, chosen
from megatron_export.formats.awq import ALPHAS, SEARCHES, factors, importance

from ..support.models import GOLDEN, same

VECTORS = GOLDEN / "vectors"
FORMS = {  # by ModelOpt's name
    "FP8": chosen("fp8"),
    "FP8_PB_WO": chosen("fp8_pb", Options(fp8_pb_spelling="modelopt")),
    "NVFP4": chosen("nvfp4"),
    "NVFP4_AWQ": chosen("nvfp4_awq"),
    "W4A16_NVFP4": chosen("w4a16_nvfp4"),
    "FP8_PCPT": chosen("fp8_pc_pt"),
    "MXFP8": chosen("mxfp8"),
    "MXFP4": chosen("mxfp4"),
    "W4A8_NVFP4_FP8": chosen("w4a8_nvfp4_fp8"),
    "W4A8_MXFP4_FP8": chosen("w4a8_mxfp4_fp8"),
    "INT4_AWQ": chosen("int4_awq"),
    "INT4_AWQ_G64": chosen("int4_awq", Options(group_size=64)),
    "W4A8_AWQ": chosen("w4a8_awq"),
}
NAN_FOR_ZEROS = ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8")
PATHS = [path for path in sorted(VECTORS.glob("*/*.safetensors")) if path.parent.name in FORMS]
SOUND = [path for path in PATHS if path.stem != "zero" or path.parent.name not in NAN_FOR_ZEROS]
SEARCHED = [path for path in PATHS if "AWQ" in path.parent.name]
REAL = sorted(VECTORS.glob("FP8_PB_REAL/*.safetensors"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def read(path: Path) -> tuple[dict[str, Tensor], Tensor, Amax]:
    """A vector, and the weight and maxima that its bytes are made of: after smoothing, as ModelOpt has them."""
    vector = load_file(path)
    weight, tokens = vector["in.weight"], vector["in.x"].abs().amax(dim=0).float()
    if "search.best_scale" in vector:
        p = 1 / vector["search.best_scale"]
        weight, tokens = (weight.float() / p).to(torch.bfloat16), tokens * p
    amax = Amax(weight.abs().amax().float(), tokens.amax().to(torch.bfloat16).float())
    assert "calib.weight" not in vector or same(weight, vector["calib.weight"])
    weights = dict.fromkeys(("weight_quantizer", "weight_quantizer.1"), amax.weight)
    for name, ours in (weights | {"input_quantizer": amax.input}).items():
        theirs = vector.get(f"calib.{name}._amax")
        assert theirs is None or theirs.dim() > 0 or torch.equal(theirs.float(), ours), name  # dims: one of every group
    return vector, weight, amax


def written(vector: dict[str, Tensor], route: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{route}."): value for key, value in vector.items() if key.startswith(f"{route}.")}


def pieces_of(form: Form, weight: Tensor, amax: Amax, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {suffix: piece.data for suffix, piece in formats.encode(form, weight, amax).items()}
    if form.smoothing:
        made["pre_quant_scale"] = (1 / vector["search.best_scale"]).to(torch.bfloat16)
    return made


@pytest.mark.parametrize("path", SOUND, ids=name_of)
def test_every_byte_equals_modelopt(path: Path) -> None:
    vector, weight, amax = read(path)
    made = pieces_of(FORMS[path.parent.name], weight, amax, vector)
    assert sorted(written(vector, "out")) == sorted(made)
    # ModelOpt's Megatron route does not write pre_quant_scale: that checkpoint is broken
    assert sorted(written(vector, "meg")) == sorted(made.keys() - {"pre_quant_scale"})
    for route in ("out", "meg"):
        for suffix, value in written(vector, route).items():
            # ModelOpt's Megatron route writes scalars as [1], its HF route and we as []; for FP8_PB see below
            assert value.shape == made[suffix].shape or value.numel() == made[suffix].numel() == 1
            assert same(made[suffix].contiguous(), value.reshape(made[suffix].shape)), (route, suffix)


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent.name == "FP8_PB_WO"], ids=name_of)
def test_both_spellings_of_fp8_pb_have_the_same_bytes(path: Path) -> None:
    _, weight, amax = read(path)
    native = formats.encode(chosen("fp8_pb"), weight, amax)
    modelopt = formats.encode(FORMS["FP8_PB_WO"], weight, amax)
    assert (sorted(native), sorted(modelopt)) == (["weight", "weight_scale_inv"], ["weight", "weight_scale"])
    assert same(native["weight"].data, modelopt["weight"].data)
    assert same(native["weight_scale_inv"].data[:, None, :, None], modelopt["weight_scale"].data)
    assert same(FORMS["FP8_PB_WO"].decode(native), FORMS["FP8_PB_WO"].decode(modelopt))


@pytest.mark.parametrize("case", ["s64x128", "s256x512", "odd", "ties", "zero"])
@pytest.mark.parametrize("scales", ["mse", "four_over_six"])
def test_searched_scales_of_nvfp4_are_modelopts(scales: str, case: str) -> None:
    """Made of the weights of NVFP4 by ModelOpt's presets nvfp4_w4a4_weight_mse_fp8_sweep and nvfp4_four_over_six on the CPU,
    and the same by both of its exporters. Its Triton kernel that rounds a weight was replaced by plain torch that does what the
    kernel says.
    """
    _, weight, amax = read(VECTORS / "NVFP4" / f"{case}.safetensors")
    theirs = written(load_file(VECTORS / f"NVFP4_{scales.upper()}" / f"{case}.safetensors"), "out")
    pieces = formats.encode(chosen("nvfp4", Options(nvfp4_scales=scales)), weight, amax)
    assert sorted(theirs) == sorted(pieces)
    if case == "zero":  # its scale is zero there, and all codes are 7
        assert theirs["weight_scale_2"] == 0
        assert pieces["weight_scale_2"].data == 1
        assert not FORMS["NVFP4"].decode(pieces).any()
        return
    for suffix, value in theirs.items():
        assert same(pieces[suffix].data, value), suffix
    others = formats.encode(FORMS["NVFP4"], weight, amax)["weight_scale"].data
    assert not same(others, theirs["weight_scale"])


# Where ModelOpt is wrong, and what we write instead.


@pytest.mark.parametrize("name", [name for name in FORMS if (VECTORS / name / "zero.safetensors").exists()])
def test_a_weight_of_zeros_gets_scales_of_one_and_decodes_to_zeros(name: str) -> None:
    """ModelOpt writes NaN for some of these; a checkpoint with NaN in it is broken for every engine."""
    vector, weight, amax = read(VECTORS / name / "zero.safetensors")
    theirs = [value.float() for suffix, value in written(vector, "out").items() if value.is_floating_point()]
    assert any(value.isnan().any() for value in theirs) == (name in NAN_FOR_ZEROS)
    pieces = formats.encode(FORMS[name], weight, amax)
    for suffix, piece in pieces.items():
        if "weight_scale" in suffix:  # of e8m0, 2^-127 is the byte 0
            assert (piece.data.float() == (piece.data.dtype != torch.uint8)).all(), suffix
    decoded = FORMS[name].decode(pieces)
    assert decoded.shape == weight.shape
    assert not decoded.any()


@pytest.mark.parametrize("path", [path for path in PATHS if path.parent.name == "FP8_PB_WO"], ids=name_of)
def test_the_scale_of_a_single_block_keeps_its_four_dims(path: Path) -> None:
    """ModelOpt writes [] for a weight of one block; vLLM's loader narrows the dims of the scale of a linear."""
    vector, weight, amax = read(path)
    scale = formats.encode(FORMS["FP8_PB_WO"], weight, amax)["weight_scale"].data
    rows, columns = (-(-size // 128) for size in weight.shape)
    assert scale.shape == (rows, 1, columns, 1)
    assert vector["out.weight_scale"].shape == (() if rows * columns == 1 else scale.shape)


@pytest.mark.parametrize("path", [p for p in REAL if p.stem != "zero"], ids=name_of)
def test_fp8_pb_is_not_rounded_to_bfloat16_as_compressed_weights_of_modelopt_are(path: Path) -> None:
    """FP8_PB_REAL rounds the scale to bfloat16, and the quotient too before it is rounded to e4m3. We do neither, and
    the sum of our squared errors is no larger.
    """
    vector, weight, amax = read(path)
    pieces = formats.encode(FORMS["FP8_PB_WO"], weight, amax)
    scale, theirs = pieces["weight_scale"].data, vector["out.weight_scale"]
    assert same(scale[:, 0, :, 0].to(torch.bfloat16).float(), theirs)
    of_megatron_route = vector["meg.weight_scale"].reshape(scale.shape)  # another scale than its codes'
    assert same(of_megatron_route, scale)
    blocks = theirs.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
    rounded_twice = (weight.float() / blocks).to(torch.bfloat16).to(torch.float8_e4m3fn)
    assert same(rounded_twice, vector["out.weight"])
    both = FORMS["FP8_PB_WO"].decode(pieces), vector["out.weight"].float() * blocks
    ours, other = ((decoded - weight.float()).double().square().sum() for decoded in both)
    assert ours <= other


def test_a_block_of_zeros_is_nan_in_compressed_weights_of_modelopt_and_zero_in_ours() -> None:
    vector, weight, amax = read(VECTORS / "FP8_PB_REAL" / "zero.safetensors")
    assert vector["out.weight"].float().isnan().all()
    assert vector["out.weight_scale"].tolist() == [[0]]
    weight = torch.cat([torch.ones(128, 128, dtype=torch.bfloat16), weight])  # a block of ones, half a block of zeros
    form = chosen("fp8_pb")
    pieces = formats.encode(form, weight, Amax(torch.tensor(1.0), amax.input))
    assert pieces["weight_scale_inv"].data[1:].tolist() == [[1]]
    assert torch.equal(form.decode(pieces), weight.float())


def test_algorithms_are_named_in_upper_case() -> None:
    """ModelOpt writes "fp8_pb_wo"; SGLang tells the case apart, vLLM and TensorRT-LLM take both."""
    options = [Options(), Options(fp8_pb_spelling="modelopt", awq_output="modelopt")]
    named = {form.quantization.get("quant_algo", "") for o in options for form in (m.form(o) for m in FORMATS.values())}
    assert "FP8_PB_WO" in named
    assert {name.upper() for name in named} == named


# The search.


def alone() -> Topology:
    """The place of the only rank, which speaks to no other."""
    groups = {"tp_group": None, "dp_group": None, "stage_group": None, "control": None}
    sizes = dict.fromkeys(("world", "tp_size", "dp_size", "pp_size", "vpp_size", "cp_size", "ep_size"), 1)
    cuts = dict.fromkeys(("experts", "dispatch"), Cut(0, 1, None, 0, None))
    sizes |= dict.fromkeys(("rank", "tp_rank", "dp_rank"), 0)
    return Topology(**sizes, **groups, **cuts, device=torch.device("cpu"), pulse=Pulse(0, 1, lambda mine: mine, 1))


def search_of(path: Path) -> str:
    return FORMS[path.parent.name].smoothing.search


@pytest.mark.parametrize("path", SEARCHED, ids=name_of)
def test_the_vector_of_the_best_alpha_is_modelopts(path: Path) -> None:
    vector = load_file(path)
    weight = vector["in.weight"]
    assert tuple(vector["search.alpha"].tolist()) == ALPHAS
    mean = (importance(weight, SEARCHES[search_of(path)].group) / weight.shape[0]).to(torch.bfloat16).float()
    assert same(mean, vector["search.weight_scale"])
    best = factors(vector["search.act_scale"], mean, vector["search.best_alpha"].item())
    # a float32 power differs in its last bits from one kind of CPU to another; on ModelOpt's the two are equal
    torch.testing.assert_close(best, vector["search.best_scale"], rtol=2**-20, atol=0)


@pytest.mark.parametrize("path", SEARCHED, ids=name_of)
def test_the_search_finds_modelopts_alpha_by_its_losses(path: Path) -> None:
    """The losses are sums of float32 squares, which we add up in another order: 1e-6 is 8 units of float32. On a CPU without the
    instructions that made the products, which are rounded to bfloat16, these are other ones too: with AVX2 or AVX-512 up to 1e-4.
    """
    vector, key, name = load_file(path), search_of(path), "decoder.layers.0.mlp.linear_fc2"
    batches = vector["in.x"].unflatten(0, (3, 4, 4))  # [sequence, batch, in] each
    maxima = Maxima(alone(), by_channel=True)
    for batch in batches:
        maxima.linear(name, vector["in.weight"], batch)
    assert same(maxima.inputs[name], vector["in.x"].abs().amax(dim=0).float())
    means = {name: (maxima.sums[name] / maxima.counts[name]).float()}
    assert same(means[name], vector["search.act_scale"])
    alphas = Alphas(alone(), means, lambda name: (key,), lambda values: values, {name: vector["in.weight"]})
    for batch in batches:
        alphas.linear(name, vector["in.weight"], batch)
    losses = alphas.losses[name, key]
    same_products = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    torch.testing.assert_close(losses, vector["search.loss"], rtol=1e-6 if same_products else 2e-4, atol=0)
    best = losses.tolist().index(min(losses.tolist()))
    assert ALPHAS[best] == vector["search.best_alpha"].item()
    torch.testing.assert_close(alphas.factors[name, key][best], vector["search.best_scale"], rtol=2**-20, atol=0)
