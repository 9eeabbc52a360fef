"""What pickle and torch.save wrote: read back, and never run; damage and bombs are refused in bounded memory."""

import argparse
import datetime
import functools
import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_export import ExportError
from megatron_export.checkpoint import safe_pickle
from megatron_export.checkpoint.safe_pickle import Inert, read_pickle, unpickled
from megatron_export.checkpoint.torch_save import read_saved, saved_tensor


class Calls:
    """What calls `function` when it is read as pickles usually are."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> tuple:
        return self.called


def test_plain_values_sizes_and_dtypes_are_what_they_were() -> None:
    held = {"a": [1, 2.5, None, True], "b": (torch.bfloat16, torch.Size([2, 3])), "c": {4}, "d": OrderedDict(x="y")}
    assert unpickled(pickle.dumps(held)) == held
    assert unpickled(pickle.dumps(held, protocol=2)) == held


def test_objects_of_the_packages_that_write_checkpoints_are_kept_and_not_made() -> None:
    found = unpickled(pickle.dumps(argparse.Namespace(layers=3, where=PurePosixPath("x"))))
    assert isinstance(found, Inert)
    assert (found.name, found.get("layers"), found.get("where").args) == ("argparse.Namespace", 3, ("x",))
    with pytest.raises(ValueError, match="a argparse.Namespace has no heads"):
        found.get("heads")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, setattr, open, subprocess.run, __import__, bytearray, os.unlink],
    ids=lambda function: function.__name__,
)
def test_what_no_checkpoint_names_is_refused(function: Any, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.write_text("")
    with pytest.raises(ValueError, match="which no checkpoint needs; nothing of it was run"):
        unpickled(pickle.dumps(Calls(function, str(mark)), protocol))
    assert mark.exists()


def test_functions_of_torch_and_pathlib_are_not_called(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    evil = [Calls(torch.save, {}, str(tmp_path / "made")), Calls(Path.unlink, Calls(Path, str(tmp_path / "kept")))]
    evil.append(Calls(getattr, Calls(Path, str(tmp_path / "made")), "touch"))
    found = unpickled(pickle.dumps(evil))
    assert [one.name for one in found] == ["torch.serialization.save", "pathlib.Path.unlink", "builtins.getattr"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@given(st.binary(max_size=200), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_a_damaged_pickle_is_a_value_error_or_a_value(noise: bytes, at: int) -> None:
    good = pickle.dumps({"tensors": [torch.Size([n]) for n in range(20)], "args": argparse.Namespace(x=1)})
    for data in (noise, good[:at], good[:at] + noise + good[at + len(noise) :]):
        try:
            unpickled(data)
        except ValueError as error:
            assert str(error)


BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7fh\x01.",
    "bytes": b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "text": b"\x80\x05\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_memory(bomb: str, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(BOMBS[bomb])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ExportError, match=r"bomb: not read \(a damaged pickle"):
        read_pickle(tmp_path / "bomb")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (50 << 10)


PAIRS = b"K\x01" + b"2\x86" * 45  # 1, then 45 times a pair of twice the last: 2^45 numbers in 90 bytes
DOUBLED: dict[str, tuple[bytes, str]] = {  # what to do with it, and what is said
    "a key": (b"}" + PAIRS + b"K\x01s.", "a key is ((("),
    "one of the keys": (b"}(" + PAIRS + b"K\x01u.", "a key is ((("),
    "a key at once": (b"(" + PAIRS + b"K\x01d.", "a key is ((("),
    "a key of an OrderedDict": (b"ccollections\nOrderedDict\n)R" + PAIRS + b"K\x01s.", "a key is ((("),
    "in a set": (b"\x8f(" + PAIRS + b"\x90.", "a key is ((("),
    "in a frozenset": (b"(" + PAIRS + b"\x91.", "a key is ((("),
    "in a called set": (b"cbuiltins\nset\n](" + PAIRS + b"e\x85R.", "a key is ((("),
    "as a text": (b"cbuiltins\nstr\n" + PAIRS + b"\x85R.", ""),
    "as numbers": (b"ctorch\nSize\n" + PAIRS + b"R.", ""),
    "of a table": (b"cbuiltins\ndict\n](" + PAIRS + b"K\x01\x86e\x85R.", ""),
    "in a call of it": (PAIRS + b")R.", "it calls ((("),
    "in a mark of it": (b"(" + PAIRS + b"K\x01o.", "it calls ((("),
    "added to": (PAIRS + b"K\x01a.", "it adds to ((("),
}
ALONE = """
import sys, time
from pathlib import Path
from megatron_export.checkpoint.safe_pickle import unpickled
from megatron_export.checkpoint.torch_save import read_saved
for path in sorted(Path(sys.argv[1]).iterdir()):
    started = time.monotonic()
    try:
        found = unpickled(path.read_bytes()) if path.suffix == ".pickle" else read_saved(path, "")
        said = ""
    except Exception as error:
        said = str(error)
    assert time.monotonic() - started < 5, path
    print(f"{path.stem}: {said}")
