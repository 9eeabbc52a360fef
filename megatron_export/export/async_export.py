"""An export that training does not wait for: encoded tensors are kept in memory, and other processes write them.

Training stops while the model is encoded and copied into files in the memory of the ranks that write (`memfd_create`), which have
the bytes that they will have on disk. Another process of each such rank (`async_writer.py`), which outlives this one, takes their
checksums, copies them into the staging folder and reads them back; that of rank 0 publishes. Training waits mostly for the system
to find memory; `keep_memory` keeps it for the next export.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

from ..checkpoint.original import Original
from ..common.errors import ExportError
from ..common.host_memory import available
from ..common.options import takes_options
from ..common.text import readable
from ..distributed import collectives
from ..distributed import world as worlds
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..hf.model import device_of, is_transformers
from ..planning.plan import Plan
from ..planning.request import Request, requested
from ..writing.byte_sink import InMemory, OnDisk, Sheet
from ..writing.journal import Checks
from ..writing.staging import Claim, claimed
from ..writing.target import check_empty
from ..writing.writer import CheckpointWriter
from .async_start import start_writing
from .drafts import refuse_draft
from .encode_stream import Stream, Work
from .origins import Model, Statistics, Tokenizer, world_of
from .prepare import destination_of, open_model, surveyed

SPARE_BYTES = 1 << 30  # of memory, for all else
WAITED = ("resume", "target", "draft_format")  # options of an export that is waited for


@dataclass
class Handle:
    """An export that other processes are writing. Every rank has one; `done` and `wait` are collective.

    `stopped` is how many seconds the caller was held up, `nbytes` what the hosts of the ranks that write keep until it is written.
    """

    folder: Path
    stopped: float
    nbytes: int
    process: subprocess.Popen | None
    world: Callable[[], AbstractContextManager[Topology]]
    memory: "_Memory | None" = None
    outcome: tuple[int, str] | None = None

    def done(self) -> bool:
        """Whether the export has ended. `ExportError` on every rank if it failed."""
        return self._ended(lambda process: process.poll() is not None)

    def wait(self, timeout: float | None = None) -> None:
        """Return when the checkpoint is published. `ExportError` on every rank if it failed: then `folder` is as it was.

        timeout  seconds of waiting, without end if None. `TimeoutError` on every rank when they are over: the export goes on, and
                 `wait` and `done` may be called again
        """
        if not self._ended(partial(_ends_within, timeout)):
            raise TimeoutError(f"{self.folder} is not written after {timeout:g} s of waiting. It goes on: wait again")

    def _ended(self, ready: Callable[[subprocess.Popen], bool]) -> bool:
        with self.world() as here:
            if self.outcome is None:
                ended = here.first and ready(self.process)
                said = _said(self.process) if ended else ""
                self.outcome = collectives.from_first(here, (self.process.returncode, said) if ended else None)
            if self.outcome is None:
                return False
            if self.process:
                self.process.wait()  # those of other ranks end with rank 0's
            if self.memory:
                self.memory.release()
                self.memory = None
            status, said = self.outcome
            with together(here, "write in the background"):
                if status:
                    raise ExportError(said or f"the process that writes {self.folder} ended with status {status}")
            return True


def _said(process: subprocess.Popen) -> str:
    """What it said on standard error."""
    process.stderr.seek(0)
    return process.stderr.read().decode(errors="replace").strip()


def _ends_within(timeout: float | None, process: subprocess.Popen) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout)
        return True
    return False


class _Memory:
    """Where a writer's files grow in memory (writing.writer.Desk). With `keep`, it serves the next export with the same files."""

    spare: ClassVar[dict[tuple, tuple[dict[str, int], dict[str, InMemory]]]] = {}

    def __init__(self, target: Path, plan: Plan, rank: int, keep: bool) -> None:
        self.target = target
        self.keep = keep
        self.finished: dict[str, Checks] = {}  # nothing is, when an export begins
        self.kind = _files_of(plan, {rank})
        self.descriptors, self.mapped = self.spare.pop(self.kind, ({}, {}))

    @classmethod
    def check(cls, plan: Plan, rank: int, nodes: tuple[int, ...]) -> None:
        """`ExportError` where the host of a rank that writes has too little memory: the system would end the training process."""
        own = _files_of(plan, {rank})
        if not own or own in cls.spare:
            return
        there = _files_of(plan, {other for other, node in enumerate(nodes) if node == nodes[rank]})
        alone = len(set(nodes)) > 1 and set(plan.writers.values()) == {0}
        nbytes, room = sum(output.nbytes for _, outputs in there for output in outputs), available()
        if nbytes + SPARE_BYTES > room:
            way_out = "Spread it with writers='node', or use" if alone else "Use"
            what = "the encoded checkpoint takes" if nbytes == plan.nbytes else "what is written there takes"
            raise ExportError(
                f"{what} {readable(nbytes)} of the memory of rank {rank}'s host, and {readable(room)} are available there. "
                f"{way_out} export_hf_checkpoint, which keeps a few buffers of it at a time"
            )

    def path(self, file: str) -> Path:
        if file not in self.descriptors:
            self.descriptors[file] = os.memfd_create(file)
        return Path(f"/proc/self/fd/{self.descriptors[file]}")

    def sheet(self, file: str, nbytes: int) -> Sheet:
        path = self.path(file)
        if not self.keep:  # new memory is found faster by writes than through a mapping
            return OnDisk(path, nbytes, sync=False)
        if file not in self.mapped:
            self.mapped[file] = InMemory(self.descriptors[file], nbytes)
        return self.mapped[file]

    def finish(self, file: str, checks: Checks) -> None:
        pass  # the other process begins when all are

    def release(self) -> None:
        """Nobody reads it any more."""
        if self.keep and self.kind not in self.spare:
            self.spare[self.kind] = self.descriptors, self.mapped
            return
        self.mapped.clear()
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def _files_of(plan: Plan, ranks: set[int]) -> tuple:
    """The files, with their tensors, that these ranks write."""
    return tuple((file, outputs) for file, outputs in plan.files.items() if plan.writers[file] in ranks)


