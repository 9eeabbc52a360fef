"""Calibration data from a file: text is tokenized, joined and cut into equal samples; token ids are used as they are."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import ExportError

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
    texts = [text for text in _texts(file) if text.strip()]
    if not texts:
        raise ExportError(f"{file}: no text in it. Give --calib-data a file with text")
    tokens = _tokenize(texts, tokenizer_folder, enough=samples * length)
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


def _texts(file: Path) -> list[str]:
    try:
        if file.suffix == ".parquet":
            return _parquet(file)
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            return [text]
        return [_row_text(json.loads(line)) for line in text.split("\n") if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ExportError(
            f"{file}: not {file.suffix} with a `text` in every row ({reason}). Give another file"
        ) from error


def _row_text(row: dict) -> str:
    if not isinstance(row["text"], str):
        raise TypeError("`text` is not a string")
    return row["text"]


def _parquet(file: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        texts = pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ExportError(f"{file}: not a parquet file with a column `text` ({error}). Give another file") from error
    return [_row_text({"text": text}) for text in texts if text is not None]


def _tokenize(texts: list[str], folder: Path, *, enough: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise ExportError(
            f"{folder}: no tokenizer that loads, to tokenize calibration text with ({error}). Add one, or give "
            "--calib-data token ids in a .safetensors file"
        ) from error
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(tokens) >= enough:
            break
    return tokens
