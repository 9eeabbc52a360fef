"""The whole story of an export on one page: plan, agree on maxima, then encode, gather and write bucket by bucket."""

import dataclasses
import resource
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from . import assets, gather, manifest, topology
from .adapters import adapted
from .contradictions import contradictions
from .errors import ExportError, report
from .fingerprint import check_unchanged, of_folder, of_settings, of_statistics
from .formats import Options
from .gather import together
from .inherited import Asked, settled
from .item import Item, Measured
from .measured import check_calibration, measured
from .model import finish_gathering, shards_of
from .names import copied_prefixes, is_mtp, settings_of, unscaled_rope_settings, without_mtp
from .piece import Piece
from .plan import Plan, make_plan
from .progress import Progress, quiet
from .quant_config import config_json, hf_quant_config
from .signals import heed
from .sizes import parse_size
from .source import SourceWeights, copied_tensors
from .staging import Staging
from .survey import survey
from .topology import SILENCE, Topology
from .verify import verify
from .writer import MANIFEST, CheckpointWriter, check_apart, check_empty, check_target, write_json


@dataclass(frozen=True)
class _Work:
    """What is encoded, and the numbers that it is encoded with."""

    plan: Plan
    shards: Mapping[str, Tensor]
    amaxes: dict[str, Tensor]
    calibration: dict[str, Tensor]


@dataclass(frozen=True)
class _Place:
    """Where it goes: the target, the original model whose other files are copied, with the state that its files were in at the
    start, and what the manifest says.
    """

    folder: Path
    overwrite: bool
    resume: bool
    source: Path
    source_files: dict[str, tuple[int, int]]
    identity: dict[str, str]
    provenance: dict


@dataclass(frozen=True)
class Report:
    """What an export did. Sizes in bytes; peaks are one number per rank, GPU peaks 0 on the CPU. `kept` counts the files
    that an interrupted export had completed.
    """

    folder: Path
    plan: Plan
    seconds: float
    peak_host: tuple[int, ...]
    peak_gpu: tuple[int, ...]
    kept: int = 0


def export_hf_checkpoint(
    model: nn.Module | list[nn.Module],
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
    overwrite: bool = False,
    resume: bool = False,
    merge_lora: bool = False,
    provenance: dict | None = None,
    timeout: float = SILENCE,
    progress: Progress = quiet,
) -> Report:
    """Write a live Megatron-Core model as a unified HuggingFace checkpoint; the model is left exactly as it was.

    model           this rank's `GPTModel`, or its list of virtual-pipeline chunks, wrapped in DDP or Float16Module or
                    not; quantized as the bfloat16 of its weights
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
    merge_lora      add LoRA adapters (Megatron-Bridge's, ModelOpt's) to the weights that are written
    resume          go on with an export into `export_dir` that was interrupted; it is refused if model, settings or
                    statistics are others
    timeout         seconds after which a rank that is not heard of counts as gone
    provenance      what the manifest says of where model and statistics came from, as JSON has it
    Collective: every rank of the world calls it with the same arguments. `ExportError` on every rank, with the same
    message, when it cannot be done; then nothing was published and `export_dir` is as it was.
    """
    started = time.monotonic()
    options = Options(group_size, fp8_pb_spelling, awq_output, awq_clip)
    asked = Asked(format, kv_cache, options, calibration, tuple(exclude), quantize_mla)
    export_dir = Path(export_dir).resolve()
    with topology.current(timeout) as here:
        with together(here, "read the model's shapes"):
            folder = assets.find_model(hf_model, weights=False)
            if mtp not in ("keep", "drop"):
                raise ExportError(f"mtp must be 'keep' or 'drop', not {mtp!r}")
            config = assets.read_config(folder)
            folder = assets.with_copied(folder, hf_model, copied_prefixes(config))
            copied = copied_tensors(folder, copied_prefixes(config))
            files = of_folder(folder)
            config = without_mtp(config) if mtp == "drop" else config
            report(contradictions(model, settings_of(config), unscaled_rope_settings(config)))
            shards = shards_of(model)
            if mtp == "drop":
                shards = {name: shard for name, shard in shards.items() if not is_mtp(name, config)}
        finish_gathering(model)
        asked = settled(here, model, config, asked)
        held = gather.locate(here, shards)
        shards = adapted(here, model, shards, merge_lora)
        with together(here, "plan the export"):
            plan = make_plan(
                config,
                held,
                format=asked.format,
                options=asked.options,
                kv_cache=asked.kv_cache,
                exclude=asked.exclude,
                quantize_mla=asked.quantize_mla,
                max_shard_bytes=parse_size(max_shard_size),
                copied=copied,
                smoothed=asked.smoothed,
            )
            check_calibration(plan, asked.calibration)
            if here.first:
                check_target(export_dir, plan, overwrite=overwrite, resume=resume)
                check_apart(export_dir, folder)
        statistics = asked.calibration or {}
        amaxes, digest = survey(here, plan, shards, statistics)
        identity = {
            "version": version("megatron_export"),
            "settings": of_settings([dataclasses.asdict(asked.options), _said(plan)]),
            "model": digest,
            "statistics": of_statistics(statistics),
        }
        place = _Place(export_dir, overwrite, resume, folder, files, identity, provenance or {})
        kept = _write(here, _Work(plan, shards, amaxes, statistics), place, progress)
        peak_host, peak_gpu = zip(*gather.everyone(here, _peaks(here)), strict=True)
    return Report(export_dir, plan, time.monotonic() - started, peak_host, peak_gpu, kept)


