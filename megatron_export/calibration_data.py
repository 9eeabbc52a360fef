"""Calibration data from a file: text is tokenized, joined and cut into equal samples; token ids are used as they are."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import ExportError

LINES = 4096  # of a text, or rows of a table, that are read at a time
SUFFIXES = (".txt", ".jsonl", ".parquet", ".safetensors")


def read_samples(file: Path, tokenizer_folder: Path, *, samples: int, length: int) -> Tensor:
    """int64 token ids [samples, length] from `file`; from a .safetensors file, its first `samples` rows, whole.

    Text samples are cut from the tokens of all texts in order, an end-of-text token between texts, so that none is
    padded. `ExportError` when the file is missing, empty, not text, or too short.
    """
    if not file.is_file():
        raise ExportError(f"no calibration file {file}. Give --calib-data one that exists")
    if file.suffix not in SUFFIXES:
        raise ExportError(f"{file}: calibration data must be one of {', '.join(SUFFIXES)}")
    if file.suffix == ".safetensors":
        return _ids(file, samples)
    tokens = _tokenize(file, tokenizer_folder, enough=samples * length)
    if not tokens:
        raise ExportError(f"{file}: no text in it. Give --calib-data a file with text")
    if len(tokens) < samples * length:
        raise ExportError(
            f"{file}: {len(tokens)} tokens, too short for --calib-samples {samples} of --calib-seq-len {length} "
            f"({samples * length} tokens). Give more text, or ask for fewer or shorter samples"
        )
    return torch.tensor(tokens[: samples * length]).view(samples, length)


def _ids(file: Path, samples: int) -> Tensor:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{file}: not a readable safetensors file ({error}). Write or fetch it again") from error
    ids = tensors.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        found = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise ExportError(f"{file}: needs an integer tensor `input_ids` [samples, tokens]; it holds {found}")
    if ids.shape[0] < samples:
        raise ExportError(f"{file}: {ids.shape[0]} samples, fewer than --calib-samples {samples}. Ask for fewer")
    return ids[:samples].long()


def _texts(file: Path) -> Iterator[tuple[str, bool]]:
    """The texts of a file, read as they are asked for; a long one in blocks of lines. True marks the end of a text."""
    try:
        if file.suffix == ".parquet":
            yield from ((text, True) for text in _parquet(file))
            return
        with file.open(encoding="utf-8", newline="\n") as lines:
            if file.suffix == ".jsonl":
                yield from ((_row_text(json.loads(line)), True) for line in lines if line.strip())
                return
            while block := "".join(islice(lines, LINES)):
                yield block, False
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ExportError(
            f"{file}: not {file.suffix} with a `text` in every row ({reason}). Give another file"
        ) from error


def _row_text(row: dict) -> str:
    if not isinstance(row["text"], str):
        raise TypeError("`text` is not a string")
    return row["text"]


def _parquet(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=LINES, columns=["text"]):
            yield from (_row_text({"text": text}) for text in batch["text"].to_pylist() if text is not None)
    except (pyarrow.ArrowInvalid, OSError, KeyError) as error:
        raise ExportError(f"{file}: not a parquet file with a column `text` ({error}). Give another file") from error


def _tokenize(file: Path, folder: Path, *, enough: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise ExportError(
            f"{folder}: no tokenizer that loads, to tokenize calibration text with ({error}). Add one, or give "
            "--calib-data token ids in a .safetensors file"
        ) from error
    tokens: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text, ends in _texts(file):
        if not text.strip():
            continue
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += end if ends else []
        if len(tokens) >= enough:
            break
    return tokens
