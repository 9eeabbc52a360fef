"""The command's story: an HF or Megatron checkpoint becomes a model on this topology, is calibrated if need be, and exported."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from ..calibration import statistics
from ..calibration.calibrate import calibrate
from ..calibration.lookup import check_calibration
from ..calibration.modelopt.recipe import told
from ..checkpoint import hf_folder
from ..checkpoint.hf_folder import check_unchanged, of_folder
from ..checkpoint.hf_weights import copied_tensors
from ..checkpoint.torch_dist import Checkpoint
from ..common.errors import report
from ..common.progress import Progress
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.signals import heeded
from ..distributed.topology import Topology
from ..export.pipeline import Report, export_hf_checkpoint
from ..mcore import build, load_hf, load_torch_dist, parallel_state
from ..models import architecture_of, copied_prefixes, mtp_prefixes, without_mtp
from ..models.statistic_names import is_alpha, is_tokens, module_of
from ..planning.plan import Plan
from ..verify import thresholds
from ..verify.report import write
from ..writing.journal import kept_statistics
from . import hub, inputs
from .config import ExportConfig
from .inputs import asked_by
from .plan_command import planned


@dataclass
class Job:
    """What has been settled and done so far, such as whether calibration data is run; `report` is None after a dry run, `tokens`
    maps the experts of each layer to how many calibration tokens each was given; `verdict` has the rows of the judgement, where
    one was asked for, and of what followed.
    """

    plan: Plan | None = None
    calibrates: bool = False
    report: Report | None = None
    bytes_read: int = 0
    tokens: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    verdict: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def run(config: ExportConfig, example_model: Path, progress: Progress) -> Job:
    """Do what the command was told, on every rank of a `torchrun`. `ExportError` on every rank when it cannot be done."""
    job = Job()
    sizes = {"ep": config.ep, "etp": config.etp, "vpp": config.vpp}
    with (
        parallel_state.started(config.tp, config.pp, config.device, **sizes),
        parallel_state.current(config.timeout) as here,
    ):
        nodes = collectives.nodes(here)
        with together(here, "check the settings"):
            folder = inputs.model_folder(config, example_model)
            hf_config = hf_folder.read_config(folder)
            architecture_of(hf_config)  # first: of an unknown architecture, no key of config.json is known
            dropped = mtp_prefixes(hf_config) if config.mtp == "drop" else ()
            hf_config = without_mtp(hf_config) if config.mtp == "drop" else hf_config
            build.check_divides(hf_config, here, config.pp_layout)
            folder = hf_folder.with_copied(folder, config.hf_model or folder, copied_prefixes(hf_config))
            checkpoint = inputs.open_checkpoint(config, hf_config)
            asked = told(checkpoint, hf_config, asked_by(config)) if checkpoint else asked_by(config).plain()
            copied = copied_tensors(folder, copied_prefixes(hf_config))
            job.plan = planned(config, asked, hf_config, copied, here.world, nodes)
            inputs.check(config, job.plan, folder, here, asked)
            known = statistics.load(config.load_calibration, hf_config) if config.load_calibration else None
            kept = _kept(config) if here.first and known is None and not asked.inherited else None
        kept = collectives.from_first(here, kept)
        with together(here, "check the calibration"):
            known = known or kept
            if known:
                check_calibration(job.plan, known)
            samples = None
            if not (known or asked.inherited) and (job.plan.form.calibrated or job.plan.kv or config.save_calibration):
                samples = inputs.read_samples(config, hf_config, folder, example_model, here)
        job.calibrates = samples is not None
        if config.dry_run:
            return job
        files = of_folder(folder)
        model = checkpoint
        if checkpoint is None or samples is not None:
            with job.stage("load"):
                model = _load(job, config, hf_config, checkpoint or folder, dropped, samples, here, progress)
        with together(here, "load the weights"):
            check_unchanged(folder, files)
        if samples is not None:
            with job.stage("calibrate"):
                share = samples.split(config.calib_batch_size)[here.dp_rank :: here.dp_size]
                known = calibrate(
                    model,
                    share,
                    format=asked.format,
                    group_size=config.group_size,
                    awq_clip=config.awq_clip,
                    all_experts=config.calib_all_experts,
                    progress=progress,
                )
        job.tokens = {name: counts for name, counts in (known or {}).items() if is_tokens(name)}
        with together(here, "save the calibration"):
            check_unchanged(folder, files)
            if config.save_calibration and here.first:
                statistics.save(known, config.save_calibration, hf_config)
        with job.stage("export"):
            job.report = export_hf_checkpoint(
                model,
                config.output,
                hf_model=folder,
                format=config.format,
                calibration=known,
                kv_cache=config.kv_cache,
                group_size=config.group_size,
                fp8_pb_spelling=config.fp8_pb_spelling,
                awq_output=config.awq_output,
                awq_clip=config.awq_clip,
                exclude=config.exclude,
                mtp=config.mtp,
                quantize_mla=config.quantize_mla,
                max_shard_size=config.max_shard_size,
                target=config.target,
                overwrite=config.overwrite,
                resume=config.resume,
                writers=config.writers,
                sync=not config.no_fsync,
                provenance=inputs.provenance(config, folder),
                notes=_notes(job, known or {}),
                finish=partial(_finish, job, config, folder, here, progress),
                timeout=config.timeout,
                progress=progress,
            )
        if model is checkpoint:
            job.bytes_read = sum(collectives.everyone(here, checkpoint.nbytes))
        if config.push_to_hub:
            with together(here, "upload"):
                if here.first:
                    job.verdict.append(("pushed", hub.push(config.output.resolve(), config.push_to_hub)))
    return job


def _notes(job: Job, known: dict[str, Tensor]) -> dict:
    """What a report shows of this run: seconds of its stages so far, tokens of experts, alphas of AWQ."""
    alphas = {name: round(float(value), 2) for name, value in known.items() if is_alpha(name)}
    tokens = {module_of(name): counts.tolist() for name, counts in job.tokens.items()}
    seconds = {stage: round(seconds, 1) for stage, seconds in job.seconds.items()}
    return {"seconds": seconds} | ({"alphas": alphas} if alphas else {}) | ({"tokens": tokens} if tokens else {})


def _finish(job: Job, config: ExportConfig, folder: Path, here: Topology, progress: Progress, staged: Path) -> None:
    """Judge what is about to be published, and describe it."""
    if not (config.verify or config.report):
        return
    wanted = thresholds.Wanted(
        config.min_snr, config.max_ppl_ratio, config.verify_text, device=here.device.type, listed=False
    )
    found = thresholds.inspected(staged, folder, wanted, progress)
    report([f"not published: {problem}" for problem in found.problems])
    job.verdict = [pair for pair in thresholds.rows(found) if pair[0] not in ("checkpoint", "format")]
    if config.report:
        write.present(found, config.hf_model or str(folder), config.push_to_hub or config.output.name)


def _kept(config: ExportConfig) -> dict[str, Tensor] | None:
    """The statistics of the interrupted export that is to go on."""
    return kept_statistics(config.output.resolve()) if config.resume and config.output else None


def _load(
    job: Job,
    config: ExportConfig,
    hf_config: dict,
    source: Path | Checkpoint,
    dropped: tuple[str, ...],
    samples: Tensor | None,
    here: Topology,
    progress: Progress,
) -> object:
    with together(here, "build the model"):
        length = None if samples is None else samples.shape[1]
        model = build.build_model(hf_config, here, max_sequence_length=length, pp_layout=config.pp_layout)
    with together(here, "load the weights"):
        steps = partial(_located, here, progress)
        if isinstance(source, Checkpoint):
            read = load_torch_dist.load_checkpoint(model, source, here, steps)
        else:
            read = load_hf.load_hf_weights(model, source, hf_config, here, steps, dropped)
    here.pulse.at("load the weights", "")
    job.bytes_read = sum(collectives.everyone(here, read))
    return model


def _located(here: Topology, progress: Progress, steps: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The steps of loading, each of which says where this rank is."""
    for name, shard in heeded(progress("load", steps)):
        here.pulse.at("load the weights", name)
        yield name, shard
