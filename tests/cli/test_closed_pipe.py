"""Where what reads the output goes, as `head` does, a command ends as others do: without a word, with the status of SIGPIPE."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.exported import exported
from ..support.models import make_model

CLOSED = 141


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a checkpoint of it."""
    source = make_model(tmp_path_factory.mktemp("model"), "llama32")
    made = tmp_path_factory.mktemp("made") / "out"
    exported(source, made, "fp8_pb")
    return source, made


def to_nobody(*words: object, errors_too: bool = False) -> tuple[int, bytes]:
    """The status of the command, whose output goes into a pipe that nobody reads, and what it said on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "megatron_export", *map(str, words)]
    errors = writing if errors_too else subprocess.PIPE
    try:
        done = subprocess.run(line, stdout=writing, stderr=errors, timeout=300, check=False)
    finally:
        os.close(writing)
    return done.returncode, done.stderr or b""


@pytest.mark.parametrize("words", [("--help",), ("check", "--rules")])
def test_what_needs_no_model_ends_quietly(words: tuple) -> None:
    assert to_nobody(*words) == (CLOSED, b"")


def test_every_command_that_shows_something_ends_quietly(folders: tuple[Path, Path]) -> None:
    source, made = folders
    assert to_nobody("check", made) == (CLOSED, b"")
    assert to_nobody("plan", "--hf-model", source, "--format", "fp8_pb") == (CLOSED, b"")
    assert to_nobody("diff", made, made, errors_too=True) == (CLOSED, b"")
    assert to_nobody("verify", made, "--reference", source, errors_too=True) == (CLOSED, b"")


def test_an_error_that_nobody_reads_is_quiet_too(tmp_path: Path) -> None:
    assert to_nobody("check", tmp_path / "nothing", errors_too=True) == (CLOSED, b"")
    assert to_nobody("check", tmp_path / "nothing")[0] == 1  # stderr is read


@pytest.mark.parametrize("words", [("check", "--rules")])
def test_the_first_lines_are_there(words: tuple) -> None:
    line = f"{sys.executable} -m megatron_export {' '.join(words)} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False)
    first, status = done.stdout.splitlines()
    assert first.startswith("vLLM ")
    assert (status in ("0", str(CLOSED)), done.stderr) == (True, "")
