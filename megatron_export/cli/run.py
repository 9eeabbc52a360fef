"""The command's story: an HF or Megatron checkpoint becomes a model on this topology, is calibrated if need be, and exported."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from torch import Tensor

from ..calibration import statistics
from ..calibration.calibrate import calibrate
from ..calibration.lookup import check_calibration, is_needed
from ..calibration.memory import MicroBatch
from ..checkpoint.hf_folder import check_unchanged
from ..checkpoint.original import Original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError, report
from ..common.optional import part
from ..common.progress import Progress
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..distributed.world import enough_files
from ..export.drafts import Draft, open_draft
from ..export.origins import Model, Statistics, Stored
from ..export.pipeline import Clock, Report, exported, with_draft
from ..export.prepare import Opening, open_export
from ..models import HEAD, check_computed, shape_of
from ..models.statistic_names import is_alpha, is_sensitivity, is_tokens, module_of
from ..planning.budget import candidates
from ..planning.plan import Plan
from ..verify import thresholds
from ..verify.report import write
from ..writing.journal import kept_statistics
from . import hub, inputs, outputs
from .config import MEGATRON, ExportConfig


@dataclass
class Outcome:
    """What has been settled and done so far.

    batch       of calibration data, where that is run
    samples     of it, in all
    draft       of the model, if it has one
    report      None after a dry run
    bytes_read  of weights, by all ranks
    tokens      experts of a layer -> how many calibration tokens each was given, int64 [experts]
    seconds     of each stage
    verdict     rows of the judgement, where one was asked for, and of what followed
    remarks     on what was given, a sentence each
    """

    world: int = 1
    plan: Plan | None = None
    batch: MicroBatch | None = None
    samples: int = 0
    draft: Draft | None = None
    report: Report | None = None
    bytes_read: int = 0
    tokens: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    verdict: list[tuple[str, str]] = field(default_factory=list)
    remarks: tuple[str, ...] = ()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run_export(config: ExportConfig, example_model: Path, progress: Progress) -> Outcome:
    """Do what the command was told, on every rank of a `torchrun`. `ExportError` on every rank when it cannot be done."""
    job = Outcome()
    kind = part(f"cli.{config.engine}_model")
    with enough_files(), kind.world(config) as here:
        opening, checkpoint, job.draft = _opened(config, example_model, here, kind)
        opening, samples = _calibration(config, opening, example_model, here)
        job.world, job.plan = here.world, opening.plan
        if samples is not None:
            job.batch, job.samples = MicroBatch(config.calib_batch_size, samples.shape[1]), len(samples)
        job.remarks = inputs.remarks(config, opening.original.folder, samples)
        if config.dry_run:
            return job
        if checkpoint is None or samples is not None:
            with job.stage("load"):
                length = None if samples is None else samples.shape[1]
                model, read = kind.load(config, opening.original, checkpoint, length, here, progress)
                job.bytes_read = sum(collectives.everyone(here, read))
            opening = kind.built(here, opening, model)
        original = opening.original
        with together(here, "load the weights"):
            check_unchanged(original.folder, original.files)
        if samples is not None:
            with job.stage("calibrate"):
                found = _calibrated(config, opening, model, samples, here, progress)
            opening = replace(opening, statistics=found)
        known = opening.statistics or {}
        job.tokens = {name: counts for name, counts in known.items() if is_tokens(name)}
        opening = _saved(config, opening, samples is not None, here)
        job.plan = opening.plan
        with job.stage("export"):
            said = inputs.provenance(config, original), _notes(job, known)
            finish = partial(_finish, job, config, original.folder, here, progress)
            job.report = with_draft(
                here,
                exported(here, opening, config.output.resolve(), Clock(), *said, finish, progress),
                job.draft,
                said[0],
                progress,
            )
        if isinstance(opening.origin, Stored):
            job.bytes_read = sum(collectives.everyone(here, checkpoint.nbytes))
        if config.push_to_hub:
            with together(here, "upload"):
                if here.first:
                    job.verdict.append(("pushed", hub.push(config.output.resolve(), config.push_to_hub)))
    return job


def _opened(
    config: ExportConfig,
    example_model: Path,
    here: Topology,
    kind: ModuleType,
) -> tuple[Opening, MegatronCheckpoint | None, Draft | None]:
    """The export that is asked for; the Megatron checkpoint that its weights are in, if it is one; and its draft. Collective."""
    with together(here, "check the settings"):
        original = inputs.original_of(config, example_model)
        kind.check(config, original.config, here)
        checkpoint = inputs.open_checkpoint(config, original.config)

    def check(plan: Plan, original: Original) -> None:
        outputs.check(config)
        inputs.check_text(config, original.folder)

    shared = config.report or config.push_to_hub is not None  # with people who want to know that it is what we wrote
    opening = open_export(
        here,
        Stored(checkpoint) if checkpoint else kind.unbuilt(config),
        original,
        replace(config.request, merge_lora=False, sha256=config.request.sha256 or shared),  # the checkpoint merges
        {} if config.load_calibration else None,
        config.output,
        apart=inputs.apart(config),
        check=check,
    )
    place = config.output.resolve() if config.output else None
    checkpoint = opening.origin.checkpoint if checkpoint else None  # with heads, if they are asked for
    return opening, checkpoint, open_draft(here, opening, place, None, inputs.apart(config))


def _calibration(
    config: ExportConfig, opening: Opening, example_model: Path, here: Topology
) -> tuple[Opening, Tensor | None]:
    """The opening with the statistics that are there already; where they are to be measured, the samples. Collective."""
    request, original = opening.request, opening.original
    with together(here, "check the calibration"):
        if request.inherited and (config.save_calibration or config.calib_data):
            raise ExportError(
                "--save-calibration and --calib-data have no effect: ModelOpt's quantizers in the checkpoint have its statistics"
            )
        known = statistics.load(config.load_calibration, original.config) if config.load_calibration else None
        resumes = request.resume and config.output and here.first and not (known or request.inherited)
        kept = kept_statistics(config.output.resolve()) if resumes else None
    kept = collectives.from_first(here, kept)
    if request.inherited:
        return opening, None
    known = known or kept
    with together(here, "check the calibration"):
        if known:
            check_calibration(opening.plan, known)
        samples, plan = None, opening.plan
        if not known and (is_needed(plan) or config.save_calibration or request.effective_bits is not None):
            if shape_of(original.config).medusa:
                raise ExportError(
                    "calibration runs no heads of Medusa. Give --input-scale, or --load-calibration with theirs"
                )
            samples = inputs.read_samples(config, original.config, original.folder, example_model, here)
            if config.engine == MEGATRON:
                check_computed(original.config, samples.shape[1])
    return _chosen(config, replace(opening, statistics=known), here), samples


def _calibrated(
    config: ExportConfig, opening: Opening, model: Model, samples: Tensor, here: Topology, progress: Progress
) -> Statistics:
    """What calibration data shows. Collective."""
    rank, replicas = inputs.replica(config, here)
    awq = opening.plan.awq  # whose search is needed; maxima serve every format
    return calibrate(
        model,
        samples.split(config.calib_batch_size)[rank::replicas],
        format=awq.name if awq else "fp8",
        group_size=opening.request.options.group_size,
        awq_clip=opening.request.options.awq_clip,
        all_experts=config.calib_all_experts,
        head=any(item.form and item.source.canonical == HEAD for item in opening.plan.items),
        sensitivities=candidates(opening.request).values() if opening.request.effective_bits is not None else (),
        progress=progress,
    )


def _saved(config: ExportConfig, opening: Opening, measured: bool, here: Topology) -> Opening:
    """Save the calibration; the opening, with what a budget chooses by one that was measured. Collective."""
    original = opening.original
    with together(here, "save the calibration"):
        check_unchanged(original.folder, original.files)
        if here.first:
            outputs.save_calibration(config, opening.statistics or {}, original.config, measured)
    return _chosen(config, opening, here) if measured else opening


def _chosen(config: ExportConfig, opening: Opening, here: Topology) -> Opening:
    """The opening with the formats that a budget chooses, if there is one, once there are statistics. Collective."""
    if config.request.effective_bits is None or not opening.statistics:
        return opening
    return open_export(here, opening.origin, opening.original, opening.given, opening.statistics, config.output)


def _notes(job: Outcome, known: Statistics) -> dict:
    """What a report shows of this run: seconds of its stages so far, calibration samples, tokens of experts, alphas of AWQ,
    sensitivities in nats per token; and how many weights kept the values of another format.
    """
    alphas = {name: round(float(value), 2) for name, value in known.items() if is_alpha(name)}
    tokens = {module_of(name): counts.tolist() for name, counts in job.tokens.items()}
    seconds = {stage: round(seconds, 1) for stage, seconds in job.seconds.items()}
    cast = Counter(f"mxfp4 to {item.form.name}" for item in job.plan.items if item.cast)
    costs = {name: float(f"{float(value):.3g}") for name, value in known.items() if is_sensitivity(name)}
    others = {"samples": job.samples, "alphas": alphas, "tokens": tokens, "sensitivities": costs, "cast": dict(cast)}
    return {"seconds": seconds} | {name: said for name, said in others.items() if said}


def _finish(job: Outcome, config: ExportConfig, folder: Path, here: Topology, progress: Progress, staged: Path) -> None:
    """Judge what is about to be published, and describe it."""
    if not (config.verify or config.report):
        return
    asked = config.min_snr, config.max_ppl_ratio, config.verify_text
    wanted = thresholds.Wanted(*asked, device=here.device.type, listed=False, flag="--verify-text")
    found = thresholds.inspected(staged, folder, wanted, progress)
    report([f"not published: {problem}" for problem in found.problems])
    job.verdict = [pair for pair in thresholds.rows(found) if pair[0] not in ("checkpoint", "format")]
    if config.report:
        write.present(found, config.hf_model or str(folder), config.push_to_hub or config.output.name)
