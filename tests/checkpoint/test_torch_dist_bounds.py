"""What a `torch_dist` folder may make its reader do: a few bytes more cost little more time and memory."""

import pickle
import time
from pathlib import Path

import pytest

from megatron_export import ExportError
from megatron_export.checkpoint import torch_dist_metadata
from megatron_export.checkpoint.torch_dist_keys import part_of
from megatron_export.checkpoint.torch_dist_settings import RUN_CONFIG, run_of

from .test_torch_dist_storage import KEY, WHOLE, lay, opened, read


def test_tables_that_merge_tables_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 18)]
    (tmp_path / RUN_CONFIG).write_text("\n".join(lines))
    started = time.monotonic()
    with pytest.raises(ExportError, match=r"run_config.yaml: not read \(it merges tables\)"):
        run_of(tmp_path)
    assert time.monotonic() - started < 5


def test_values_that_double_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    (tmp_path / RUN_CONFIG).write_text("\n".join(lines))
    with pytest.raises(ExportError, match=r"run_config.yaml: not read \(more than 10,000,000 values\)"):
        run_of(tmp_path)


def changed(folder: Path, key: str, chunks: list | None = None) -> None:
    held = pickle.loads((folder / ".metadata").read_bytes())
    held.state_dict_metadata[key] = held.state_dict_metadata.pop(KEY)
    for index in held.storage_data:
        object.__setattr__(index, "fqn", key)
    if chunks:
        held.state_dict_metadata[key].chunks += chunks
    (folder / ".metadata").write_bytes(pickle.dumps(held))


@pytest.mark.parametrize("key", ["x" * 501, "a\nb", "\x1b[31m"])
def test_a_key_that_is_no_name_is_refused(key: str, tmp_path: Path) -> None:
    lay(tmp_path, WHOLE[0, 0], (8, 12))
    changed(tmp_path, key)
    with pytest.raises(ExportError, match="is no name of a tensor"):
        opened(tmp_path)


def test_parts_in_more_entries_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, WHOLE, (2, 3, 8, 12))
    storage = opened(tmp_path)
    monkeypatch.setattr(torch_dist_metadata, "MOST_SLOTS", 5)
    with pytest.raises(ExportError, match="has parts in more than 5 entries"):
        read(storage, (1, 2), slice(0, 8), slice(0, 12))


def test_a_key_of_any_length_is_taken_apart_at_once() -> None:
    started = time.monotonic()
    long = "a.linear_fc1." * 20_000
    assert part_of(f"{long}weight_x") == (f"{long}weight_x", "")
    assert part_of(f"{long}weight_w") == (f"{long}weight", "w")
    assert part_of("a.linear_fc2.weight_w") == ("a.linear_fc2.weight_w", "")
    assert time.monotonic() - started < 1
