"""An export that training does not wait for: encoded tensors are kept in memory, and another process writes them.

Training stops while the model is encoded and copied into files in rank 0's memory (`memfd_create`), which have the bytes that they
will have on disk. Another process (`async_writer.py`), which outlives this one, takes their checksums, copies them into the staging
folder, reads them back and publishes. Training waits mostly for the system to find memory; `keep_memory` keeps it for the next
export.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoint.original import Original
from ..common.errors import ExportError
from ..common.host_memory import available
from ..common.options import takes_options
from ..common.text import readable
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..hf.model import is_transformers
from ..planning.budget import recipe_text
from ..planning.contents import contents_of
from ..planning.plan import Plan
from ..planning.request import Request, requested
from ..writing.byte_sink import InMemory, OnDisk, Sheet
from ..writing.journal import Checks
from ..writing.manifest import accelerators
from ..writing.publish import Destination
from ..writing.staging import Claim, claimed
from ..writing.target import check_empty
from ..writing.writer import CheckpointWriter
from .async_writer import Handover
from .drafts import refuse_draft
from .encode_stream import Stream, Work
from .origins import Model, Statistics, world_of
from .prepare import open_model, surveyed

SPARE_BYTES = 1 << 30  # of memory, for all else
WAITED = ("resume", "target", "writers", "draft_format")  # options of an export that is waited for


@dataclass
class Handle:
    """An export that another process is writing. Every rank has one; `done` and `wait` are collective.

    `stopped` is how many seconds the caller was held up, `nbytes` what rank 0's host keeps until it is written.
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

    def wait(self) -> None:
        """Return when the checkpoint is published. `ExportError` on every rank if it failed: then `folder` is as it was."""
        self._ended(lambda process: True)

    def _ended(self, ready: Callable[[subprocess.Popen], bool]) -> bool:
        with self.world() as here:
            if self.outcome is None:
                ended = self.process and ready(self.process)
                said = self.process.communicate()[1].decode().strip() if ended else ""
                self.outcome = collectives.from_first(here, (self.process.returncode, said) if ended else None)
            if self.outcome is None:
                return False
            if self.memory:
                self.memory.release()
                self.memory = None
            status, said = self.outcome
            with together(here, "write in the background"):
                if status:
                    raise ExportError(said or f"the process that writes {self.folder} ended with status {status}")
            return True


class _Memory:
    """Where a writer's files grow in memory (writing.writer.Desk). With `keep`, it serves the next export with the same files."""

    spare: ClassVar[dict[tuple, tuple[dict[str, int], dict[str, InMemory]]]] = {}

    def __init__(self, target: Path, plan: Plan, keep: bool) -> None:
        self.target = target
        self.keep = keep
        self.finished: dict[str, Checks] = {}  # nothing is, when an export begins
        self.kind = tuple(plan.files.items())
        self.descriptors, self.mapped = self.spare.pop(self.kind, ({}, {}))

    @classmethod
    def check(cls, plan: Plan) -> None:
        """`ExportError` where this host has too little memory: the system would end the training process."""
        room = available()
        if tuple(plan.files.items()) not in cls.spare and plan.nbytes + SPARE_BYTES > room:
            raise ExportError(
                f"the encoded checkpoint takes {readable(plan.nbytes)} of rank 0's memory, and {readable(room)} are available "
                "there. Use export_hf_checkpoint, which keeps a few buffers of it at a time"
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


@takes_options(Request, WAITED)
def export_hf_checkpoint_async(
    model: Model,
    export_dir: str | Path,
    *,
    hf_model: str | Path,
    calibration: Statistics | None = None,
    provenance: dict | None = None,
    keep_memory: bool = False,
    **options: Any,
) -> Handle:
    """`export_hf_checkpoint`, but return as soon as the encoded model is in memory; the bytes that come out are the same.

    model, export_dir, hf_model, calibration, provenance  as there; rank 0 writes, and what was interrupted is not resumed
    keep_memory  keep rank 0's memory for the next export of this model; it is free again when the process ends
    The model may be changed when this returns. Collective. `ExportError` on every rank for what can be refused at once, such as too
    little memory for the whole encoded checkpoint on rank 0's host; what fails later is raised by the handle.
    """
    started = time.monotonic()
    request = requested(options, WAITED)
    target = Path(export_dir).resolve()

    def check(plan: Plan, original: Original) -> None:
        _Memory.check(plan)
        check_empty(target, overwrite=request.overwrite)
        if plan.copied:
            copied = f"{len(plan.copied)} tensors are copied from the original model"
            raise ExportError(f"{copied}. Use export_hf_checkpoint")
        claims.append(claimed(target))
        stack.push(claims[0].leave)  # the process that writes has it then

    claims: list[Claim] = []  # of rank 0
    if is_transformers(model):
        raise ExportError(
            "transformers models are exported by export_hf_checkpoint, which waits until they are written"
        )
    with world_of(model, request.timeout) as here, ExitStack() as stack:
        opening = open_model(here, model, hf_model, request, calibration, target, check)
        refuse_draft(here, opening)
        work, identity = surveyed(here, opening)
        said = {"settings": opening.request.said(), "versions": accelerators()}
        place = Destination(
            target,
            request.overwrite,
            False,
            request.sync,
            request.sha256,
            opening.original,
            identity,
            provenance or {},
            said,
            recipe_text(opening.request),
        )
        memory = _Memory(target, work.plan, keep_memory) if here.first else None
        try:
            _keep(here, work, memory)
            with together(here, "start the process that writes"):
                process = _started(work.plan, place, here.sizes, memory, claims[0]) if memory else None
        except BaseException:
            if memory:
                memory.release()
            raise
    if memory and not keep_memory:  # the process that writes has it now, and frees it file by file
        memory.release()
        memory = None
    world = partial(world_of, [], request.timeout)  # Megatron's, whatever the model: a handle keeps none alive
    return Handle(target, time.monotonic() - started, work.plan.nbytes, process, world, memory)


def _keep(here: Topology, work: Work, memory: _Memory | None) -> None:
    """Encode all buckets; rank 0 keeps them."""
    with ExitStack() as stack:
        with together(here, "keep"):
            writer = CheckpointWriter(work.plan, memory, device=here.device, checked=False) if memory else None
            if writer:
                stack.enter_context(writer)
        for _ in Stream(here, work, writer.write if writer else list).run(work.plan.buckets):
            pass
        with together(here, "keep"):
            if writer:
                writer.flush()


def _started(plan: Plan, place: Destination, sizes: dict[str, int], memory: _Memory, claim: Claim) -> subprocess.Popen:
    """The process that writes; it has the memory's descriptors, and a session of its own, so that it outlives this one."""
    job = os.memfd_create("job")  # no pipe: the process takes seconds before it reads
    with os.fdopen(job, "wb", closefd=False) as file:
        pickle.dump(Handover(contents_of(plan), place, sizes, memory.descriptors, claim), file)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_export.export.async_writer", f"{job}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(job, claim.lock, *memory.descriptors.values()),
            start_new_session=True,
        )
    finally:
        os.close(job)