"""


def read_alone(folder: Path) -> dict[str, str]:
    """What is said of each file, by another process: hashing what doubles would hold the whole interpreter."""
    line = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_what_doubles_at_each_level_is_not_walked_through(tmp_path: Path) -> None:
    for name, (code, _) in DOUBLED.items():
        (tmp_path / f"{name}.pickle").write_bytes(b"\x80\x04" + code)
    file = archive(b"\x80\x02}X\x04\x00\x00\x00args" + PAIRS + b"s.")
    (tmp_path / "saved.pt").write_bytes(file.getvalue())
    found = read_alone(tmp_path)
    for name, (_, said) in DOUBLED.items():
        assert found[name].startswith(said), name
        assert bool(found[name]) == bool(said), name
    assert "not read (more than 10,000,000 values)" in found["saved"]


def test_keys_whose_hashes_are_chosen_to_be_the_same_are_few() -> None:
    assert unpickled(pickle.dumps({(1, "a", torch.bfloat16): 2, 3.5: None, -1: b"x"}))[1, "a", torch.bfloat16] == 2
    with pytest.raises(ValueError, match="a key is"):
        unpickled(pickle.dumps({(n,): None for n in range(10_001)}))
    for key in (1 << 64, -(1 << 63) - 1, tuple(range(17)), ((1,),)):
        with pytest.raises(ValueError, match="a key is"):
            unpickled(pickle.dumps({key: None}))


def test_levels_and_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="more than 1,000 levels deep"):
        unpickled(b"\x80\x02" + b"(" * 1001 + b"t" * 1001 + b".")
    monkeypatch.setattr(safe_pickle, "MOST_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1,000 steps"):
        unpickled(b"\x80\x02" + b"]" * 1000 + b".")


def test_nothing_that_a_pickle_names_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = unpickled(pickle.dumps([Calls(str, 3), Calls(dict, [(1, 2)]), Calls(int, "7"), Calls(getattr, "x", "y")]))
    assert [(one.name, one.args) for one in found] == [
        ("builtins.str", (3,)),
        ("builtins.dict", ([(1, 2)],)),
        ("builtins.int", ("7",)),
        ("builtins.getattr", ("x", "y")),
    ]
    with pytest.raises(ValueError, match="it names extension 1, which no checkpoint needs"):
        unpickled(b"\x80\x02\x82\x01.")


TENSORS: dict[str, Tensor] = {
    "matrix": torch.arange(24.0).view(4, 6),
    "transposed": torch.arange(24.0).view(4, 6).T,
    "part": torch.arange(24.0).view(4, 6)[1:3, 2:],
    "bfloat16": torch.arange(5).bfloat16(),
    "float16": torch.arange(8).half().view(2, 2, 2),
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_numbers_of_a_saved_tensor_are_found_in_a_part_of_a_file(name: str) -> None:
    tensor, file = TENSORS[name], io.BytesIO()
    file.write(b"before" * 99)
    start = file.tell()
    torch.save(tensor, file)
    length = file.tell() - start
    file.write(b"after")
    found = saved_tensor(file, start, length)
    assert (found.dtype, found.shape) == (tensor.dtype, tuple(tensor.shape))
    flat = torch.frombuffer(bytearray(file.getvalue()[found.start : start + length]), dtype=torch.uint8)
    flat = flat[: len(flat) // 4 * 4].view(tensor.dtype)
    assert torch.equal(flat.as_strided(found.shape, found.strides), tensor)


def archive(data: bytes, numbers: bytes = bytes(96), method: int = zipfile.ZIP_STORED) -> io.BytesIO:
    """A file like that of torch.save."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as made:
        made.writestr("archive/data.pkl", data)
        made.writestr("archive/data/0", numbers)
    return file