@takes_options(Request, WAITED)
def export_hf_checkpoint_async(
    model: Model,
    export_dir: str | Path,
    *,
    hf_model: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    calibration: Statistics | None = None,
    provenance: dict | None = None,
    keep_memory: bool = False,
    **options: Any,
) -> Handle:
    """`export_hf_checkpoint`, but return as soon as the encoded model is in memory; the bytes that come out are the same.

    model, export_dir, hf_model, tokenizer, calibration, provenance  as there; what was interrupted is not resumed
    keep_memory  keep the writers' memory for the next export of this model; it is free again when the process ends
    The model may be changed when this returns. Collective. `ExportError` on every rank for what can be refused at once, such as too
    little memory on a writer's host for all that is encoded for it; what fails later is raised by the handle.
    """
    started = time.monotonic()
    request = requested(options, WAITED)
    target = Path(export_dir).resolve()

    def check(plan: Plan, original: Original) -> None:
        check_empty(target, overwrite=request.overwrite)
        if plan.copied:
            copied = f"{len(plan.copied)} tensors are copied from the original model"
            raise ExportError(f"{copied}. Use export_hf_checkpoint")
        claims.append(claimed(target))
        stack.push(claims[0].leave)  # the process that writes has it then

    claims: list[Claim] = []  # of rank 0
    with world_of(model, request.timeout) as here, ExitStack() as stack:
        beside = mkdtemp() if here.first else None  # the process that writes removes it
        stack.push(partial(_removed, beside))
        named = {"tokenizer": tokenizer, "beside": beside}
        opening = open_model(here, model, hf_model, request, calibration, target, check, **named)
        refuse_draft(here, opening)
        nodes = collectives.nodes(here)
        with together(here, "find memory"):
            _Memory.check(opening.plan, here.rank, nodes)
        work, identity = surveyed(here, opening)
        place = destination_of(opening, target, identity, provenance)
        own = here.first or here.rank in work.plan.writers.values()
        memory = _Memory(target, work.plan, here.rank, keep_memory) if own else None
        try:
            _keep(here, work, memory)
            files, mine = (
                memory.descriptors if memory else None,
                {"claim": claims[0], "beside": beside} if here.first else {},
            )
            process = start_writing(here, work.plan, place, files, mine)
        except BaseException:
            if memory:
                memory.release()
            raise
    if memory and not keep_memory:  # the process that writes has it now, and frees it file by file
        memory.release()
        memory = None
    plain = is_transformers(model)  # a handle keeps no model alive
    world = (
        partial(worlds.plain, request.timeout, device_of(model)) if plain else partial(world_of, [], request.timeout)
    )
    return Handle(target, time.monotonic() - started, work.plan.nbytes, process, world, memory)


def _removed(folder: str | None, failure: type | None, *error: object) -> None:
    """After a failure, remove a folder, if there is one."""
    if failure and folder:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(here: Topology, work: Work, memory: _Memory | None) -> None:
    """Encode all buckets; the ranks that write keep them."""
    with ExitStack() as stack:
        with together(here, "keep"):
            writer = (
                CheckpointWriter(work.plan, memory, rank=here.rank, device=here.device, checked=False)
                if memory
                else None
            )
            if writer:
                stack.enter_context(writer)
        for _ in Stream(here, work, writer.write if writer else list).run(work.plan.buckets):
            pass
        with together(here, "keep"):
            if writer:
                writer.flush()
