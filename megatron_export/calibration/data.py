"""Calibration data from a file: text is tokenized, joined and cut into equal samples; token ids are used as they are."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.hf_folder import lacks_tokenizer
from ..common.dtypes import torch_dtypes
from ..common.errors import ExportError
from ..common.safe_files import exists, not_read, opened, panics, reason_of

LINES = 4096  # of a text that are read at a time
LETTERS = 4 << 20  # that are tokenized at a time
MOST_LETTERS = 16 << 20  # of a row
MOST_IDS = 64 << 20
SUFFIXES = (".txt", ".jsonl", ".parquet", ".safetensors")
_INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")


def read_samples(
    file: Path,
    tokenizer_folder: Path,
    *,
    samples: int,
    length: int,
    trust_remote_code: bool = False,
    fewer: bool = False,
) -> Tensor:
    """int64 token ids [samples, length] from `file`; from a .safetensors file, its first `samples` rows, whole.

    The tokens of all texts, with an end-of-text token between texts, are cut into samples, so that none is padded.
    `trust_remote_code`: run code that the tokenizer's folder brings. `fewer`: take what is there, if that is at least one sample.
    `ExportError` if the file is missing, not text, or too short, and if there is no tokenizer.
    """
    if not exists(file) or not file.is_file():
        raise ExportError(f"no calibration file {file}. Give --calib-data one that exists")
    if file.suffix.lower() not in SUFFIXES:
        raise ExportError(f"{file}: calibration data must be one of {', '.join(SUFFIXES)}")
    if file.suffix.lower() == ".safetensors":
        return _ids(file, samples, fewer)
    if lacking := lacks_tokenizer(tokenizer_folder):
        raise ExportError(
            f"{lacking}, and calibration text needs one. Add these files, or give --calib-data token ids in a .safetensors file"
        )
    tokens = _tokenize(file, tokenizer_folder, trust_remote_code, enough=samples * length)
    if not tokens:
        raise ExportError(f"{file}: no text in it. Give --calib-data a file with text")
    if fewer:
        samples = min(samples, max(len(tokens) // length, 1))
    if len(tokens) < samples * length:
        raise ExportError(
            f"{file}: {len(tokens)} tokens, too short for --calib-samples {samples} of --calib-seq-len {length} "
            f"({samples * length} tokens). Give more text, or ask for fewer or shorter samples"
        )
    return torch.tensor(tokens[: samples * length]).view(samples, length)


def _ids(file: Path, samples: int, fewer: bool) -> Tensor:
    held = opened(file, "Write or fetch it again")
    found = {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118 - not a dict
    ids = found.get("input_ids")
    shape = ids.get_shape() if ids else []
    if len(shape) != 2 or shape[1] == 0 or (fewer and shape[0] == 0) or ids.get_dtype() not in _INTEGERS:
        dtypes = {name: torch_dtypes().get(part.get_dtype(), part.get_dtype()) for name, part in found.items()}
        said = ", ".join(f"{name} {dtypes[name]} {found[name].get_shape()[:8]}" for name in sorted(found)[:5])
        raise ExportError(f"{file}: needs an integer tensor `input_ids` [samples, tokens]; it holds {said or 'none'}")
    samples = min(samples, shape[0]) if fewer else samples
    if shape[0] < samples:
        raise ExportError(f"{file}: {shape[0]} samples, fewer than --calib-samples {samples}. Ask for fewer")
    if samples * shape[1] > MOST_IDS:
        raise ExportError(
            f"{file}: --calib-samples {samples} of {shape[1]:,} tokens are more than {MOST_IDS:,} tokens. Ask for fewer, or "
            "give shorter ones"
        )
    return ids[:samples].long()


def _texts(file: Path) -> Iterator[tuple[str, bool]]:
    """The texts of a file, read as they are asked for; a long one in blocks. True marks the end of a text."""
    try:
        if file.suffix.lower() == ".txt":
            yield from ((block, False) for block in _blocks(file) if block.strip())
            return
        for text in _parquet(file) if file.suffix.lower() == ".parquet" else _jsonl(file):
            starts = range(0, len(text) if text.strip() else 0, LETTERS)
            yield from ((text[start : start + LETTERS], start == starts[-1]) for start in starts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        rows = "" if file.suffix.lower() == ".txt" else " with a `text` in every row"
        if isinstance(error, UnicodeDecodeError):
            raise not_read(file, f"not {file.suffix}{rows}", error, "Save it in UTF-8, or give another file") from error
        reason = f"{rows} ({type(error).__name__}: {reason_of(error)})"
        raise ExportError(f"{file}: not {file.suffix}{reason}. Give another file") from error
    except OSError as error:
        raise not_read(file, "not read", error, "Give another file") from error


def _blocks(file: Path) -> Iterator[str]:
    """A text in blocks of whole lines, but for very long ones."""
    with file.open(encoding="utf-8", newline="\n") as text:
        while True:
            lines, size = [], 0
            while len(lines) < LINES and size < LETTERS and (line := text.readline(LETTERS)):
                lines.append(line)
                size += len(line)
            if not lines:
                return
            yield "".join(lines)


def _jsonl(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8", newline="\n") as rows:
        while line := rows.readline(MOST_LETTERS + 1):
            if len(line) > MOST_LETTERS:
                raise ValueError(f"a row of more than {MOST_LETTERS:,} letters")
            if line.strip():
                yield _text_in(json.loads(line))


def _text_in(row: dict) -> str:
    text = row["text"]
    if not isinstance(text, str):
        raise TypeError("`text` is not a string")
    if len(text) > MOST_LETTERS:
        raise ValueError(f"a row of more than {MOST_LETTERS:,} letters")
    text.encode()  # raises where half a character is left over
    return text


def _parquet(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, read_dictionary=["text"]) as table:
            for batch in table.iter_batches(batch_size=16, columns=["text"]):  # rows may be long
                texts = (text.as_py() for text in batch["text"])
                yield from (_text_in({"text": text}) for text in texts if text is not None)
    except (pyarrow.ArrowException, OSError, KeyError, MemoryError) as error:
        said = f"not a parquet file with a column `text` ({reason_of(error)})"
        raise ExportError(f"{file}: {said}. Give another file") from error


def _tokenize(file: Path, folder: Path, trusted: bool, *, enough: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        with panics():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        if not trusted and "trust_remote_code" in str(error):
            raise ExportError(
                f"{folder}: its tokenizer is Python code of its own, which is not run unless you say so. Read that code, then "
                "give --trust-remote-code, or give --calib-data token ids in a .safetensors file"
            ) from error
        raise ExportError(
            f"{folder}: no tokenizer that loads, to tokenize calibration text with ({reason_of(error)}). Add one, or give "
            "--calib-data token ids in a .safetensors file"
        ) from error
    tokens: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text, ends in _texts(file):
        try:
            with panics():
                tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # such as a bare one, of a tokenizer that has no token for what it does not know
            raise ExportError(
                f"{folder}: its tokenizer fails on the text of {file} ({type(error).__name__}: {reason_of(error)}). Give "
                "--calib-data other text, or token ids in a .safetensors file"
            ) from error
        tokens += end if ends else []
        if len(tokens) >= enough:
            break
    return tokens