class Storage:
    """What a tensor's pickle says of its numbers."""


def described(shape: tuple, strides: tuple, offset: int = 0, kind: Any = torch.FloatStorage, key: str = "0") -> bytes:
    """The `data.pkl` of a tensor."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, held: object) -> tuple | None:
            return ("storage", kind, key, "cpu", 24) if isinstance(held, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump(
        Calls(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, strides, False, OrderedDict())
    )
    return file.getvalue()


HOSTILE: dict[str, tuple[io.BytesIO, str]] = {
    "beyond": (archive(described((4, 7), (7, 1))), "in 96 bytes"),
    "far strides": (archive(described((4, 6), (1 << 40, 1))), "in 96 bytes"),
    "negative": (archive(described((4, 6), (6, 1), -8)), "a tensor without sizes"),
    "odd sizes": (archive(described(("4", 6), (6, 1))), "a tensor without sizes"),
    "other numbers": (archive(described((4, 6), (6, 1), kind=torch.CharStorage)), "a tensor of 'CharStorage'"),
    "no numbers": (archive(described((4, 6), (6, 1), key="9")), "There is no item named 'archive/data/9'"),
    "empty": (archive(described((0, 6), (6, 1))), "in 96 bytes"),
    "compressed": (archive(described((4, 6), (6, 1)), bytes(1 << 20), zipfile.ZIP_DEFLATED), "is compressed"),
    "no tensor": (archive(pickle.dumps({"a": 1})), "is no tensor"),
    "no pickle": (io.BytesIO(b"x" * 500), "no archive of torch.save"),
    "other call": (archive(pickle.dumps(Calls(os.system, "true"))), "which no checkpoint needs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tensor_is_refused(name: str) -> None:
    file, words = HOSTILE[name]
    with pytest.raises(ValueError, match=words):
        saved_tensor(file, 0, len(file.getvalue()))


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_training_keeps_beside_the_model_is_no_obstacle(protocol: int, tmp_path: Path) -> None:
    weights = OrderedDict(a=torch.ones(2))
    weights._metadata = {"version": 1}
    held = {
        "args": argparse.Namespace(when=datetime.datetime(2026, 1, 2), call=functools.partial(torch.relu)),
        "groups": defaultdict(list, a=[1]),
        "history": deque([1, 2], maxlen=3),
        "weights": weights,
        "random": np.random.RandomState(3).get_state(),
        "seed": np.int64(4),
    }
    torch.save(held, tmp_path / "common.pt", pickle_protocol=protocol)
    found = read_saved(tmp_path / "common.pt", "Copy it again")
    assert sorted(found) == sorted(held)
    assert found["groups"] == {"a": [1]}


def test_saved_objects_are_read_without_their_tensors(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(layers=3), "moments": torch.ones(1 << 20)}, tmp_path / "common.pt")
    found = read_saved(tmp_path / "common.pt", "Copy it again")
    assert found["args"].get("layers") == 3
    assert found["moments"].name == "torch._utils._rebuild_tensor_v2"


def test_an_archive_that_describes_itself_at_length_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for number in range(30_000):
            made.writestr(f"archive/{number:020d}", b"")
    with pytest.raises(ValueError, match="it describes itself in more than 1,048,576 bytes"):
        saved_tensor(file, 0, len(file.getvalue()))
