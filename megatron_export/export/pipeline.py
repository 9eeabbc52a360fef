"""The story of an export on one page: plan, agree on maxima, encode, gather and write bucket by bucket, read back, publish."""

import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..checkpoint.hf_weights import SourceWeights
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError
from ..common.options import takes_options
from ..common.progress import Progress, quiet
from ..common.threads import side_by_side
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..models import copied_prefixes
from ..planning.contents import contents_of
from ..planning.plan import Plan
from ..planning.request import Request, requested
from ..planning.shard_files import Bucket
from ..writing import manifest
from ..writing.journal import Checks
from ..writing.publish import Destination, open_staging, publish
from ..writing.read_back import ReadBack
from ..writing.staging import Guest, Staging, tidy
from ..writing.writer import CheckpointWriter
from .drafts import Draft, open_draft
from .encode_stream import Stream, Work
from .origins import Model, Statistics, Tokenizer, world_of
from .prepare import Opening, destination_of, open_model, surveyed

Finish = Callable[[Path], None]


@dataclass(frozen=True)
class Report:
    """What an export did. Sizes in bytes; peaks are one number per rank, GPU peaks 0 on the CPU. `kept` counts the files
    that an interrupted export had completed; `wire` is what each rank sent to others, `stages` how long each stage took;
    `draft` is what was done with the model's draft, if it has one.
    """

    folder: Path
    plan: Plan
    seconds: float
    peak_host: tuple[int, ...]
    peak_gpu: tuple[int, ...]
    kept: int = 0
    wire: tuple[int, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    draft: "Report | None" = None


class Clock:
    """When stages ended; it starts when it is made."""

    def __init__(self) -> None:
        self.ends = {"start": time.monotonic()}

    def end(self, stage: str) -> None:
        self.ends[stage] = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.ends["start"]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each."""
        return {stage: end - start for (_, start), (stage, end) in pairwise(self.ends.items())}


@takes_options(Request)
def export_hf_checkpoint(
    model: Model | MegatronCheckpoint,
    export_dir: str | Path,
    *,
    hf_model: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    calibration: Statistics | None = None,
    dtype: torch.dtype | None = None,
    save_modelopt_state: bool = False,
    provenance: dict | None = None,
    notes: dict | None = None,
    finish: Finish = lambda folder: None,
    progress: Progress = quiet,
    **options: Any,
) -> Report:
    """Write a live Megatron-Core or transformers model as a unified HuggingFace checkpoint; the model is left exactly as it was.

    model        this rank's `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or
                 not; quantized as the bfloat16 of its weights. Or a `MegatronCheckpoint`: no model is built, each rank reads the
                 shards that it exports, one after the other, and all of them twice. Or a transformers model, plain or quantized
                 by ModelOpt, in one process or the same on all ranks
    export_dir   the folder to write; what is there already is replaced with `overwrite` alone
    hf_model     folder or hub id of the original HF model: config and tokenizer, and the tensors that Megatron's model
                 does not have (the parts of Llama 4 that see); its other weights are not read. A transformers model has its own
                 config, and the tokenizer of the folder that it was loaded from
    tokenizer    of a transformers model: a tokenizer of transformers, or the folder of one
    calibration  what `calibrate` returned; every format but bf16 and fp8_pb needs it, and every KV cache. A model that
                 ModelOpt quantized has its own
    provenance   what the manifest says of where model and statistics came from, as JSON has it
    notes        what the manifest says besides, which another run may say otherwise
    dtype        of what is not quantized: torch.bfloat16, or None for the same
    save_modelopt_state  must be False: nothing but the checkpoint is written
    finish       is called on rank 0 with the folder when all is in it but its final name; what it raises stops the export
    Collective: every rank of the world calls it with the same arguments. `ExportError` on every rank, with the same
    message, when it cannot be done; then nothing was published and `export_dir` is as it was.
    """
    clock = Clock()
    request = requested(options)
    if dtype not in (None, torch.bfloat16):
        raise ExportError(f"dtype {dtype}: what is not quantized is written in bfloat16. Leave dtype out")
    if save_modelopt_state:
        raise ExportError(
            "save_modelopt_state must be False: engines do not read that state. Save it with mto.save of ModelOpt"
        )
    target = Path(export_dir).resolve()
    with world_of(model, request.timeout) as here, ExitStack() as stack:
        named = {"tokenizer": tokenizer, "beside": stack.enter_context(TemporaryDirectory())}
        opening = open_model(here, model, hf_model, request, calibration, target, **named)
        draft = open_draft(here, opening, target, calibration)
        clock.end("plan")
        report = exported(here, opening, target, clock, provenance, notes, finish, progress)
        return with_draft(here, report, draft, provenance, progress)


def exported(
    here: Topology,
    opening: Opening,
    target: Path,
    clock: Clock,
    provenance: dict | None,
    notes: dict | None,
    finish: Finish,
    progress: Progress,
) -> Report:
    """Do what was opened. Collective."""
    with side_by_side(here.device):
        work, identity = surveyed(here, opening)
        clock.end("survey")
        place = destination_of(opening, target, identity, provenance, notes)
        kept, sent = _write(here, work, place, clock, progress, finish)
    peak_host, peak_gpu, wire = zip(*collectives.everyone(here, (*_peaks(here), sent)), strict=True)
    return Report(target, opening.plan, clock.seconds, peak_host, peak_gpu, kept, wire, clock.stages)


def with_draft(
    here: Topology, base: Report, draft: Draft | None, provenance: dict | None, progress: Progress
) -> Report:
    """Export the draft of a model that is published; the report of the model with that of its draft. Collective."""
    if draft is None:
        return base
    try:
        done = exported(here, draft.opening, draft.folder, Clock(), provenance, None, lambda folder: None, progress)
    except ExportError as error:
        if error.everywhere:
            error.args = (f"{base.folder} is published, and its draft {draft.folder} is not: {error}",)
        raise
    return replace(base, draft=done)


def _write(
    here: Topology, work: Work, place: Destination, clock: Clock, progress: Progress, finish: Finish
) -> tuple[int, int]:
    """Encode, gather and write one bucket after the other; memory is bounded by a bucket, whatever the model.

    Returns how many files an interrupted export had completed, and how many bytes this rank sent.
    """
    plan = work.plan
    with ExitStack() as stack:
        staging, published = None, False
        with together(here, "start writing"):
            published = here.first and place.resume and manifest.identity_of(place.folder) == place.identity
            if published:
                tidy(place.folder)
            elif here.first:
                staging = stack.enter_context(open_staging(place))
                staging.keep(work.calibration)
        kept = dict(staging.finished) if staging else {}  # a copy: on rank 0 the journal's own goes on growing
        published, kept = collectives.from_first(here, (published, kept))
        if published:
            return len(plan.files), 0
        with together(here, "open files"):
            writer, back = _opened(here, plan, place, staging, kept, stack)
        stream = Stream(here, work, writer.write if writer else list)
        for _ in stream.run(progress("export", _left(plan, kept))):
            pass
        clock.end("encode")
        here.pulse.at("export", "")
        with together(here, "finish the files"):
            if writer and plan.copied:
                with SourceWeights(place.original.weights, only=copied_prefixes(plan.config)) as weights:
                    writer.write((o, weights.whole(o.name)) for o in plan.copied if writer.wants(o))
            if writer:
                writer.flush()
        clock.end("write")
        with together(here, "read back what was written"):
            read = back.found(writer.staging.finished, progress) if writer else None
        read = collectives.at_first(here, read)
        clock.end("verify")
        with together(here, "publish", heeding=False):
            if staging:
                publish(contents_of(plan), staging, place, here.sizes, [one for one in read if one], finish)
        clock.end("publish")
    return len(kept), stream.sent


def _opened(
    here: Topology, plan: Plan, place: Destination, staging: Staging | None, kept: dict[str, Checks], stack: ExitStack
) -> tuple[CheckpointWriter | None, ReadBack | None]:
    """The writer of this rank's files and what reads them back, if it has any; what is complete already is read at once."""
    mine = [file for file, rank in plan.writers.items() if rank == here.rank]
    if not mine:
        return None, None
    desk = staging or Guest(place.folder, here.rank, kept, place.sync)
    back = stack.enter_context(ReadBack(contents_of(plan)))
    for file in kept.keys() & set(mine):
        back.follow(desk.folder / file, plan.files[file])
    writer = CheckpointWriter(plan, desk, rank=here.rank, device=here.device, follow=back.follow)
    return stack.enter_context(writer), back


def _left(plan: Plan, kept: dict[str, Checks]) -> list[Bucket]:
    """The buckets without what an interrupted run has completed."""
    done = {output.name for file in kept for output in plan.files[file]}
    return [bucket for bucket in plan.buckets if bucket.items[0].outputs[0].name not in done]


def _peaks(here: Topology) -> tuple[int, int]:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(here.device) if here.device.type == "cuda" else 0
