"""A model's folder that means harm: every rank refuses it, within seconds, with one message; nothing is run and no file changes."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_export.common.file_names import INDEX

from ..export.test_bad_input import SHARD, Q, indexed, replaced
from ..export.test_topologies import export
from ..support.models import EXAMPLE, LENGTH, read_json, tensors
from ..support.ranks import Ranks, command
from ..support.refusals import assert_says, configured, fp8, refused
from .test_hostile_folders import cached, twice, with_own_tokenizer

pytestmark = pytest.mark.whole


def only_a_pickle(source: Path) -> None:
    (source / SHARD).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")


def linked(name: str) -> Callable[[Path], None]:
    """A file that is a link to the same file elsewhere."""

    def link(source: Path) -> None:
        if (source / name).exists():
            (source / name).rename(source.parent / name)
        else:
            (source.parent / name).write_text("{}")
        (source / name).symlink_to(source.parent / name)

    return link


def doubled(source: Path) -> None:
    places = dict.fromkeys(load_file(source / SHARD), SHARD)
    (source / INDEX).write_bytes(twice(json.dumps({"weight_map": places}).encode()))


def endless_header(source: Path) -> None:
    with (source / SHARD).open("wb") as file:
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)  # on disk it takes no room


def deep(source: Path) -> None:
    (source / "config.json").write_text('{"architectures":' * 100_000)


OUT = "is a symbolic link out of its folder, which is not followed. Put the file itself there"
SOURCES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a pickle": (only_a_pickle, ("{}: no weights but in pytorch_model.bin, a pickle", "Convert it to safetensors")),
    "weights elsewhere": (linked(SHARD), (f"{{}}/{SHARD} {OUT}",)),
    "tokenizer elsewhere": (linked("tokenizer.json"), (f"{{}}/tokenizer.json {OUT}",)),
    "config elsewhere": (linked("config.json"), (f"{{}}/config.json {OUT}",)),
    "a way out": (indexed(Q, "../x.safetensors"), ("{}: '../x.safetensors' is not the name of a file", "Fetch")),
    "twice": (
        doubled,
        (f"{{}}/{INDEX}: not the index of a checkpoint (the key 'weight_map' is there twice)", "Fetch it"),
    ),
    "endless header": (
        endless_header,
        (f"{{}}/{SHARD}: not a readable safetensors file (its header has 1,000,000,000",),
    ),
    "endless layers": (configured(num_hidden_layers=10**9), ("num_hidden_layers is 1000000000, more than 1,000",)),
    "endless layers to come": (configured(num_nextn_predict_layers=10**9), ("more than 1,000", "Give the config.json")),
    "wide": (configured(hidden_size=10**12), ("hidden_size is 1000000000000, more than 16,777,216",)),
    "deep": (deep, ("{}/config.json: not JSON (more than 50 levels deep)", "Fetch it again")),
    "not text": (replaced("config.json", "\ufeff{}"), ("{}/config.json: not JSON (Unexpected UTF-8 BOM",)),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_hostile_source_is_refused(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    damage, words = SOURCES[case]
    damage(source)
    said = refused(ranks, tmp_path, *fp8(source, output))
    assert_says(said, *(word.format(source) for word in words))


def test_a_model_in_the_hubs_cache_is_exported(source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    snapshot = cached(source, tmp_path / "cache")
    export(ranks, 2, *fp8(source, output), "--hf-model", snapshot)
    assert len(tensors(output)) > 28
    assert not any(path.is_symlink() for path in output.iterdir())
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"


def text_flags(model: Path, output: Path) -> tuple:
    text = ("--calib-data", EXAMPLE / "calibration.txt", "--calib-samples", 4, "--calib-seq-len", LENGTH)
    return ("--tp", 2, "--hf-model", model, "--format", "fp8", "--output", output, *text)


def test_a_tokenizer_that_is_code_is_refused_by_every_rank(output: Path, ranks: Ranks, tmp_path: Path) -> None:
    model = with_own_tokenizer(tmp_path / "model", tmp_path / "mark")
    said = refused(ranks, tmp_path, *text_flags(model, output))
    assert_says(said, f"{model}: its tokenizer is Python code of its own, which is not run", "--trust-remote-code")


def command_with_modules(folder: Path, *flags: object) -> tuple[int, str]:
    """In a rank: the command, where transformers keeps copies of code that it was trusted with in a folder of this rank."""
    from unittest import mock

    import transformers.dynamic_module_utils

    place = str(folder / f"modules{os.environ['RANK']}")
    with mock.patch.object(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place):
        return command("--device", "cpu", *flags)


def test_a_tokenizer_that_is_code_runs_when_it_is_trusted(output: Path, ranks: Ranks, tmp_path: Path) -> None:
    model = with_own_tokenizer(tmp_path / "model", tmp_path / "mark")
    flags = (*text_flags(model, output), "--trust-remote-code")
    (status, said), (second, _) = ranks.call(2, command_with_modules, tmp_path, *flags)
    assert (status, second) == (0, 0), said
    assert (tmp_path / "mark").read_text() == "ran"
    assert read_json(output / "config.json")["quantization_config"]["quant_method"] == "modelopt"
