"""What a run reads and writes later is looked at first; a calibration that was measured is never lost."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from megatron_export.calibration import statistics
from megatron_export.cli import inputs, megatron_model
from megatron_export.cli.config import configured
from megatron_export.common.errors import ExportError
from megatron_export.verify import thresholds
from megatron_export.writing.file_systems import locked
from megatron_export.writing.journal import journal_of
from megatron_export.writing.target import check_writable

from ..export.test_topologies import calibration_flags, export
from ..support.command_line import command_line
from ..support.faults import Fault, export_with, flags_of
from ..support.models import EXAMPLE, LENGTH, assert_same, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, command_during, fp8, refused

pytestmark = pytest.mark.whole

BEGUN = "work was begun"


@contextmanager
def no_work() -> Iterator[None]:
    """In a rank: the first stage that takes time fails."""
    with mock.patch.object(megatron_model, "load", side_effect=RuntimeError(BEGUN)):
        yield


@contextmanager
def logged_out() -> Iterator[None]:
    """In a rank: the hub does not know who we are."""
    with no_work(), mock.patch("huggingface_hub.HfApi") as api:
        api().whoami.side_effect = OSError("no token")
        yield


def with_tokenizer(source: Path) -> Path:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / file, source / file)
    return source


# What a run writes.


@pytest.mark.parametrize("file", ["/proc/statistics.safetensors", "{}/" + "n" * 240])
def test_statistics_that_cannot_be_written_are_refused_before_any_work(
    file: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    file = file.format(tmp_path)
    said = refused(ranks, tmp_path, *fp8(source, output), "--save-calibration", file, fault=no_work)
    assert_says(said, f"--save-calibration {file}: cannot write in {Path(file).parent}", "Give another place")


def test_what_was_tried_is_removed(tmp_path: Path) -> None:
    check_writable(tmp_path, "n" * 255, "--output")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match=r"--output: cannot write in /proc \(.*\)\. Give another place"):
        check_writable(Path("/proc"), "out", "--output")
    with pytest.raises(ExportError, match="File name too long"):
        check_writable(tmp_path, "n" * 256, "--output")


def test_a_target_that_another_export_has_is_refused_before_any_work(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    lock = locked(output, journal_of(output))
    said = refused(ranks, tmp_path, *fp8(source, output), fault=no_work)
    assert_says(said, f"another export into {output} is running")
    os.close(lock)
    export(ranks, 2, *fp8(source, output))


def test_a_hub_that_nobody_is_logged_in_to_is_refused_before_any_work(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    said = refused(ranks, tmp_path, *fp8(source, output), "--push-to-hub", "org/name", fault=logged_out)
    assert_says(said, "--push-to-hub org/name: nothing could be uploaded there", "no token", "Log in")
    said = refused(ranks, tmp_path, *fp8(source, output), "--push-to-hub", "a/b/c", status=2, fault=no_work)
    assert_says(said, "--push-to-hub 'a/b/c': give the name of a repository")


# What a run reads.

TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "no text file {}. Give --verify-text one that exists"),
    "folder": (lambda file: file.mkdir(), "no text file {}. Give --verify-text one that exists"),
    "binary": (lambda file: file.write_bytes(bytes(range(256))), "{}: not a text (not in UTF-8"),
    "short": (lambda file: file.write_text("x = 1\n" * 9), "{}: 0 windows of 512 tokens; a standard error needs two"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_to_verify_on_that_is_none_is_refused_before_any_work(
    name: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    make, words = TEXTS[name]
    make(tmp_path / name)
    flags = (*fp8(with_tokenizer(source), output), "--verify", "--verify-text", tmp_path / name)
    said = refused(ranks, tmp_path, *flags, fault=no_work)
    assert_says(said, words.format(tmp_path / name), "--verify-text")


@pytest.mark.parametrize("name", TEXTS)
def test_the_command_verify_refuses_such_a_text_with_its_own_flag_before_it_compares(name: str, tmp_path: Path) -> None:
    make, words = TEXTS[name]
    make(tmp_path / name)
    with mock.patch.object(thresholds, "judge", side_effect=AssertionError(BEGUN)):
        status, said = command_line("verify", EXAMPLE, "--reference", EXAMPLE, "--text", tmp_path / name)
    assert status == 2
    assert_says(said, words.format(tmp_path / name).replace("--verify-text", "--text"), "--text")


def test_one_window_is_bad_usage() -> None:
    status, _ = command_line("verify", EXAMPLE, "--text", EXAMPLE / "heldout.txt", "--windows", 1)
    assert status == 2


def test_a_text_that_is_long_enough_after_its_beginning_is_taken(tmp_path: Path) -> None:
    from megatron_export.verify import perplexity

    (tmp_path / "text").write_text("x = 1\n" * 600)
    with mock.patch.object(perplexity, "LETTERS", 100):
        perplexity.check_text(tmp_path / "text", EXAMPLE)


def test_an_original_without_weights_cannot_be_judged_against(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    given = {"hf_model": str(source), "megatron_checkpoint": tmp_path, "output": tmp_path / "out", "format": "bf16"}
    inputs.original_of(configured(**given), EXAMPLE)
    with pytest.raises(ExportError, match="no weights"):
        inputs.original_of(configured(**given, verify=True), EXAMPLE)


def test_a_model_without_a_tokenizer_is_named_in_every_format(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    missing = f"{source} has no tokenizer: tokenizer.json and tokenizer_config.json"
    (source / "tokenizer_config.json").unlink()
    words = ("--calib-data", EXAMPLE / "calibration.txt", "--calib-samples", 2, "--calib-seq-len", LENGTH)
    assert_says(refused(ranks, tmp_path, *fp8(source, output), *words, fault=no_work), missing, "Add these files")
    usual = (
        "--hf-model",
        source,
        "--format",
        "fp8",
        "--output",
        output,
    )  # whose 512 tokens are more than the model's 128
    assert_says(refused(ranks, tmp_path, *usual, fault=no_work), missing)
    text = ("--verify", "--verify-text", EXAMPLE / "heldout.txt")
    assert_says(refused(ranks, tmp_path, *fp8(source, output), *text, fault=no_work), missing, "Add these files")
    for format in ("fp8", "fp8_pb", "bf16"):
        data = calibration_flags(source) if format == "fp8" else ()
        flags = ("--hf-model", source, "--format", format, *data)
        said = export(ranks, 1, *flags, "--output", tmp_path / format)
        assert_says(said, f"note              {missing}")
        assert_says(command_line("plan", *flags[:4])[1], f"note              {missing}")
    said = export(ranks, 1, "--hf-model", with_tokenizer(source), "--format", "bf16", "--output", tmp_path / "whole")
    assert "has no tokenizer" not in said


# How much calibration data there is.


def calibrated_on(said: str) -> list[str]:
    return re.findall(r"note +calibrated on (.*), as the data has no more", said)


def test_without_a_number_of_samples_what_the_text_has_is_taken_and_told(
    ranks: Ranks, output: Path, tmp_path: Path
) -> None:
    file = tmp_path / "words.txt"
    file.write_text((EXAMPLE / "calibration.txt").read_text()[:1000])
    flags = ("--format", "fp8", "--calib-data", file, "--calib-seq-len", 32, "--output", output)
    [number] = calibrated_on(export(ranks, 1, *flags))
    count = int(number.split()[0])
    assert 2 < count < 128 and number == f"{count} samples of 32 tokens"
    assert read_json(output / "export_manifest.json")["run"]["samples"] == count
    asked = (*flags, "--overwrite", "--calib-samples")
    said = refused(ranks, tmp_path / "place", *asked, count + 1)
    assert_says(said, f"too short for --calib-samples {count + 1} of --calib-seq-len 32")
    before = tensors(output)
    assert calibrated_on(export(ranks, 1, *asked, count)) == []
    assert_same(tensors(output), before)
    file.write_text("x = 1")
    assert_says(
        refused(ranks, tmp_path, *flags, "--overwrite"), "too short for --calib-samples 1 of --calib-seq-len 32"
    )


def test_without_a_number_of_samples_as_many_rows_are_taken_as_ranks_can_share(
    models: dict, ranks: Ranks, tmp_path: Path
) -> None:
    """Two ranks that exchange the tokens of experts need whole micro-batches, of four: eight samples of eleven."""
    ids = torch.arange(11 * LENGTH).view(11, LENGTH) % 500
    save_file({"input_ids": ids}, tmp_path / "eleven.safetensors")
    save_file({"input_ids": ids[:8].clone()}, tmp_path / "eight.safetensors")
    found = {}
    for name in ("eleven", "eight"):
        flags = ("--hf-model", models["qwen3_moe"], "--format", "fp8", "--ep", 2, "--output", tmp_path / name)
        said = export(ranks, 2, *flags, "--calib-data", tmp_path / f"{name}.safetensors")
        assert calibrated_on(said) == [f"8 samples of {LENGTH} tokens"]
        found[name] = tensors(tmp_path / name)
    assert_same(found["eleven"], found["eight"])


def test_samples_that_are_longer_than_the_model_was_made_for_are_refused(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    flags = ("--format", "fp8", "--output", output)
    said = refused(ranks, tmp_path, *flags, "--calib-samples", 2, "--calib-seq-len", 1025, fault=no_work)
    assert_says(said, "--calib-seq-len 1025 is more than max_position_embeddings 1024", "Give 1024 or less")
    file = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.ones(8, 129, dtype=torch.int64)}, file)
    said = refused(ranks, tmp_path, *fp8(source, output), "--calib-data", file, fault=no_work)
    assert_says(said, f"{file}: samples of 129 tokens, more than max_position_embeddings 128", "Give shorter ones")


# What was measured.


@contextmanager
def disk_full_then() -> Iterator[None]:
    """In a rank: the statistics cannot be written where they are asked for, although that was tried."""
    real = statistics.save

    def save(found: dict, file: Path, config: dict) -> None:
        if file.name == "asked.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(found, file, config)

    with mock.patch.object(statistics, "save", save):
        yield


def kept_in(said: str) -> Path:
    return Path(re.search(r"the calibration is kept in (\S+) until an export into \S+ is complete", said)[1])


def test_statistics_that_could_not_be_written_are_kept_beside_the_target(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    ranks.call(2, __import__, "transformers")
    flags, asked = fp8(source, output), tmp_path / "asked.safetensors"

    (status, said, _), other = ranks.call(
        2, command_during, disk_full_then, "--device", "cpu", *flags, "--save-calibration", asked
    )
    assert (status, other[0]) == (1, 1), said
    assert_says(said, f"--save-calibration {asked} could not be written", "No space left", "--load-calibration")
    assert not output.exists()
    kept = kept_in(said)
    assert kept == output.parent / ".out.journal" / "calibration.safetensors"
    export(ranks, 2, *flags[:6], "--load-calibration", kept, "--output", output)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    export(ranks, 2, *flags, "--overwrite", "--save-calibration", asked)
    found = tensors(output)
    export(ranks, 2, *flags[:6], "--load-calibration", asked, "--overwrite", "--output", output)
    assert_same(tensors(output), found)


@pytest.mark.parametrize(
    ("action", "status"), [("raise", 1), ("SIGTERM", 75), ("SIGINT", 130)], ids=["raise", "SIGTERM", "SIGINT"]
)
def test_a_calibration_outlives_what_ends_the_export_after_it(
    action: str, status: int, models: dict, tmp_path: Path
) -> None:
    flags, target = flags_of(models), tmp_path / "out"
    statuses, said, _ = export_with(Fault(action, "survey", (0, 1)), tmp_path, *flags, "--output", target)
    assert statuses == [status, status], said
    kept = kept_in(said)
    if action != "raise":
        assert re.search(rf"^error: stopped by {action}: the calibration is kept in", said, re.MULTILINE), said
    measured = tensors(kept.parent)
    calibration = {"--calib-data", "--calib-samples", "--calib-seq-len", "--calib-batch-size"}
    others = [flag for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in calibration for flag in pair]
    statuses, said, _ = export_with(None, tmp_path, *others, "--load-calibration", kept, "--output", target)
    assert statuses == [0, 0], said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "said.log"]
    saved = tmp_path / "again" / "saved.safetensors"
    saved.parent.mkdir()
    statuses, said, _ = export_with(
        None, tmp_path, *flags, "--save-calibration", saved, "--overwrite", "--output", target
    )
    assert statuses == [0, 0], said
    assert_same(tensors(saved.parent), measured)