def _write(here: Topology, work: "_Work", place: "_Place", progress: Progress) -> int:
    """Encode, gather and write one bucket after the other; memory is bounded by a bucket, whatever the model.

    Returns how many files an interrupted export had completed.
    """
    plan = work.plan
    with ExitStack() as stack:
        writer, done = None, False
        with together(here, "start writing"):
            done = here.first and place.resume and manifest.identity_of(place.folder) == place.identity
            if here.first and not done:
                check_empty(place.folder, overwrite=place.overwrite)
                which = place.identity | {"source of model or calibration data": of_settings(place.provenance)}
                staging = Staging(place.folder, which, overwrite=place.overwrite, resume=place.resume)
                writer = CheckpointWriter(plan, stack.enter_context(staging))
                stack.enter_context(writer)
                staging.keep(work.calibration)
        done, complete = gather.from_first(here, (done, frozenset(staging.finished if writer else ())))
        if done:
            return len(plan.files)
        for bucket in progress("export", _left(plan, complete)):
            here.pulse.at("export", bucket[0].source.canonical)
            numbers, parts = _parts(here, bucket, work)
            with together(here, "quantize"):
                encoded = {
                    name: item.encode(parts[name], item.ranks.index(here.rank), work.amaxes.get(name), numbers[name])
                    for item in bucket
                    if (name := item.source.canonical) in parts
                }
                parcel = gather.parcel_to_writer(here, bucket, encoded)
            gather.deliver(here, parcel)
            with together(here, "write"):
                if writer:
                    writer.write(gather.open_at_writer(bucket, parcel))
        with together(here, "copy what stays as it is"):
            if writer and plan.copied:
                with SourceWeights(place.source, only=copied_prefixes(plan.config)) as weights:
                    writer.write((o, weights.whole(o.name)) for o in plan.copied if writer.wants(o))
        with together(here, "verify and publish", heeding=False):
            if writer:
                _publish(plan, writer, staging, place, here.sizes, progress)
    return len(complete)


def _left(plan: Plan, complete: frozenset[str]) -> list[tuple[Item, ...]]:
    """The buckets without what an interrupted run has completed."""
    done = {output.name for file in complete for output in plan.files[file]}
    buckets = (tuple(i for i in bucket if not done.issuperset(o.name for o in i.outputs)) for bucket in plan.buckets)
    return [bucket for bucket in buckets if bucket]


def _publish(
    plan: Plan, writer: CheckpointWriter, staging: Staging, place: "_Place", sizes: dict[str, int], progress: Progress
) -> None:
    """Add the other files, read everything back, and give the folder its name."""
    quant = hf_quant_config(plan)
    jsons = {"config.json": config_json(plan)} | ({"hf_quant_config.json": quant} if quant else {})
    check_unchanged(place.source, place.source_files)
    writer.complete(jsons, assets.files_to_copy(place.source))
    heed()
    found = verify(staging.folder, plan, staging.finished, progress)
    heed()
    write_json(
        staging.folder / MANIFEST,
        manifest.manifest(plan, found, place.identity, {"topology": sizes, **place.provenance}),
    )
    staging.publish()


def _parts(
    here: Topology, bucket: tuple[Item, ...], work: "_Work"
) -> tuple[dict[str, Measured], dict[str, dict[str, Piece]]]:
    """What this rank is to encode, smoothed and in bfloat16, by canonical name, and the numbers that belong to it: its
    shards, or whole what is gathered first.
    """
    first = [item for item in bucket if item.gather_first]
    mine = {item.source.canonical: item for item in bucket if here.rank in item.ranks}
    with together(here, "split its shards"):
        numbers = {name: measured(item, work.calibration, here.device) for name, item in mine.items()}
        parts = {
            name: item.split(work.shards[name], item.ranks.index(here.rank), numbers[name])
            for name, item in mine.items()
        }
        parcels = {name: gather.parcel_to_first(here, i, parts[name]) for name, i in mine.items() if i.gather_first}
    for parcel in parcels.values():
        gather.deliver(here, parcel)
    if first:
        with together(here, "join shards"):
            whole = {name: gather.open_first(here, mine[name], parcel) for name, parcel in parcels.items()}
            parts = {name: found for name, found in (parts | whole).items() if found is not None}
    return numbers, parts


def _said(plan: Plan) -> dict:
    """What a plan decides of the bytes."""
    files = {file: [(o.name, str(o.dtype), o.shape) for o in outputs] for file, outputs in plan.files.items()}
    return {"config": plan.config, "form": plan.form.name, "files": files, "quantized": plan.quantized}


def _peaks(here: Topology) -> tuple[int, int]:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return host, torch.cuda.max_memory_allocated(here.device) if here.device.type == "cuda" else 0
