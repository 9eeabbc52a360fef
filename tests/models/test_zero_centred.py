"""Norms that multiply by 1 more than their weights: the same model, calibrated, smoothed and judged as with plain norms."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export.models import ARCHITECTURES
from megatron_export.models.blocks import zero_centred
from megatron_export.verify.thresholds import Wanted, inspected

from ..export.test_topologies import calibration_flags
from ..support.models import make_model, same, tensors
from ..support.ranks import Ranks, command

pytestmark = pytest.mark.whole

QWEN3 = ARCHITECTURES["Qwen3ForCausalLM"]
CENTRED = replace(
    QWEN3,
    rules=zero_centred(QWEN3.rules),
    settings={**QWEN3.settings, "layernorm_zero_centered_gamma": True},
)


@contextmanager
def centred() -> Iterator[None]:
    """While open, the norms of this process's Qwen 3 are zero-centred."""
    with mock.patch.dict(ARCHITECTURES, {"Qwen3ForCausalLM": CENTRED}):
        yield


def exporting(*flags: object) -> tuple[int, str]:
    """In a rank: the command, where norms are zero-centred."""
    with centred():
        return command(*flags)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 3 whose norms are numbers that bfloat16 holds, and holds less 1."""
    source = make_model(tmp_path_factory.mktemp("plain"), "qwen3")
    held = load_file(source / "model.safetensors")
    made = {name: (t * 64).round() / 64 if "norm" in name else t for name, t in held.items()}
    save_file(made, source / "model.safetensors")
    return source


@pytest.fixture(scope="module")
def less_1(plain: Path) -> Path:
    """The same model with zero-centred norms."""
    source = plain.parent / "less_1"
    shutil.copytree(plain, source)
    held = load_file(plain / "model.safetensors")
    save_file({name: t - 1 if "norm" in name else t for name, t in held.items()}, source / "model.safetensors")
    return source


def test_it_is_calibrated_and_smoothed_as_the_same_model_with_plain_norms(
    plain: Path, less_1: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Every quantized byte is the same; norms are 1 less, but for the rounding of both to bfloat16."""
    statistics = tmp_path / "statistics.safetensors"
    common = ("--device", "cpu", "--format", "nvfp4_awq", "--tp", 2)
    measured = (*common, "--hf-model", plain, *calibration_flags(plain), "--save-calibration", statistics)
    assert [s for s, _ in ranks.call(2, command, *measured, "--output", tmp_path / "plain")] == [0, 0]
    own = (*common, "--hf-model", less_1, *calibration_flags(plain), "--save-calibration", tmp_path / "own.safetensors")
    assert [s for s, _ in ranks.call(2, exporting, *own, "--output", tmp_path / "own")] == [0, 0]
    ours, theirs = load_file(tmp_path / "own.safetensors"), load_file(statistics)
    for key in (key for key in theirs if key.endswith("input_amax")):
        torch.testing.assert_close(ours[key], theirs[key], rtol=2**-5, atol=0)  # rms_norm rounds at another place

    loaded = (*common, "--hf-model", less_1, "--load-calibration", statistics, "--output", tmp_path / "less_1")
    assert [s for s, _ in ranks.call(2, exporting, *loaded)] == [0, 0]
    ours, theirs = tensors(tmp_path / "less_1"), tensors(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    norms = {name for name in ours if "norm" in name}
    assert [name for name in ours.keys() - norms if not same(ours[name], theirs[name])] == []
    moved = 0
    for name in norms:
        torch.testing.assert_close(1 + ours[name].float(), theirs[name].float(), rtol=2**-7, atol=2**-9)
        moved += not torch.equal(1 + ours[name].float(), tensors(plain)[name].float())
    assert moved >= 8  # two in each layer

    with centred():
        found = inspected(tmp_path / "less_1", less_1, Wanted())
    assert (found.problems, found.judged.plan.format) == ([], "nvfp4_awq")


def test_it_gives_every_byte_back_in_bfloat16(less_1: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--format", "bf16", "--hf-model", less_1, "--output", tmp_path / "out")
    assert [s for s, _ in ranks.call(1, exporting, *flags)] == [0]
    ours, theirs = tensors(tmp_path / "out"), tensors(less_1)
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in theirs)
