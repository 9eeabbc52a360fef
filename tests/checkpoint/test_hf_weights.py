"""Sources in blocks of FP8, as DeepSeek publishes its models: each rank multiplies out its own part."""

from pathlib import Path

import pytest
import torch

from ..export.test_topologies import export
from ..support.models import assert_same, make_model, read_json, tensors
from ..support.ranks import Ranks, living

TOPOLOGIES = {"one": (1,), "tp2": (2, "--tp", 2), "ep2": (2, "--ep", 2), "pp2": (2, "--pp", 2), "tp4": (4, "--tp", 4)}


@pytest.fixture(scope="module")
def quantized(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes are not multiples of 128, written in blocks of FP8."""
    folder = tmp_path_factory.mktemp("blocks")
    source = make_model(folder, "deepseek_v3", hidden_size=192, q_lora_rank=160, intermediate_size=320)
    export(living(pool), 1, "--hf-model", source, "--format", "fp8_pb", "--output", folder / "fp8")
    assert read_json(folder / "fp8" / "config.json")["quantization_config"]["weight_block_size"] == [128, 128]
    return folder / "fp8"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_weight_is_its_codes_times_the_scale_of_their_block_in_bfloat16(
    topology: str, quantized: Path, ranks: Ranks, tmp_path: Path
) -> None:
    world, *sizes = TOPOLOGIES[topology]
    export(ranks, world, "--hf-model", quantized, "--format", "bf16", *sizes, "--output", tmp_path / "out")
    held, expected = tensors(quantized), {}
    for name, codes in held.items():
        if name.endswith("_scale_inv"):
            continue
        expected[name] = codes
        if f"{name}_scale_inv" in held:
            rows, columns = codes.shape
            scales = held[f"{name}_scale_inv"].repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            expected[name] = (codes.float() * scales).to(torch.bfloat16)
    assert sum(codes.dtype is torch.float8_e4m3fn for codes in held.values()) > 50
    assert_same(tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
