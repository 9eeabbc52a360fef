"""The whole story of an export on one page: plan, agree on maxima, then encode, gather and write bucket by bucket, read back,
publish.
"""

import resource
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.hf_folder import Original
from ..checkpoint.hf_weights import SourceWeights
from ..checkpoint.torch_dist import Checkpoint
from ..common.errors import report
from ..common.progress import Progress, quiet
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import SILENCE, Topology
from ..formats import Options
from ..mcore import parallel_state
from ..models import copied_prefixes
from ..planning.contents import contents_of
from ..planning.engine_check import refusals
from ..planning.plan import Plan
from ..planning.request import Request
from ..planning.shard_files import Bucket
from ..writing import manifest
from ..writing.journal import Checks
from ..writing.publish import Place, opened, publish
from ..writing.read_back import ReadBack
from ..writing.staging import Guest, Staging, tidy
from ..writing.target import check_apart, check_target
from ..writing.writer import CheckpointWriter
from .encode_stream import Stream, Work
from .prepare import planned, surveyed


@dataclass(frozen=True)
class Report:
    """What an export did. Sizes in bytes; peaks are one number per rank, GPU peaks 0 on the CPU. `kept` counts the files
    that an interrupted export had completed; `wire` is what each rank sent to others, `stages` how long each stage took.
    """

    folder: Path
    plan: Plan
    seconds: float
    peak_host: tuple[int, ...]
    peak_gpu: tuple[int, ...]
    kept: int = 0
    wire: tuple[int, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)


