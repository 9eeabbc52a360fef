"""Files that cannot be read: one sentence, about that file, which says what to do."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_export import ExportError
from megatron_export.calibration.data import read_samples
from megatron_export.common.errors import message_of
from megatron_export.common.safe_files import not_read
from megatron_export.verify.perplexity import windows_of
from megatron_export.writing.target import check_empty

from ..support.command_line import command_line as run
from ..support.models import EXAMPLE, GOLDEN
from ..support.ranks import Ranks, command

ORIGINAL, QUANTIZED = GOLDEN / "models" / "llama-bf16", GOLDEN / "models" / "llama-FP8-KVFP8"
LATIN1 = "caf\xe9 " * 20


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A checkpoint that everybody may read, and anybody may reach."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        found = Path(place) / "model"
        found.mkdir(mode=0o755)
        for path in QUANTIZED.iterdir():
            if path.is_file():
                shutil.copy(path, found)
                (found / path.name).chmod(0o644)
        yield found
        found.chmod(0o755)


def refused(*flags: object, status: int) -> str:
    """The one line that a command says."""
    found, said = run(*flags)
    assert (found, said.count("error: "), len(said.splitlines())) == (status, 1, 1), said
    assert "Errno" not in said
    return said


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", "model.safetensors", ""])
def test_a_file_that_this_user_may_not_read_is_named(name: str, folder: Path) -> None:
    (folder / name).chmod(0)
    readers = [
        (("check", folder), 1),
        (("diff", QUANTIZED, folder), 2),
        (("verify", folder, "--reference", ORIGINAL), 2),
    ]
    if name != "hf_quant_config.json":
        readers.append((("verify", QUANTIZED, "--reference", folder), 2))
    if name in ("config.json", ""):
        readers.append((("plan", "--hf-model", folder), 1))
    with as_nobody():
        for flags, status in readers:
            said = refused(*flags, status=status)
            assert f"{folder / name}: this user may not read it. Allow it: chmod u+rX" in said


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "LICENSE"])
def test_a_file_to_copy_that_this_user_may_not_read_is_told_before_any_work(name: str, folder: Path) -> None:
    (folder / name).touch(mode=0)
    with as_nobody():
        assert f"{folder / name}: this user may not read it" in refused("plan", "--hf-model", folder, status=1)


@pytest.mark.parametrize("letters", [300, 5000])
def test_a_folder_whose_name_no_file_system_takes_is_not_there(letters: int) -> None:
    long = "x" * letters
    assert "is not a folder" in refused("check", long, status=1)
    assert "is not a folder" in refused("diff", QUANTIZED, long, status=2)
    assert "is not a folder" in refused("verify", long, "--reference", ORIGINAL, status=2)
    assert "no model folder" in refused("verify", QUANTIZED, "--reference", long, status=2)
    assert "no model folder" in refused("plan", "--hf-model", long, status=1)


@pytest.mark.parametrize("letters", [247, 255, 300])
def test_an_output_whose_name_is_too_long_is_refused_before_any_work(
    letters: int, ranks: Ranks, tmp_path: Path
) -> None:
    flags = ("--device", "cpu", "--hf-model", ORIGINAL, "--format", "bf16", "--output", tmp_path / ("x" * letters))
    ((status, said),) = ranks.call(1, command, *flags)
    assert (status, said.count("error: ")) == (1, 1), said
    assert f"has a name of {letters + 9} bytes, more than 255. Give a shorter --output" in said
    check_empty(tmp_path / ("x" * 246), overwrite=False)


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "DATA.TXT"])
def test_a_text_that_is_not_utf8_is_said_to_be_none(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(LATIN1.encode("latin1"))
    with pytest.raises(ExportError) as refusal:
        read_samples(file, EXAMPLE, samples=1, length=8)
    assert str(refusal.value).startswith(f"{file}: not .")
    assert str(refusal.value).endswith(" (not in UTF-8 from byte 3 on). Save it in UTF-8, or give another file")
    with pytest.raises(ExportError, match=r"not a text \(not in UTF-8 from byte 3 on\)"):
        windows_of(file, EXAMPLE)


@pytest.mark.parametrize("name", ["data.TXT", "data.Txt"])
def test_the_case_of_a_suffix_does_not_matter(name: str, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "calibration.txt", tmp_path / name)
    settings = {"samples": 2, "length": 16}
    found = read_samples(tmp_path / name, EXAMPLE, **settings)
    assert found.equal(read_samples(EXAMPLE / "calibration.txt", EXAMPLE, **settings))


def limited(files: int, *flags: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that may have so many files open."""
    line = [
        "bash",
        "-c",
        f'ulimit -n {files} && exec "$0" "$@"',
        sys.executable,
        "-m",
        "megatron_export",
        *map(str, flags),
    ]
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(line, capture_output=True, text=True, env=outside | {"OMP_NUM_THREADS": "1"}, timeout=120)


def test_a_process_that_may_open_few_files_says_so(tmp_path: Path) -> None:
    flags = ("export", "--device", "cpu", "--hf-model", ORIGINAL, "--format", "bf16", "--output", tmp_path / "out")
    done = limited(40, *flags)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: this process may have 40 files open, and needs more. Allow them: ulimit -n 4096"
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_opened_is_not_called_damaged() -> None:
    """Which of the files of a process is one too many depends on all of them: the system's error is put here."""
    path = QUANTIZED / "model.safetensors"
    for error in (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), RuntimeError("x: Too many open files (24)")):
        said = str(not_read(path, "not a readable safetensors file", error, "Fetch it again"))
        assert said.startswith(f"{path}: not opened: this process may have ")
        assert said.endswith(" files open, and needs more. Allow them: ulimit -n 4096")
        assert message_of(error).startswith("this process may have ")
    said = str(not_read(path, "not a table", OSError(errno.EIO, os.strerror(errno.EIO)), "Fetch it again"))
    assert said == f"{path}: not read (Input/output error). Fetch it again"
