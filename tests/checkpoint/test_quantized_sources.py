"""Originals that their publishers quantized, in MXFP4 or packed INT4, are read as they are; others are refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_export.checkpoint.hf_weights import SourceWeights
from megatron_export.checkpoint.original import config_alone
from megatron_export.checkpoint.reading_cost import mapped_bytes
from megatron_export.common.errors import ExportError
from megatron_export.models import parameters_of
from megatron_export.verify.emulation import bits_per_weight, load

from ..export.test_topologies import calibration_flags, export
from ..support.command_line import command_line
from ..support.models import assert_same, read_json, tensors
from ..support.quantized_sources import E2M1, INT4, KIMI, int4_deepseek, mxfp4_deepseek, mxfp4_gpt_oss
from ..support.ranks import Ranks
from ..support.refusals import configured, rewritten

MADE = {"mxfp4": mxfp4_gpt_oss, "int4": int4_deepseek, "packed": mxfp4_deepseek}
TOPOLOGIES = [  # experts with biases are not cut
    ("mxfp4", 1), ("mxfp4", 2, "--tp", 2, "--etp", 1), ("mxfp4", 2, "--ep", 2), ("mxfp4", 2, "--pp", 2),
    ("packed", 4, "--tp", 4), ("int4", 1), ("int4", 2, "--tp", 2), ("int4", 4, "--tp", 4), ("int4", 2, "--ep", 2),
]  # fmt: skip
EXPERTS = "model.layers.1.mlp.experts"
DOWN = f"{EXPERTS}.0.down_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Name -> a folder, and the tensors that it means."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MADE.items()}


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda topology: "".join(map(str, topology)))
def test_every_weight_is_its_codes_times_the_scale_of_their_group_in_bfloat16(
    topology: tuple, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    name, world, *sizes = topology
    folder, expected = quantized[name]
    export(ranks, world, "--hf-model", folder, "--format", "bf16", *sizes, "--output", tmp_path / "out")
    assert_same(tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


@pytest.mark.parametrize(
    ("world", "sizes"), [(1, ()), (2, ("--tp", 2, "--etp", 1)), (2, ("--ep", 2)), (2, ("--pp", 2, "--writers", "all"))]
)
def test_gpt_oss_in_mxfp4_is_the_original_again_to_the_bit(
    world: int, sizes: tuple, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    folder, out = quantized["mxfp4"][0], tmp_path / "out"
    said = export(ranks, world, "--hf-model", folder, "--format", "mxfp4", *sizes, "--output", out, "--verify",
                  "--target", "vllm,sglang,tensorrt_llm")  # fmt: skip
    assert_same(tensors(out), tensors(folder))
    told, given = read_json(out / "config.json"), read_json(folder / "config.json")
    assert told["quantization_config"] == given["quantization_config"]
    assert not (out / "hf_quant_config.json").exists()
    assert "files of this architecture in mxfp4 have experts alone in it" in said
    assert "48 quantized weights (48 equal)" in said
    status, judged = command_line("verify", out, "--reference", folder)
    assert status == 0, judged
    status, same = command_line("diff", out, folder)
    assert status == 0, same


def test_mxfp4_of_gpt_oss_is_scored_as_the_original_is(quantized: dict, ranks: Ranks, tmp_path: Path) -> None:
    folder = quantized["mxfp4"][0]
    export(ranks, 1, "--hf-model", folder, "--format", "mxfp4", "--output", tmp_path / "out")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(folder)(ids).logits)
    assert bits_per_weight(tmp_path / "out") == 4.25


def test_a_changed_code_or_scale_of_gpt_oss_is_found(quantized: dict, ranks: Ranks, tmp_path: Path) -> None:
    folder, out = quantized["mxfp4"][0], tmp_path / "out"
    export(ranks, 1, "--hf-model", folder, "--format", "mxfp4", "--output", out)
    held = tensors(out)
    held[f"{EXPERTS}.down_proj_scales"][2] += 1
    save_file(held, out / "model.safetensors")
    status, judged = command_line("verify", out, "--reference", folder)
    assert status == 1
    assert f"{EXPERTS}.2.down_proj.weight" in judged
    assert command_line("diff", out, folder)[0] == 1


def test_mxfp4_is_what_transformers_makes_of_it(quantized: dict) -> None:
    folder, expected = quantized["mxfp4"]
    held = tensors(folder)
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (held[f"{EXPERTS}.{name}_{kept}"] for kept in ("blocks", "scales"))
        assert torch.equal(convert_moe_packed_tensors(blocks, scales), expected[f"{EXPERTS}.{name}"])


@pytest.mark.parametrize(
    ("name", "fc", "where", "nbytes"),
    [  # of 64 x 64 weights: half a byte for a code, and a scale for 32 codes
        ("mxfp4", "linear_fc1", (slice(16, 32),), 16 * (32 + 2)),
        ("mxfp4", "linear_fc2", (slice(None), slice(32, 64)), 64 * (16 + 1)),
        ("mxfp4", "linear_fc2", (slice(None), slice(16, 32)), 64 * (16 + 1)),
        ("int4", "linear_fc1", (slice(16, 32),), 16 * (32 + 4) + 16),  # scales of two bytes; and the shape
        ("int4", "linear_fc2", (slice(None), slice(32, 64)), 64 * (16 + 2) + 16),
    ],
)
def test_a_part_of_a_weight_takes_the_bytes_of_that_part(
    name: str, fc: str, where: tuple[slice, ...], nbytes: int, quantized: dict
) -> None:
    folder, _ = quantized[name]
    config = read_json(folder / "config.json")
    source = parameters_of(config)[f"decoder.layers.1.mlp.experts.2.{fc}.weight"]
    with SourceWeights(folder, config=config) as weights:
        part = next(iter(source.names()))
        found = weights.read_part(source, part, where)
        assert weights.nbytes == nbytes
        assert torch.equal(found, weights.read_part(source, part, (slice(None), slice(None)))[where])


@pytest.mark.parametrize("name", MADE)
def test_the_forecast_of_what_is_read_is_what_the_files_have(name: str, quantized: dict) -> None:
    folder, _ = quantized[name]
    config = read_json(folder / "config.json")
    sources = [
        s for canonical, s in parameters_of(config).items() if re.search(r"experts\.\d+\.\w+\.weight", canonical)
    ]
    on_disk = sum(held.nbytes for key, held in tensors(folder).items() if re.search(r"_(blocks|scales?|packed)$", key))
    assert sum(mapped_bytes(config, source, 2 * source.shape[0] * source.shape[1]) for source in sources) == on_disk


@pytest.mark.parametrize("name", MADE)
def test_an_original_is_scored_as_the_model_that_its_weights_are(name: str, quantized: dict, tmp_path: Path) -> None:
    folder, expected = quantized[name]
    plain = shutil.copytree(folder, tmp_path / "plain")
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, plain / "model.safetensors")
    configured(quantization_config=None)(plain)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, load(plain)(ids).logits)


def said(change: Callable[[dict], object], quantization: dict = KIMI) -> Callable[[Path], None]:
    """Change what config.json says of quantization."""

    def write(folder: Path) -> None:
        changed = json.loads(json.dumps(quantization))
        change(changed)
        config = read_json(folder / "config.json") | {"quantization_config": changed}
        (folder / "config.json").write_text(json.dumps(config))

    return write


def of_weights(**changes: object) -> Callable[[Path], None]:
    return said(lambda config: config["config_groups"]["group_0"].update(weights=INT4 | changes))


ALREADY = "is quantized already (quant_method 'compressed-tensors', {}); give the original model"
BLOCKS, SCALES = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"
# fmt: off
REFUSED = {  # which original, the change, what is said of it
    "an odd group":      ("int4", of_weights(group_size=12), ALREADY.format("group_size 12")),
    "no group":          ("int4", of_weights(group_size=None, strategy="channel"),
                          ALREADY.format("strategy 'channel', group_size None")),
    "zero points":       ("int4", of_weights(symmetric=False), ALREADY.format("symmetric False")),
    "eight bits":        ("int4", of_weights(num_bits=8), ALREADY.format("num_bits 8")),
    "inputs in order":   ("int4", of_weights(actorder="group"), ALREADY.format("actorder 'group'")),
    "quantized inputs":  ("int4", said(lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
                          ALREADY.format("inputs are quantized too")),
    "another packing":   ("int4", said(lambda q: q.update(format="marlin-24")), ALREADY.format("format 'marlin-24'")),
    "transforms":        ("int4", said(lambda q: q.update(transform_config={"u": 1})),
                          ALREADY.format("transform_config {'u': 1}")),
    "no groups":         ("int4", said(lambda q: q.update(config_groups=[])), ALREADY.format("config_groups []")),
    "two groups":        ("int4", said(lambda q: q["config_groups"].update(two={"weights": INT4 | {"group_size": 64}})),
                          ALREADY.format("group_size 32 and 64")),
    "another group":     ("int4", of_weights(group_size=64), f"tensor {DOWN}_scale is (64, 2), but config.json means (64, 1)"),
    "zero points unsaid": ("int4", rewritten(lambda h: h.update({f"{DOWN}_zero_point": torch.zeros(8, 2)})),
                           f"tensor {DOWN}_zero_point says that its weight has zero points"),
    "an order unsaid":   ("int4", rewritten(lambda h: h.update({f"{DOWN}_g_idx": torch.zeros(64)})),
                          f"tensor {DOWN}_g_idx says that its weight has groups of inputs in another order (actorder)"),
    "no scale":          ("int4", rewritten(lambda h: h.pop(f"{DOWN}_scale")), f"tensor {DOWN}_scale is missing"),
    "no shape":          ("int4", rewritten(lambda h: h.pop(f"{DOWN}_shape")), f"tensor {DOWN}_shape is missing"),
    "no codes":          ("int4", rewritten(lambda h: h.pop(f"{DOWN}_packed")), f"tensor {DOWN} is missing"),
    "codes too narrow":  ("int4", rewritten(lambda h: h.update({f"{DOWN}_packed": h[f"{DOWN}_packed"][:, 1:].contiguous()})),
                          f"tensor {DOWN}_packed is (64, 7), but config.json means (64, 8)"),
    "codes of bytes":    ("int4", rewritten(lambda h: h.update({f"{DOWN}_packed": h[f"{DOWN}_packed"].to(torch.int8)})),
                          f"tensor {DOWN}_packed is I8, not I32"),
    "no scales":         ("mxfp4", rewritten(lambda h: h.pop(SCALES)), f"tensor {SCALES} is missing"),
    "no blocks":         ("mxfp4", rewritten(lambda h: h.pop(BLOCKS)), f"tensor {EXPERTS}.down_proj is missing"),
    "wider blocks":      ("mxfp4", rewritten(lambda h: h.update({BLOCKS: h[BLOCKS].view(4, 64, 1, 32)})),
                          f"tensor {BLOCKS} is (4, 64, 1, 32), but config.json means (4, 64, 2, 16)"),
    "an expert less":    ("mxfp4", rewritten(lambda h: h.update({SCALES: h[SCALES][1:].clone()})),
                          f"tensor {SCALES} is (3, 64, 2), but config.json means (4, 64, 2)"),
    "scales in floats":  ("mxfp4", rewritten(lambda h: h.update({SCALES: h[SCALES].float()})), f"tensor {SCALES} is F32, not U8"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_before_any_weight_is_read(case: str, quantized: dict, tmp_path: Path) -> None:
    name, change, words = REFUSED[case]
    folder = shutil.copytree(quantized[name][0], tmp_path / "model")
    change(folder)
    status, printed = command_line("plan", "--hf-model", folder, "--format", "bf16")
    assert status == 1
    assert words in printed.replace("\n", " ")
    with pytest.raises(ExportError) as caught:
        config_alone(folder, "keep", weights=True, own=True)
    assert words in str(caught.value)


def test_a_shape_that_contradicts_its_codes_is_refused_when_it_is_read(quantized: dict, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized["int4"][0], tmp_path / "model")
    rewritten(lambda h: h[f"{DOWN}_shape"].fill_(32))(folder)
    with (
        SourceWeights(folder, config=read_json(folder / "config.json")) as weights,
        pytest.raises(ExportError) as caught,
    ):
        weights.read(DOWN, (slice(None),), torch.bfloat16)
    assert f"tensor {DOWN} is (64, 64), but its weight_shape says (32, 32)" in str(caught.value)


def decoded(codes: Tensor, scales: Tensor, second: Tensor) -> Tensor:
    """NVFP4 uint8 [..., out, in/2] -> [..., out, in]."""
    blocks = torch.stack((codes % 16, codes // 16), dim=-1).flatten(-2).unflatten(-1, (-1, 16)).int()
    return (torch.tensor(E2M1)[blocks % 8] * (1 - 2 * (blocks // 8)) * second * scales.float().unsqueeze(-1)).flatten(
        -2
    )


@pytest.mark.parametrize(
    ("name", "world", "sizes", "items"),
    [  # of layers and experts, two parameters each; the first layer of DeepSeek has no experts
        ("mxfp4", 1, (), 4 * 4 * 2),
        ("mxfp4", 2, ("--ep", 2), 4 * 4 * 2),
        ("mxfp4", 2, ("--tp", 2, "--etp", 1), 4 * 4 * 2),
        ("packed", 2, ("--tp", 2), 3 * 4 * 2),
    ],
)
def test_mxfp4_keeps_its_values_in_nvfp4_to_the_bit_and_says_so(
    name: str, world: int, sizes: tuple, items: int, quantized: dict, ranks: Ranks, tmp_path: Path
) -> None:
    folder, expected = quantized[name]
    flags = ("--hf-model", folder, "--format", "nvfp4", *calibration_flags(folder), "--verify")
    said = export(ranks, world, *flags, *sizes, "--output", tmp_path / "out")
    note = f"{items} weights come from MXFP4, and nvfp4 keeps their values to the bit"
    assert note in " ".join(said.split())
    assert note in " ".join(command_line("plan", "--hf-model", folder, "--format", "nvfp4")[1].split())
    assert read_json(tmp_path / "out" / "export_manifest.json")["run"]["cast"] == {"mxfp4 to nvfp4": items}
    held, checked = tensors(tmp_path / "out"), 0
    for key, values in expected.items():
        if values.dim() == 3:  # a stack [experts, in, out]
            codes, scales = (held[f"{key}{suffix}"].transpose(1, 2) for suffix in ("", "_weight_scale"))
            assert torch.equal(decoded(codes, scales, held[f"{key}_weight_scale_2"]).transpose(1, 2), values.float()), (
                key
            )
        elif ".mlp.experts." in key and values.dim() == 2 and key.endswith(".weight"):
            assert torch.equal(decoded(held[key], held[f"{key}_scale"], held[f"{key}_scale_2"]), values.float()), key
        else:
            continue
        checked += 1
    assert checked == {"mxfp4": 4 * 2, "packed": 3 * 4 * 3}[name]
    assert f"({items * 3 // 2} equal)" in said  # gates and ups apart
    status, judged = command_line("verify", tmp_path / "out", "--reference", folder)
    assert status == 0, judged
