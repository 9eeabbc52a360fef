"""Whole models against what ModelOpt 0.47 exported from the same bfloat16 sources."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export import ExportError
from megatron_export.calibration import statistics
from megatron_export.formats import awq_gram, packing
from megatron_export.models.statistic_names import hf_keys

from ..support.models import GOLDEN, assert_same, read_json, same, tensors
from ..support.ranks import Ranks
from .test_topologies import command, export

SOURCES = {name: GOLDEN / "models" / f"{name}-bf16" for name in ("llama", "qwen3")}
UNMEASURED = [
    ("llama", "mxfp8", "MXFP8"),
    ("llama", "w4a16_nvfp4", "W4A16_NVFP4"),
    ("qwen3", "w4a16_nvfp4", "NVFP4"),
    ("qwen3moe", "w4a16_nvfp4", "NVFP4"),
]


def ids_of(source: Path, file: Path) -> Path:
    """Write the token ids that ModelOpt calibrated on, as [samples, tokens]."""
    batches = load_file(source / "calib_input_ids.safetensors")
    ordered = [batches[f"input_ids.{number}"] for number in range(len(batches))]
    save_file({"input_ids": torch.cat(ordered)}, file)
    return file


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ids")
    return {name: ids_of(source, folder / f"{name}.safetensors") for name, source in SOURCES.items()}


def modelopt_statistics(name: str, formats: str = "FP8-KVFP8") -> dict[str, torch.Tensor]:
    """ModelOpt's state after calibration, under the names that a calibration file has."""
    state = load_file(GOLDEN / "calibration" / f"{name}-{formats}.safetensors")
    kinds = {
        ".input_quantizer._amax": ".input_amax",
        "self_attn.k_bmm_quantizer._amax": "self_attn.k_proj.k_amax",
        "self_attn.v_bmm_quantizer._amax": "self_attn.v_proj.v_amax",
    }
    return {
        key.replace(theirs, ours): value.float()
        for key, value in state.items()
        for theirs, ours in kinds.items()
        if key.endswith(theirs)
    }


def save(theirs: dict[str, torch.Tensor], file: Path, config: dict) -> None:
    """Statistics under the names of HF as a calibration file."""
    statistics.save({key: theirs[on_disk[0]] for key, on_disk in hf_keys(config).items()}, file, config)


@pytest.mark.parametrize(("form", "route"), [("fp8", "FP8-mcore"), ("nvfp4", "NVFP4")])
@pytest.mark.parametrize("name", SOURCES)
def test_every_weight_and_weight_scale_equals_modelopt(
    name: str, form: str, route: str, ids: dict, ranks: Ranks, tmp_path: Path
) -> None:
    export(ranks, 2, "--tp", 2, "--hf-model", SOURCES[name], "--format", form, "--calib-data", ids[name],
        "--calib-samples", 8, "--output", tmp_path / "out")  # fmt: skip
    ours, golden = tensors(tmp_path / "out"), tensors(GOLDEN / "models" / f"{name}-{route}")
    assert sorted(ours) == sorted(golden)
    weights = [key for key in golden if not key.endswith("input_scale")]
    assert [key for key in weights if not same(ours[key], golden[key])] == []


@pytest.mark.parametrize(("name", "form", "route"), UNMEASURED)
def test_where_nothing_is_measured_every_tensor_equals_modelopt(
    name: str, form: str, route: str, ranks: Ranks, tmp_path: Path
) -> None:
    """ModelOpt's W4A16_NVFP4 of the other sources has the bytes of its NVFP4, but for the scales of inputs."""
    source, flags = GOLDEN / "models" / f"{name}-bf16", ("--ep", 2) if "moe" in name else ()
    export(
        ranks,
        4 if flags else 2,
        "--tp",
        2,
        *flags,
        "--hf-model",
        source,
        "--format",
        form,
        "--output",
        tmp_path / "out",
    )
    golden = tensors(GOLDEN / "models" / f"{name}-{route}")
    assert_same(tensors(tmp_path / "out"), {key: golden[key] for key in golden if not key.endswith("input_scale")})


SCALES = ("k_scale", "v_scale")
LEAST = 0.015  # above two of the four scales in this checkpoint


