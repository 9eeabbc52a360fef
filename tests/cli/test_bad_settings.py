"""Bad flags and bad targets: every rank stops within seconds, rank 0 says what is wrong, and no file is touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ..export.test_topologies import calibration_flags
from ..support.ranks import Ranks, command
from ..support.refusals import SECONDS, assert_says, fp8, occupy, refused

USAGES: dict[str, tuple[tuple, tuple[str, ...]]] = {
    "format": (
        ("--format", "int4"),
        (
            "--format",
            "'int4'",
            "'nvfp4_awq', 'w4a16_nvfp4', ",
            "'int4_awq', 'w4a8_awq'",
        ),
    ),
    "KV cache": (("--kv-cache", "int8"), ("--kv-cache", "'int8'", "'none', 'fp8', 'nvfp4'")),
    "group": (("--group-size", 32), ("--group-size", "32", "128, 64")),
    "spelling": (("--fp8-pb-spelling", "deepseek"), ("--fp8-pb-spelling", "'deepseek'", "'native', 'modelopt'")),
    "device": (("--device", "tpu"), ("--device", "'tpu'", "'cuda', 'cpu'")),
    "flag": (("--quantize", "all"), ("unrecognized arguments: --quantize all",)),
    "no ranks": (("--tp", 0), ("--tp must be at least 1, not 0",)),
    "not a number": (("--pp", "two"), ("--pp", "invalid int value: 'two'")),
    "no samples": (("--calib-samples", 0), ("--calib-samples must be at least 1, not 0",)),
    "size": (("--max-shard-size", "5XB"), ("'5XB' is not a size", "like 5GB")),
    "target": (("--target", "vllm,tgi"), ("unknown engine 'tgi'. Known: vllm, sglang, tensorrt_llm",)),
    "calibration of fp8_pb": (
        ("--format", "fp8_pb", "--calib-data", "none.txt"),
        ("--format fp8_pb needs no calibration", "--calib-data"),
    ),
    "calibration of bf16": (("--format", "bf16"), ("--format bf16 needs no calibration", "--calib-data")),
    "two checkpoints": (
        ("--megatron-checkpoint", "x", "--dcp-checkpoint", "y"),
        ("--dcp-checkpoint and --megatron-checkpoint both give the weights",),
    ),
    "two calibrations": (("--load-calibration", "x"), ("--load-calibration replaces", "--calib-data have no effect")),
}


@pytest.mark.parametrize("case", USAGES)
def test_bad_usage_ends_with_status_2(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags, words = USAGES[case]
    assert_says(refused(ranks, tmp_path, *fp8(source, output), *flags, status=2), *words)


def test_a_missing_output_is_refused_with_status_2(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    assert_says(refused(ranks, tmp_path, "--hf-model", source, status=2), "--output DIR is needed (or --dry-run)")


def from_a_folder_of_its_own(place: Path, *words: object) -> tuple[int, str]:
    """In a rank: the command, typed where only rank 0 finds what is named without a path, as on nodes with disks of their own."""
    folder, before = place / os.environ["RANK"], Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        return command(*words)
    finally:
        os.chdir(before)


def test_a_recipe_that_one_rank_cannot_read_ends_all_ranks(source: Path, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "own.yaml").write_text("formats: [{'*': fp8}]")
    words = ("--device", "cpu", "--hf-model", source, "--recipe", "own.yaml", "--output", tmp_path / "out")
    (status, said), (other, _) = ranks.call(2, from_a_folder_of_its_own, tmp_path, *words, seconds=SECONDS)
    assert (status, other) == (1, 1)
    assert_says(said, "own.yaml: not read (No such file or directory)", "rank 1")
    assert not (tmp_path / "out").exists()


FUSED = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
WITHOUT_EFFECT: dict[str, tuple[tuple, tuple[str, ...]]] = {
    "KV cache of bf16": (
        ("--format", "bf16", "--kv-cache", "fp8"),
        ("--kv-cache fp8 with --format bf16", "vLLM refuses", "Export without it"),
    ),
    "exclude of bf16": (("--format", "bf16", "--exclude", "*"), ("--exclude has no effect with --format bf16",)),
    "no module": (("--format", "fp8", "--exclude", "*.w9"), ("--exclude '*.w9' matches no module", f"like {FUSED[0]}")),
    "q alone": (
        ("--format", "fp8", "--exclude", FUSED[0]),
        ("engines fuse", f"must have one format: {FUSED[0]} bf16 (--exclude {FUSED[0]!r}); {FUSED[1]}, {FUSED[2]} fp8"),
    ),
}


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_what_has_no_effect_is_refused(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    flags, words = WITHOUT_EFFECT[case]
    data = calibration_flags(source) if "bf16" not in flags else ()
    said = refused(ranks, tmp_path, "--tp", 2, "--hf-model", source, "--output", output, *data, *flags)
    assert_says(said, *words)


def around(name: str) -> Callable[[Path, Path], object]:
    """The target holds a copy of the source, of that name."""
    return lambda source, output: shutil.copytree(source, output / name)


WAY_OUT = "Give another --output"
TARGETS: dict[str, tuple[Callable[[Path, Path], object], str, tuple[str, ...]]] = {
    "not empty": (lambda source, output: occupy(output), "", ("{0} is not empty", f"{WAY_OUT}, or --overwrite")),
    "a file": (lambda source, output: output.write_text("mine"), "--overwrite", ("{0} is a file; give a folder",)),
    "below a file": (lambda source, output: output.parent.rmdir() or output.parent.write_text("mine"), "--overwrite",
                     ("{0}: {0.parent} is a file", WAY_OUT)),
    "a link to the source": (lambda source, output: output.symlink_to(source), "--overwrite --hf-model {0}",
                             ("{0} holds", WAY_OUT)),
    "the source": (around(""), "--overwrite --hf-model {0}", ("{0} holds", WAY_OUT)),
    "around the calibration data": (around(""), "--overwrite --calib-data {0}/data.txt", ("{0} holds {0}/data.txt", WAY_OUT)),
    "around the source": (around("original"), "--overwrite --hf-model {0}/original", ("{0} holds", WAY_OUT)),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_a_target_to_keep_is_refused(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    prepare, flags, words = TARGETS[case]
    prepare(source, output)
    said = refused(ranks, tmp_path, *fp8(source, output), *flags.format(output).split())
    assert_says(said, *(word.format(output) for word in words))
