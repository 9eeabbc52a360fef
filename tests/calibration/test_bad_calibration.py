"""Bad calibration: text that is none, token ids of another model, statistics of another model, NaN in activations."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_export.calibration import statistics
from megatron_export.models.statistic_names import hf_keys

from ..export.test_topologies import export
from ..support.models import EXAMPLE, LENGTH, read_json, tensors
from ..support.ranks import Ranks
from ..support.refusals import assert_says, fp8, refused, rewritten

pytestmark = pytest.mark.whole

ASKED = ("--calib-samples", 4, "--calib-seq-len", LENGTH)  # 96 tokens


def parquet(file: Path, **columns: list) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file)


# File name -> how it is made, what must be said of it besides its path, and the way out.
TEXTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing.txt": (lambda file: None, "no calibration file", "Give --calib-data one that exists"),
    "folder.txt": (lambda file: file.mkdir(), "no calibration file", "Give --calib-data one that exists"),
    "empty.txt": (lambda file: file.touch(), "no text in it", "a file with text"),
    "blank.txt": (lambda file: file.write_text(" \n\n"), "no text in it", "a file with text"),
    "short.txt": (lambda file: file.write_text("short"), "(96 tokens)", "Give more text, or ask for fewer or shorter"),
    "binary.txt": (
        lambda file: file.write_bytes(bytes(range(256))),
        "not in UTF-8 from byte 128 on",
        "or give another file",
    ),
    "table.csv": (lambda file: file.write_text("text"), "must be one of", ".txt, .jsonl, .parquet, .safetensors"),
    "empty.jsonl": (lambda file: file.touch(), "no text in it", "a file with text"),
    "broken.jsonl": (lambda file: file.write_text("{"), "JSONDecodeError", "Give another file"),
    "number.jsonl": (lambda file: file.write_text('{"text": 3}'), "`text` is not a string", "Give another file"),
    "other.jsonl": (lambda file: file.write_text('{"body": "words"}'), "KeyError: 'text'", "Give another file"),
    "rows.jsonl": (lambda file: file.write_text('"text"'), "TypeError", "Give another file"),
    "empty.parquet": (lambda file: file.touch(), "not a parquet file", "Give another file"),
    "other.parquet": (lambda file: parquet(file, body=["words"]), "with a column `text`", "Give another file"),
    "number.parquet": (lambda file: parquet(file, text=[3, 0]), "`text` is not a string", "Give another file"),
    "bytes.parquet": (lambda file: parquet(file, text=[b"w"]), "`text` is not a string", "Give another file"),
    "nulls.parquet": (lambda file: parquet(file, text=["", None]), "no text in it", "a file with text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_calibration_text_that_is_none_is_refused(
    name: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    make, words, way_out = TEXTS[name]
    make(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / file, source / file)
    said = refused(ranks, tmp_path, *fp8(source, output), "--calib-data", tmp_path / name, *ASKED)
    assert_says(said, tmp_path / name, words, way_out)


@pytest.mark.parametrize("content", ["{}", "{"])
def test_a_tokenizer_that_does_not_load_is_refused(
    content: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    (source / "tokenizer.json").write_text(content)
    (tmp_path / "words.txt").write_text("words " * 200)
    said = refused(ranks, tmp_path, *fp8(source, output), "--calib-data", tmp_path / "words.txt", *ASKED)
    assert_says(said, f"{source}: no tokenizer that loads", "Add one", "token ids in a .safetensors file")


def test_text_of_more_tokens_than_the_vocabulary_has_is_refused(
    source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / file, source / file)
    text = EXAMPLE / "calibration.txt"
    said = refused(ranks, tmp_path, *fp8(source, output), "--calib-data", text, *ASKED)
    assert_says(said, f"{text}: token ids", "outside the model's vocabulary of 500", "Tokenize it for this model")


def ids(*shape: int, value: int = 1) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.full(shape, value)}


# Tensors in the file -> what must be said.
IDS: dict[str, tuple[dict[str, torch.Tensor] | None, tuple[str, ...]]] = {
    "broken": (None, ("ids.safetensors: not a readable safetensors file", "Write or fetch it again")),
    "beyond": (ids(4, 9, value=500), ("token ids 500 to 500", "vocabulary of 500", "Tokenize it")),  # padded to 512
    "negative": (ids(4, 9, value=-1), ("token ids -1 to -1", "vocabulary of 500", "Tokenize it")),
    "few": (ids(3, 9), ("3 samples, fewer than --calib-samples 4", "Ask for fewer")),
    "no tokens": (ids(4, 0), ("needs an integer tensor `input_ids` [samples, tokens]", "input_ids torch.int64 [4, 0]")),
    "flat": (ids(36), ("needs an integer tensor `input_ids` [samples, tokens]", "input_ids torch.int64 [36]")),
    "floats": ({"input_ids": torch.ones(4, 9)}, ("needs an integer tensor", "input_ids torch.float32 [4, 9]")),
    "other name": ({"tokens": torch.ones(4, 9)}, ("needs an integer tensor `input_ids`", "tokens torch.float32")),
}


@pytest.mark.parametrize("case", IDS)
def test_bad_token_ids_are_refused(case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    (content, words), file = IDS[case], tmp_path / "ids.safetensors"
    save_file(content, file) if content else file.write_text("not safetensors")
    said = refused(ranks, tmp_path, *fp8(source, output), "--calib-data", file, *ASKED)
    assert_says(said, file, *words)


def test_the_last_token_of_the_vocabulary_calibrates(source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    save_file(ids(4, 9, value=499), tmp_path / "ids.safetensors")
    export(ranks, 2, *fp8(source, output), "--calib-data", tmp_path / "ids.safetensors", *ASKED)
    assert len(tensors(output)) > 28


def test_fewer_samples_than_replicas_are_refused(source: Path, output: Path, ranks: Ranks, tmp_path: Path) -> None:
    said = refused(ranks, tmp_path, *fp8(source, output), "--tp", 1, "--calib-samples", 1)
    assert_says(said, "make 1 micro-batch, fewer than the 2 data-parallel ranks", "Ask for more")
    export(ranks, 2, *fp8(source, output), "--tp", 1, "--calib-samples", 2, "--calib-batch-size", 1)


@pytest.mark.parametrize("topology", [("--tp", 2), ("--tp", 1, "--pp", 2), ("--tp", 1)], ids=["tp2", "pp2", "dp2"])
def test_activations_that_overflow_are_refused_by_name(
    topology: tuple, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    rewritten(lambda held: held["model.layers.2.mlp.up_proj.weight"].fill_(3e38))(source)  # finite; its output is not
    said = refused(ranks, tmp_path, *fp8(source, output), *topology)
    assert_says(said, "NaN or Inf in the activations of decoder.layers.2.mlp.linear_fc2 and of", "Check the weights")


# What can be wrong with statistics: how the file is made from the model's config, and what must be said.


def saved(changes: dict[str, Any], wrong: dict[str, float]) -> Callable[[Path, dict], None]:
    """Statistics of the model with `changes` in its config, all 1 but for those in `wrong`."""

    def save(file: Path, config: dict) -> None:
        measured = {name: torch.tensor(1.0) for name in hf_keys(config | changes)}
        statistics.save(measured | {name: torch.tensor(value) for name, value in wrong.items()}, file, config | changes)

    return save


def incomplete(file: Path, config: dict) -> None:
    saved({}, {})(file, config)
    held = load_file(file)
    del held[f"{O_PROJ}.input_amax"]
    shape = {statistics.KIND: json.dumps(statistics.sizes_of(config))}
    save_file(held, file, metadata=shape)


O_PROJ, LAST = "model.layers.3.self_attn.o_proj", "decoder.layers.3.mlp.linear_fc2.input_amax"
STATISTICS: dict[str, tuple[Callable[[Path, dict], object], tuple[str, ...]]] = {
    "missing": (lambda file, config: None, ("no calibration file {}", "Write one with --save-calibration")),
    "broken": (lambda file, config: file.write_text("no"), ("{}: not a readable", "Write it again with --save-cal")),
    "not one": (lambda file, config: save_file(ids(4, 9), file), ("{}: not a calibration file", "--save-calibration")),
    "more layers": (saved({"num_hidden_layers": 5}, {}), ("{}: measured on another model: its layers is 5, here 4",)),
    "wider": (saved({"hidden_size": 128}, {}), ("{}: measured on another model", "its hidden is 128, here 64")),
    "other kind": (
        saved({"architectures": ["Qwen2ForCausalLM"]}, {}),
        ("{}: measured on another model: its architecture is 'Qwen2ForCausalLM', here 'LlamaForCausalLM'",),
    ),
    "incomplete": (incomplete, (f"{{}}: {O_PROJ}.input_amax is missing",)),
    "NaN": (saved({}, {LAST: torch.nan}), (f"the calibration's {LAST} is nan",)),
    "Inf": (saved({}, {LAST: torch.inf}), (f"the calibration's {LAST} is inf",)),
    "negative": (saved({}, {LAST: -1.0}), (f"the calibration's {LAST} is -1.0",)),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_do_not_fit_are_refused(
    case: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    make, words = STATISTICS[case]
    config, file = read_json(source / "config.json"), tmp_path / "calibration.safetensors"
    make(file, config)
    flags = ("--tp", 2, "--hf-model", source, "--output", output, "--load-calibration", file)
    said = refused(ranks, tmp_path, *flags)
    assert_says(said, *(word.format(file) for word in words))
    saved({}, {})(file, config)
    export(ranks, 2, *flags)


@pytest.mark.parametrize("file", ["", "nowhere/new.safetensors", "place/out/new.safetensors"])
def test_a_place_where_statistics_cannot_be_kept_is_refused(
    file: str, source: Path, output: Path, ranks: Ranks, tmp_path: Path
) -> None:
    if "out" in file:
        output.mkdir()
    said = refused(ranks, tmp_path, *fp8(source, output), "--save-calibration", tmp_path / file)
    way_out = "give a file elsewhere" if "out" in file else "in a folder that exists"
    assert_says(said, f"--save-calibration {tmp_path / file}", way_out)
