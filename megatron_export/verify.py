"""A finished folder is read back from disk before it gets its name: what was asked for, against what is there.

Every file: its header against the plan, the checksum of every tensor against what was written, no NaN and no Inf in
weights that are not codes, no NaN among e4m3 codes, scales finite and above zero. And, from what is on disk alone: the modules
that have scales are those that the plan quantizes, and the exclude lists of both configs name no quantized module and every
other.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path

import torch

from .errors import report
from .item import Output
from .plan import Plan
from .progress import Progress, quiet
from .staging import Checks
from .writer import header_of

CHUNK = 16 << 20
THREADS = 4


@dataclass(frozen=True)
class Verified:
    """What was found in one file: its size in bytes, its sha256, and the crc32 of each tensor."""

    nbytes: int
    sha256: str
    tensors: dict[str, int] = field(default_factory=dict)


def verify(folder: Path, plan: Plan, checks: dict[str, Checks], progress: Progress = quiet) -> dict[str, Verified]:
    """Read every file of `folder` back; `checks` are the checksums of what was written, by file.

    Raises one `ExportError` with all that is wrong.
    """
    copied = {output.name for output in plan.copied}
    with ThreadPoolExecutor(THREADS) as pool:
        reading = [pool.submit(_read, folder / name, plan.files[name], checks[name], copied) for name in plan.files]
        read = [one.result() for one in progress("verify", reading)]
    report([problem for problems, _ in read for problem in problems] + _recipe(folder, plan))
    found = dict(zip(plan.files, (verified for _, verified in read), strict=True))
    others = sorted(path for path in folder.iterdir() if path.name not in found)
    return found | {path.name: Verified(path.stat().st_size, _sha256(path)) for path in others}


def _read(path: Path, outputs: tuple[Output, ...], checks: Checks, copied: set[str]) -> tuple[list[str], Verified]:
    """What is wrong in one file, and what was found."""
    header, starts = header_of(outputs)
    digest, crcs, problems, buffer = hashlib.sha256(), {}, [], bytearray(CHUNK)
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return [f"{path}: its header is not what was written"], Verified(0, "")
        digest.update(header)
        for output in sorted(outputs, key=lambda o: starts[o.name]):
            slices = checks[output.name]
            crc, seen = 0, []
            for _ in slices:
                part = 0
                for chunk in _chunks(file, buffer, output.nbytes // len(slices)):
                    digest.update(chunk)
                    crc, part = zlib.crc32(chunk, crc), zlib.crc32(chunk, part)
                    problems += [] if output.name in copied else _wrong_values(path, output, chunk)
                seen.append(part)
            if seen != slices:
                problems.append(f"{path}: {output.name} is not what was written")
            crcs[output.name] = crc
        rest = file.read(1)
    if rest:
        problems.append(f"{path}: longer than its header says")
    return list(dict.fromkeys(problems)), Verified(path.stat().st_size, digest.hexdigest(), crcs)


def _chunks(file: BufferedReader, buffer: bytearray, nbytes: int) -> Iterator[memoryview]:
    """The next bytes of a file, piece after piece in the same memory."""
    while nbytes and (count := file.readinto(memoryview(buffer)[: min(CHUNK, nbytes)])):
        nbytes -= count
        yield memoryview(buffer)[:count]


def _wrong_values(path: Path, output: Output, chunk: memoryview) -> list[str]:
    if output.dtype is torch.uint8:
        return []
    values = torch.frombuffer(chunk, dtype=output.dtype)
    codes = output.dtype is torch.float8_e4m3fn  # which has NaN, and no Inf
    wrong = (values.view(torch.uint8) & 0x7F) == 0x7F if codes else ~values.isfinite()
    problems = [f"{path}: {output.name} holds NaN or Inf"] if wrong.any() else []
    if is_scale(output.name) and not (values.float() > 0).all():
        problems.append(f"{path}: {output.name} holds a scale that is not above zero")
    return problems


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales: of weights, inputs, keys and values."""
    return "scale" in name.rpartition(".")[2]


def _recipe(folder: Path, plan: Plan) -> list[str]:
    """Where the files, the exclude lists and the plan disagree on what is quantized."""
    outputs = [output for file in plan.files.values() for output in file]
    scaled = {found[1] for output in outputs if (found := _WEIGHT_SCALE.fullmatch(output.name))}
    meant = set(plan.quantized)
    problems = [f"{folder}: {module} has scales, but was to be left alone" for module in sorted(scaled - meant)]
    problems += [f"{folder}: {module} has no scales, but was to be quantized" for module in sorted(meant - scaled)]
    if not plan.form.quantization:
        return problems
    left = {output.name.removesuffix(".weight") for output in outputs if _is_matrix(output)} - scaled
    for file, excluded in _excluded(folder).items():
        matched = {module for module in scaled | left if any(covers(entry, module) for entry in excluded)}
        problems += [f"{folder / file} excludes {module}, which is quantized" for module in sorted(matched & scaled)]
        problems += [
            f"{folder / file} does not exclude {module}, which is not quantized" for module in sorted(left - matched)
        ]
    return problems


_WEIGHT_SCALE = re.compile(r"(.+)[._]weight_scale(?:_inv)?")


def _is_matrix(output: Output) -> bool:
    """Whether it is the weight of a linear, an embedding or a stack of experts."""
    return len(output.shape) > 1 and not is_scale(output.name) and not output.name.endswith("bias")


def covers(entry: str, module: str) -> bool:
    """Whether an entry of an exclude list is about a module: by its name, a glob, or that of what it is in."""
    return fnmatchcase(module, entry) or module.startswith(f"{entry}.")


def _excluded(folder: Path) -> dict[str, list[str]]:
    """The exclude lists on disk, by file."""
    inner = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    outer = json.loads((folder / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    return {
        "config.json": inner.get("ignore") or inner.get("modules_to_not_convert"),
        "hf_quant_config.json": outer["exclude_modules"],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
