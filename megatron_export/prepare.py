"""What every export begins with: the model's shards, a plan of what they become, and the numbers that they are encoded with."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import assets, gather
from .contradictions import contradictions
from .errors import ExportError, report
from .filing import Writers
from .fingerprint import of_folder, of_settings, of_statistics
from .formats import Options
from .gather import together
from .measured import check_calibration
from .model import finish_gathering, shards_of
from .names import copied_prefixes, is_mtp, settings_of, unscaled_rope_settings, without_mtp
from .plan import Plan, make_plan
from .sizes import parse_size
from .source import copied_tensors
from .stream import Work
from .survey import survey
from .topology import Topology


@dataclass(frozen=True)
class Request:
    """What is asked of an export; `export_hf_checkpoint` says what each field means."""

    hf_model: str | Path
    format: str = "fp8"
    calibration: dict[str, Tensor] | None = None
    kv_cache: str = "none"
    options: Options = Options()
    exclude: Iterable[str] = ()
    mtp: str = "keep"
    quantize_mla: bool = False
    max_shard_size: str | int = "5GB"
    writers: str = "rank0"
    bucket_bytes: int | None = None


@dataclass(frozen=True)
class Original:
    """The model that an export comes from: its folder, the state of its files, its config."""

    folder: Path
    files: dict[str, tuple[int, int]]
    config: dict


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from."""

    plan: Plan
    shards: dict[str, Tensor]
    original: Original
    request: Request


def planned(
    here: Topology,
    model: nn.Module | list[nn.Module],
    request: Request,
    check: Callable[[Plan, Original], Any] = lambda plan, original: None,
) -> Planned:
    """Plan the export of a live model; `check` may refuse it on rank 0. Collective."""
    with together(here, "read the model's shapes"):
        if request.mtp not in ("keep", "drop"):
            raise ExportError(f"mtp must be 'keep' or 'drop', not {request.mtp!r}")
        folder = assets.find_model(request.hf_model, weights=False)
        config = assets.read_config(folder)
        folder = assets.with_copied(folder, request.hf_model, copied_prefixes(config))
        copied = copied_tensors(folder, copied_prefixes(config))
        files = of_folder(folder)
        config = without_mtp(config) if request.mtp == "drop" else config
        report(contradictions(model, settings_of(config), unscaled_rope_settings(config)))
        shards = shards_of(model)
        if request.mtp == "drop":
            shards = {name: shard for name, shard in shards.items() if not is_mtp(name, config)}
    finish_gathering(model)
    held, nodes = gather.locate(here, shards), gather.nodes(here)
    original = Original(folder, files, config)
    with together(here, "plan the export"):
        plan = make_plan(
            config,
            held,
            format=request.format,
            options=request.options,
            kv_cache=request.kv_cache,
            exclude=request.exclude,
            quantize_mla=request.quantize_mla,
            max_shard_bytes=parse_size(request.max_shard_size),
            copied=copied,
            writers=Writers(request.writers, nodes),
            bucket_bytes=request.bucket_bytes,
        )
        if here.first:
            check(plan, original)
    return Planned(plan, shards, original, request)


def surveyed(here: Topology, planned: Planned) -> tuple[Work, dict[str, str]]:
    """What is to be encoded, with the maxima that all ranks agreed on; and what decides the bytes. Collective."""
    plan, statistics = planned.plan, planned.request.calibration or {}
    with together(here, "check the calibration"):
        check_calibration(plan, planned.request.calibration)
    amaxes, digest = survey(here, plan, planned.shards, statistics)
    identity = {
        "version": version("megatron_export"),
        "settings": of_settings([dataclasses.asdict(planned.request.options), _said(plan)]),
        "model": digest,
        "statistics": of_statistics(statistics),
    }
    return Work(plan, planned.shards, amaxes, statistics), identity


def _said(plan: Plan) -> dict:
    """What a plan decides of the bytes."""
    files = {file: [(o.name, str(o.dtype), o.shape) for o in outputs] for file, outputs in plan.files.items()}
    return {"config": plan.config, "form": plan.form.name, "files": files, "quantized": plan.quantized}