@pytest.mark.parametrize(
    ("name", "scales", "cache"),
    [
        *((name, (), lambda golden: golden) for name in SOURCES),
        ("llama", ("--kv-scale", 1), lambda golden: {n: t for n, t in golden.items() if not n.endswith(SCALES)}),
        (
            "llama",
            ("--kv-scale-at-least", LEAST),
            lambda golden: golden | {n: t.clamp(min=LEAST) for n, t in golden.items() if n.endswith(SCALES)},
        ),
    ],
    ids=[*SOURCES, "fp8_cast", "at least"],
)
def test_with_modelopt_statistics_every_tensor_of_the_fp8_kv_checkpoint_is_equal(
    name: str, scales: tuple, cache: Callable[[dict], dict], ranks: Ranks, tmp_path: Path
) -> None:
    """Except weights that ModelOpt's HF route quantizes apart and engines fuse: q, k, v and gate, up."""
    config = read_json(SOURCES[name] / "config.json")
    theirs = modelopt_statistics(name)
    assert sorted(theirs) == sorted(key for on_disk in hf_keys(config).values() for key in on_disk)
    save(theirs, tmp_path / "c.safetensors", config)
    export(ranks, 2, "--tp", 2, "--hf-model", SOURCES[name], "--kv-cache", "fp8", *scales, "--output", tmp_path / "out",
        "--load-calibration", tmp_path / "c.safetensors")  # fmt: skip
    ours, golden = tensors(tmp_path / "out"), cache(tensors(GOLDEN / "models" / f"{name}-FP8-KVFP8"))
    fused = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    apart = {key for key in golden if any(part in key for part in fused)}
    assert sorted(ours) == sorted(golden)
    assert [key for key in golden.keys() - apart if not same(ours[key], golden[key])] == []
    assert len(golden.keys() - apart) > 25


