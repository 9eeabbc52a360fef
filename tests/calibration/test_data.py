"""Calibration data: the same text in each kind of file gives the same samples; ids are used as they are."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from megatron_export.calibration.data import read_samples

from ..support.models import EXAMPLE

TEXTS = ["def first():\n    return 1\n", "class Second:\n    pass\n" * 20]


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"data{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": TEXTS}), file)
    return file


def test_texts_are_joined_with_an_end_of_text_token_and_cut_without_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS)
    expected = [*first, tokenizer.eos_token_id, *second][:60]
    for suffix in (".jsonl", ".parquet"):
        samples = read_samples(write(tmp_path, suffix), EXAMPLE, samples=3, length=20)
        assert samples.shape == (3, 20)
        assert samples.dtype == torch.int64
        assert samples.flatten().tolist() == expected


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text(TEXTS[1])
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": TEXTS[1]}))
    read = [read_samples(tmp_path / name, EXAMPLE, samples=2, length=16) for name in ("data.txt", "data.jsonl")]
    assert torch.equal(*read)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_are_used_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    ids = torch.arange(40, dtype=dtype).reshape(4, 10)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    samples = read_samples(tmp_path / "ids.safetensors", EXAMPLE, samples=3, length=512)
    assert samples.dtype == torch.int64
    assert torch.equal(samples, ids[:3].long())


def test_the_text_in_the_repository_is_enough_for_the_defaults() -> None:
    assert read_samples(EXAMPLE / "calibration.txt", EXAMPLE, samples=128, length=512).shape == (128, 512)