@dataclass
class _Done:
    """What has been done: how many files an interrupted export had completed, how many bytes this rank sent, and when stages ended,
    the first of them the start.
    """

    kept: int = 0
    sent: int = 0
    ends: dict[str, float] = field(default_factory=dict)

    def end(self, stage: str) -> None:
        self.ends[stage] = time.monotonic()

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each."""
        return {stage: end - start for (_, start), (stage, end) in pairwise(self.ends.items())}


def export_hf_checkpoint(
    model: nn.Module | list[nn.Module] | Checkpoint,
    export_dir: str | Path,
    *,
    hf_model: str | Path,
    format: str | None = None,
    calibration: dict[str, Tensor] | None = None,
    kv_cache: str | None = None,
    group_size: int = 128,
    fp8_pb_spelling: str = "native",
    awq_output: str = "folded",
    awq_clip: bool = False,
    exclude: Iterable[str] = (),
    mtp: str = "keep",
    quantize_mla: bool = False,
    max_shard_size: str | int = "5GB",
    target: str = "",
    overwrite: bool = False,
    resume: bool = False,
    writers: str = "rank0",
    sync: bool = True,
    merge_lora: bool = False,
    provenance: dict | None = None,
    notes: dict | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
    timeout: float = SILENCE,
    progress: Progress = quiet,
) -> Report:
    """Write a live Megatron-Core model as a unified HuggingFace checkpoint; the model is left exactly as it was.

    model           this rank's `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or
                    not; quantized as the bfloat16 of its weights. Or a `Checkpoint`: no model is built, each rank reads the
                    shards that it exports, one after the other, and all of them twice
    hf_model        folder or hub id of the original HF model: config and tokenizer, and the tensors that Megatron's model
                    does not have (the parts of Llama 4 that see); its other weights are not read
    format          bf16, fp8, fp8_pb, nvfp4, nvfp4_awq, int4_awq or w4a8_awq; kv_cache: none, fp8 or nvfp4. Not given: what
                    ModelOpt quantized the model to, else fp8 and none
    calibration     what `calibrate` returned; every format but bf16 and fp8_pb needs it, and every KV cache. A model that
                    ModelOpt quantized has its own
    group_size      128 or 64, for int4_awq and w4a8_awq
    fp8_pb_spelling native or modelopt; awq_output: folded or modelopt, for nvfp4_awq
    awq_clip        apply the clipping that `calibrate(awq_clip=True)` found, for the AWQ formats
    exclude         globs over HF module names to leave in bfloat16
    mtp             keep or drop layers that predict one more token (DeepSeek)
    quantize_mla    quantize latent attention (DeepSeek) too, in formats that not every engine loads it in
    max_shard_size  largest shard, as bytes or like "5GB"
    target          engines that must load the result, such as "vllm,sglang"; one that would refuse it is an error
    merge_lora      add LoRA adapters (Megatron-Bridge's, ModelOpt's) to the weights that are written
    resume          go on with an export into `export_dir` that was interrupted; it is refused if model, settings or
                    statistics are others
    writers         which ranks write files: "rank0", "node" (the first of every node) or "all"; the bytes are the same
    sync            whether everything is on the disk, not only in the system's memory, before the folder gets its name
    timeout         seconds after which a rank that is not heard of counts as gone
    provenance      what the manifest says of where model and statistics came from, as JSON has it
    notes           what the manifest says besides, which another run may say otherwise
    finish          is called on rank 0 with the folder when all is in it but its final name; what it raises stops the export
    Collective: every rank of the world calls it with the same arguments. `ExportError` on every rank, with the same
    message, when it cannot be done; then nothing was published and `export_dir` is as it was.
    """
    done = _Done()
    done.end("start")
    options = Options(group_size, fp8_pb_spelling, awq_output, awq_clip)
    request = Request(
        hf_model, format, calibration, kv_cache, options, tuple(exclude), mtp, quantize_mla, max_shard_size, writers,
        merge_lora=merge_lora,
    )  # fmt: skip
    export_dir = Path(export_dir).resolve()

    def check(plan: Plan, original: Original) -> None:
        report(refusals(plan, target))
        check_target(export_dir, plan, overwrite=overwrite, resume=resume)
        check_apart(export_dir, original.folder)

    with parallel_state.current(timeout) as here:
        found = planned(here, model, request, check)
        done.end("plan")
        work, identity = surveyed(here, found)
        done.end("survey")
        place = Place(export_dir, overwrite, resume, sync, found.original, identity, provenance or {}, notes or {})
        _write(here, work, place, done, progress, finish)
        peak_host, peak_gpu, wire = zip(*collectives.everyone(here, (*_peaks(here), done.sent)), strict=True)
    seconds = time.monotonic() - done.ends["start"]
    return Report(export_dir, found.plan, seconds, peak_host, peak_gpu, done.kept, wire, done.stages)


def _write(
    here: Topology, work: Work, place: Place, done: _Done, progress: Progress, finish: Callable[[Path], None]
) -> None:
    """Encode, gather and write one bucket after the other; memory is bounded by a bucket, whatever the model."""
    plan = work.plan
    with ExitStack() as stack:
        staging, published = None, False
        with together(here, "start writing"):
            published = here.first and place.resume and manifest.identity_of(place.folder) == place.identity
            if published:
                tidy(place.folder)
            elif here.first:
                staging = stack.enter_context(opened(place))
                staging.keep(work.calibration)
        published, kept = collectives.from_first(here, (published, staging.finished if staging else {}))
        done.kept = len(plan.files) if published else len(kept)
        if published:
            return
        with together(here, "open files"):
            writer, back = _opened(here, plan, place, staging, kept, stack)
        stream = Stream(here, work, writer.write if writer else list)
        for _ in stream.run(progress("export", _left(plan, kept))):
            pass
        done.sent = stream.sent
        done.end("encode")
        here.pulse.at("export", "")
        with together(here, "finish the files"):
            if writer and plan.copied:
                with SourceWeights(place.original.folder, only=copied_prefixes(plan.config)) as weights:
                    writer.write((o, weights.whole(o.name)) for o in plan.copied if writer.wants(o))
            if writer:
                writer.flush()
        done.end("write")
        with together(here, "read back what was written"):
            read = back.found(writer.staging.finished, progress) if writer else None
        read = collectives.at_first(here, read)
        done.end("verify")
        with together(here, "publish", heeding=False):
            if staging:
                publish(contents_of(plan), staging, place, here.sizes, [one for one in read if one], finish)
        done.end("publish")


def _opened(
    here: Topology, plan: Plan, place: Place, staging: Staging | None, kept: dict[str, Checks], stack: ExitStack
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
