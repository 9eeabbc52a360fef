"""The files of a checkpoint: each grows as its tensors arrive, in any order; the index and the JSON files come last."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.file_names import INDEX
from ..common.safe_files import not_read
from ..planning.contents import Contents, contents_of
from ..planning.plan import Plan
from ..planning.tensor_spec import Output
from .byte_sink import Sheet
from .device_to_disk import Conveyor
from .journal import Checks, naming
from .safetensors_file import SafetensorsFile
from .staging import Staging


class Desk(Protocol):
    """Where a writer puts its files, and notes those that are complete: staging.Noting, or memory (export/async_export.py)."""

    target: Path
    finished: dict[str, Checks]

    def path(self, file: str) -> Path:
        """Where a file grows."""

    def sheet(self, file: str, nbytes: int) -> Sheet:
        """What it is written on."""

    def finish(self, file: str, checks: Checks) -> None:
        """Note that it is complete."""


Follow = Callable[[Path, tuple[Output, ...], Callable[[int], bool]], None]


class CheckpointWriter:
    """Writes the files that the plan gives to `rank`. Use as a context, inside that of its `Staging`.

    `follow` is called for every file that is begun (read_back.ReadBack.follow). Files that are not `checked` have no checksums.
    """

    def __init__(
        self,
        plan: Plan,
        staging: Desk,
        *,
        rank: int = 0,
        device: torch.device | None = None,
        checked: bool = True,
        follow: Follow | None = None,
    ) -> None:
        self.plan = plan
        self.staging = staging
        self.checked = checked
        self.follow = follow
        contents = contents_of(plan)
        self.homes, self.slices = contents.homes, contents.slices
        self.missing = {file for file, writer in plan.writers.items() if writer == rank} - staging.finished.keys()
        self.shards: dict[str, SafetensorsFile] = {}
        self.conveyor = Conveyor(device or torch.device("cpu"), self._write, lambda output: self.homes[output.name])
        self.finishing: list[Future] = []

    def __enter__(self) -> "CheckpointWriter":
        self.conveyor.__enter__()
        self.finisher = ThreadPoolExecutor(2, thread_name_prefix="finish")
        return self

    def __exit__(self, *error: object) -> None:
        self.conveyor.__exit__()
        self.finisher.shutdown()
        for shard in self.shards.values():
            shard.sheet.close()
            shard.abandon()
        self.shards.clear()

    def wants(self, output: Output) -> bool:
        """Whether a tensor is of a file that this rank writes and that is not complete yet."""
        return self.homes[output.name] in self.missing

    def write(self, tensors: Iterable[tuple[Output, Tensor]]) -> None:
        """Begin to write those tensors, or slices, that are wanted, on any device. Raises what went wrong with earlier ones."""
        while self.finishing and self.finishing[0].done():
            self.finishing.pop(0).result()
        self.conveyor.put(self._wanted(tensors))

    def _wanted(self, tensors: Iterable[tuple[Output, Tensor]]) -> Iterable[tuple[Output, Tensor]]:
        for output, tensor in tensors:
            if not self.wants(output):
                continue
            assert (tensor.dtype, tuple(tensor.shape)) == (output.torch_dtype, output.shape), (
                f"{output.name} is {tensor.dtype} {tuple(tensor.shape)}, and was planned as {output.torch_dtype} {output.shape}"
            )
            self._begin(self.homes[output.name])
            yield output, tensor

    def _begin(self, file: str) -> None:
        if file in self.shards:
            return
        outputs = self.plan.files[file]
        with naming(self.staging.target):
            sheet_of = partial(self.staging.sheet, file)
            self.shards[file] = shard = SafetensorsFile(file, sheet_of, outputs, self.slices, self.checked)
        if self.follow:
            self.follow(self.staging.path(file), outputs, shard.ready)

    def _write(self, output: Output, start: int, data: memoryview) -> None:
        shard = self.shards[self.homes[output.name]]
        with naming(self.staging.target):
            last = shard.write(output, start, data)
        if last:
            self.finishing.append(self.finisher.submit(self._finish, shard))

    def _finish(self, shard: SafetensorsFile) -> None:
        with naming(self.staging.target):
            shard.sheet.finish()
        self.staging.finish(shard.name, shard.checks())
        self.missing.discard(shard.name)
        self.shards.pop(shard.name).sheet.close()

    def flush(self) -> None:
        """Wait until this rank's files are complete; `ExportError` if a tensor never came."""
        self.conveyor.flush()
        while self.finishing:
            self.finishing.pop().result()
        lacking: list[str] = []
        for file in sorted(self.missing):
            begun = self.shards.get(file)
            lacking += begun.lacking() if begun else [output.name for output in self.plan.files[file]]
        if lacking:
            raise ExportError(f"{len(lacking)} tensors were never written, first {lacking[0]}")


def complete(contents: Contents, staging: Staging, copies: list[Path]) -> None:
    """Add the JSON files, copies of `copies`, and the index to a folder in which all shards are."""
    with naming(staging.target):
        for path in copies:
            (staging.folder / path.name).write_bytes(_content(path))
        for name, content in contents.jsons.items():
            write_json(staging.folder / name, content)
        if len(contents.files) > 1:
            said = {"metadata": {"total_size": contents.nbytes}, "weight_map": contents.homes}
            write_json(staging.folder / INDEX, said)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # of what is read, and not of what is written
        raise not_read(path, "not a file to copy", error, "Fetch it again") from error


def write_json(path: Path, content: dict) -> None:
    """The only form in which JSON files are written."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