@pytest.mark.parametrize("name", SOURCES)
def test_with_modelopt_statistics_every_tensor_of_the_nvfp4_kv_checkpoint_is_equal(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    config = read_json(SOURCES[name] / "config.json")
    save(modelopt_statistics(name, "NVFP4-KVNVFP4"), tmp_path / "c.safetensors", config)
    export(ranks, 2, "--tp", 2, "--hf-model", SOURCES[name], "--format", "nvfp4", "--kv-cache", "nvfp4", "--output",
        tmp_path / "out", "--load-calibration", tmp_path / "c.safetensors")  # fmt: skip
    assert_same(tensors(tmp_path / "out"), tensors(GOLDEN / "models" / f"{name}-NVFP4-KVNVFP4"))


def test_given_all_scales_nothing_is_calibrated(ranks: Ranks, tmp_path: Path) -> None:
    """The model has no tokenizer, without which no text is run."""
    said = export(ranks, 2, "--tp", 2, "--hf-model", SOURCES["llama"], "--format", "nvfp4", "--kv-cache", "nvfp4",
        "--kv-scale", 0.25, "--input-scale", 1.5, "--output", tmp_path / "out")  # fmt: skip
    given = dict.fromkeys(SCALES, torch.tensor(0.25)) | {"input_scale": torch.tensor(1.5)}
    golden = tensors(GOLDEN / "models" / "llama-NVFP4-KVNVFP4")
    assert_same(tensors(tmp_path / "out"), {n: given.get(n.rpartition(".")[2], t) for n, t in golden.items()})
    assert "calibrate" not in said


def test_fp8_pb_in_modelopt_spelling_is_equal_but_for_the_dims_of_single_blocks(ranks: Ranks, tmp_path: Path) -> None:
    """ModelOpt drops the dims of a scale that is one block, on which vLLM's loader fails, and then takes it for the scale of
    a tensor, which fused linears share: q, k and v, of one block each, get the largest of the three, and lose precision.
    """
    export(ranks, 2, "--tp", 2, "--hf-model", SOURCES["llama"], "--format", "fp8_pb", "--fp8-pb-spelling", "modelopt",
        "--output", tmp_path / "out")  # fmt: skip
    ours, golden = tensors(tmp_path / "out"), tensors(GOLDEN / "models" / "llama-FP8_PB_WO")
    single = [key for key, tensor in golden.items() if tensor.dim() == 0]
    assert len(single) == 8  # q, k, v, o of two layers
    for key in single:
        assert ours[key].shape == (1, 1, 1, 1)
    fused = {key for key in golden if any(f"{part}_proj" in key for part in "qkv")}
    reshaped = golden | {key: golden[key].view(1, 1, 1, 1) for key in single}
    assert_same(
        {k: t for k, t in ours.items() if k not in fused}, {k: t for k, t in reshaped.items() if k not in fused}
    )
    assert all(ours[key] <= reshaped[key] for key in fused if key.endswith("scale"))


def searched_by(squares: bool, *flags: object) -> tuple[int, str]:
    """In a rank: the command, whose searches make losses of the squares of inputs, or all of them of outputs."""
    with mock.patch.object(awq_gram, "pays", lambda *sizes: squares):
        return command(*flags)


@pytest.mark.parametrize(("name", "form"), [("llama", "int4_awq"), ("llama", "w4a8_awq"), ("qwen3", "int4_awq")])
def test_an_awq_search_of_a_whole_model_comes_out_as_modelopt_did(
    name: str, form: str, ids: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """For o_proj and down_proj: ModelOpt searches q, k, v and gate, up one by one and averages, we search them as the one
    linear that they are. Inputs differ by roundings (see below): a factor is a mean in bfloat16, and moves by one of its
    steps, 2^-7 of its value at most; the alphas are the same, or factors would move by far more.
    """
    data = ("--calib-data", ids[name], "--calib-samples", 8, "--calib-batch-size", 2)
    flags = ("--device", "cpu", "--hf-model", SOURCES[name], *data, "--format", form, "--output")
    for way, squares in (("out", False), ("squares", True)):
        assert ranks.call(1, searched_by, squares, *flags, tmp_path / way)[0][0] == 0
    assert_same(tensors(tmp_path / "squares"), tensors(tmp_path / "out"))
    ours, golden = tensors(tmp_path / "out"), tensors(GOLDEN / "models" / f"{name}-{form.upper()}")
    assert sorted(ours) == sorted(golden)
    assert [key for key in golden if (ours[key].dtype, ours[key].shape) != (golden[key].dtype, golden[key].shape)] == []
    vectors = [key for key in golden if key.endswith("pre_quant_scale")]
    assert len(vectors) == 4
    for key in vectors:
        torch.testing.assert_close(ours[key], golden[key], rtol=2**-7, atol=0)
        codes = key.replace("pre_quant_scale", "weight")
        assert (packing.unpack(ours[codes], 0) == packing.unpack(golden[codes], 0)).float().mean() > 0.99


@pytest.mark.parametrize("name", SOURCES)
def test_statistics_are_those_of_modelopt_up_to_rounding(name: str, ids: dict, ranks: Ranks, tmp_path: Path) -> None:
    """ModelOpt measured transformers' model, we measure Megatron's: the same mathematics, with other kernels between
    the roundings to bfloat16. 8 ulp of 2^-8, as between topologies.
    """
    export(ranks, 1, "--hf-model", SOURCES[name], "--calib-data", ids[name], "--calib-samples", 8, "--calib-batch-size", 2,
        "--save-calibration", tmp_path / "c.safetensors", "--output", tmp_path / "out")  # fmt: skip
    ours, theirs = load_file(tmp_path / "c.safetensors"), modelopt_statistics(name)
    assert sorted(ours) == sorted(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=8 * 2**-8, atol=0)


def test_a_saved_file_comes_back_and_another_model_refuses_it(ranks: Ranks, tmp_path: Path) -> None:
    llama, qwen3 = (read_json(source / "config.json") for source in SOURCES.values())
    made = {key: torch.tensor(float(number)) for number, key in enumerate(hf_keys(llama))}
    statistics.save(made, tmp_path / "c.safetensors", llama)
    assert_same(statistics.load(tmp_path / "c.safetensors", llama), made)
    with pytest.raises(ExportError, match="its architecture is 'LlamaForCausalLM', here 'Qwen3ForCausalLM'"):
        statistics.load(tmp_path / "c.safetensors", qwen3)
