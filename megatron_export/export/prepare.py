"""What every export begins with: the model's shards, a plan of what they become, and the numbers that they are encoded with."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ..calibration.lookup import check_calibration
from ..calibration.modelopt.recipe import check_blocks, settled, told
from ..checkpoint import hf_folder
from ..checkpoint.hf_folder import Original, of_folder
from ..checkpoint.hf_weights import copied_tensors
from ..checkpoint.torch_dist import Checkpoint, CheckpointShards
from ..common.errors import ExportError, report
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..mcore.config_check import contradictions
from ..mcore.lora_merge import adapted
from ..mcore.model import finish_gathering, shards_of
from ..models import copied_prefixes, is_mtp, settings_of, unscaled_rope_settings, without_mtp
from ..planning.plan import Plan
from ..planning.request import Asked, Request
from ..planning.shard_files import Writers
from ..writing.fingerprint import of_settings, of_statistics
from . import transport
from .encode_stream import Work
from .weight_amax import survey


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from: what was asked for, and what that means for a model that ModelOpt quantized."""

    plan: Plan
    shards: Mapping[str, Tensor]
    original: Original
    request: Request
    asked: Asked


def planned(
    here: Topology,
    model: nn.Module | list[nn.Module] | Checkpoint,
    request: Request,
    check: Callable[[Plan, Original], Any] = lambda plan, original: None,
) -> Planned:
    """Plan the export of a live model, or of a checkpoint; `check` may refuse it on rank 0. Collective."""
    with together(here, "read the model's shapes"):
        if request.mtp not in ("keep", "drop"):
            raise ExportError(f"mtp must be 'keep' or 'drop', not {request.mtp!r}")
        folder = hf_folder.find_model(request.hf_model, weights=False)
        config = hf_folder.read_config(folder)
        folder = hf_folder.with_copied(folder, request.hf_model, copied_prefixes(config))
        copied = copied_tensors(folder, copied_prefixes(config))
        files = of_folder(folder)
        config = without_mtp(config) if request.mtp == "drop" else config
        if isinstance(model, Checkpoint):
            if request.merge_lora:
                raise ExportError("merge_lora is a setting of the Checkpoint itself. Give it there, not to the export")
            held = model.held(here.sizes)
            shards: Mapping[str, Tensor] = CheckpointShards(model, held, here.rank, here.device)
        else:
            report(contradictions(model, settings_of(config), unscaled_rope_settings(config)))
            shards = shards_of(model)
            if request.mtp == "drop":
                shards = {name: shard for name, shard in shards.items() if not is_mtp(name, config)}
    asked = _asked(request)
    if isinstance(model, Checkpoint):
        with together(here, "read the checkpoint's quantizers"):
            asked = told(model, config, asked)
            check_blocks(here, model, asked)
    else:
        finish_gathering(model)
        asked = settled(here, model, config, asked)
        held = transport.locate(here, shards)
        shards = adapted(here, model, shards, request.merge_lora)
    nodes = collectives.nodes(here)
    original = Original(folder, files, config)
    with together(here, "plan the export"):
        writers = Writers(request.writers, nodes)
        plan = asked.plan(
            config, held, request.max_shard_size, copied=copied, writers=writers, bucket_bytes=request.bucket_bytes
        )
        if here.first:
            check(plan, original)
    return Planned(plan, shards, original, request, asked)


def renewed(
    here: Topology, model: nn.Module | list[nn.Module], plan: Planned, calibration: dict[str, Tensor] | None
) -> Planned:
    """The same plan for the weights that a model has now. Collective."""
    with together(here, "read the model's shapes"):
        shards = {name: shard for name, shard in shards_of(model).items() if name in plan.shards}
        if [*shards] != [*plan.shards] or any(shards[n].shape != plan.shards[n].shape for n in shards):
            raise ExportError("the model has other parameters than that of the plan. Make a plan for this one")
    finish_gathering(model)
    asked = settled(here, model, plan.plan.config, _asked(replace(plan.request, calibration=calibration)))
    return replace(plan, shards=adapted(here, model, shards, plan.request.merge_lora), asked=asked)


def _asked(request: Request) -> Asked:
    return Asked(
        request.format,
        request.kv_cache,
        request.options,
        request.calibration,
        tuple(request.exclude),
        request.quantize_mla,
    )


def surveyed(here: Topology, planned: Planned) -> tuple[Work, dict[str, str]]:
    """What is to be encoded, with the maxima that all ranks agreed on; and what decides the bytes. Collective."""
    plan, statistics = planned.plan, planned.asked.calibration or {}
    with together(here, "check the calibration"):
        check_calibration(plan, planned.asked.calibration)
    amaxes, digest = survey(here, plan, planned.shards, statistics)
    identity = {
        "version": version("megatron_export"),
        "settings": of_settings([dataclasses.asdict(planned.asked.options), _said(plan)]),
        "model": digest,
        "statistics": of_statistics(statistics),
    }
    return Work(plan, planned.shards, amaxes, statistics), identity


def _said(plan: Plan) -> dict:
    """What a plan decides of the bytes."""
    files = {file: [(o.name, str(o.dtype), o.shape) for o in outputs] for file, outputs in plan.files.items()}
    return {"config": plan.config, "form": plan.form.name, "files": files, "quantized": plan.quantized}
