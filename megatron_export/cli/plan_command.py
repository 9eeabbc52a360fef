"""`megatron-export plan`: what an export would write and take, from config.json alone, for any topology, on one process."""

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..calibration.lookup import is_needed
from ..calibration.memory import MicroBatch, calibration_bytes
from ..checkpoint.hf_folder import tokenizer_remarks
from ..checkpoint.hf_weights import copied_tensors
from ..checkpoint.original import Original, config_alone
from ..common.errors import ExportError, report
from ..common.garbage import no_garbage_collection
from ..common.text import readable, some
from ..engines import Verdict
from ..export.memory_forecast import Forecast, forecast
from ..models import check_computed, copied_prefixes, is_linear_weight, makes_keys, shape_of
from ..planning.engine_check import of_plan, refusals, verdicts
from ..planning.exclusions import modules
from ..planning.plan import Held, Plan, assumed, make_plan
from ..planning.rank_placement import Grid, grid_of
from ..planning.tensor_spec import Output
from ..writing.target import SPARE_BYTES
from . import terminal
from .config import ExportConfig, sample_length
from .export_command import EXAMPLE_MODEL
from .flags import Say, add_options, config_of

DESCRIPTION = "What an export would write and take, from config.json alone: on one process, for any topology."
ON_ERROR = 1
GPUS = 8  # of a node, where none is there to ask

_NUMBERED = re.compile(r"\.\d+(?=\.|$)")

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Preview:
    """A plan and what it takes.

    left        why modules stay in bfloat16 -> those modules
    engines     engine -> whether it loads the result
    disk, free  the folder that is written into, and how many bytes are free there
    device      where the model is: "cuda" or "cpu"
    config      config.json, where it was made of the settings of a Megatron checkpoint
    """

    plan: Plan
    grid: Grid
    forecast: Forecast
    left: dict[str, tuple[str, ...]]
    engines: dict[str, Verdict]
    remarks: tuple[str, ...]
    disk: Path
    free: int
    device: str
    config: dict = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """Bytes that must be free on the disk."""
        return sum(self.forecast.files.values()) + SPARE_BYTES


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_options(parser, lambda option: option.planned)
    parser.add_argument("--world", type=int, help="number of ranks (default: the fewest that the other sizes allow)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table, sizes in bytes")


def run(say: Say, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> int:
    """The exit status: 0 done, 1 refused, 2 bad usage."""
    values = vars(flags)
    world, shown_as_json = values.pop("world"), values.pop("json")
    if world is not None and world < 1:
        parser.error(f"--world must be at least 1, not {world}")
    config = config_of(parser, values | {"dry_run": True})
    with no_garbage_collection():
        say(_shown(previewed(config, EXAMPLE_MODEL, world), shown_as_json), flush=True)  # and nothing keeps the plan
    return 0


def _shown(found: Preview, shown_as_json: bool) -> str:
    return json.dumps(as_json(found), indent=2) if shown_as_json else terminal.rows(rows(found), "plan")


def previewed(config: ExportConfig, example_model: Path, world: int | None) -> Preview:
    """What `config` would do on `world` ranks, None for the fewest. Reads config.json, and the headers of files with tensors that
    are copied from the original. `ExportError` where the export would be refused.
    """
    request = config.request.plain()
    original = _original(config, example_model)
    hf_config = original.config
    copied, remarks = _copied(original.folder, copied_prefixes(hf_config))
    remarks += () if original.derived else tokenizer_remarks(original.folder)
    at_hand = config.megatron_checkpoint is None  # or shards are read from disk, whole
    held = assumed(hf_config, config.tp, config.etp, at_hand=at_hand, **_sizes(config, world))
    most = max(max(ranks) for ranks in {one.ranks for one in held.values()})
    nodes = tuple(rank // GPUS for rank in range(most + 1))
    plan = make_plan(hf_config, held, request, copied=copied, powers=original.powers, wide=original.wide, nodes=nodes)
    report(refusals(plan, request.target))
    calibrates = is_needed(plan) and not config.load_calibration
    batch = MicroBatch(config.calib_batch_size, sample_length(config, hf_config)) if calibrates else None
    if batch:
        check_computed(hf_config, batch.length)
    found = preview_of(config, plan, world, config.device or "cuda", batch, original.remarks + remarks, held)
    return replace(found, config=hf_config if original.derived else {})


def _original(config: ExportConfig, example_model: Path) -> Original:
    """The model that is planned for; a Megatron checkpoint that is given must be one of it."""
    mtp = config.request.plain().mtp
    if config.megatron_checkpoint is None:
        return config_alone(config.hf_model or example_model, mtp, own=True)
    from .inputs import derived_of, open_checkpoint  # which imports what calibration needs

    original = config_alone(config.hf_model, mtp, own=False) if config.hf_model else derived_of(config)
    open_checkpoint(config, original.config)
    return original


def preview_of(
    config: ExportConfig,
    plan: Plan,
    world: int | None,
    device: str,
    batch: MicroBatch | None,
    remarks: tuple[str, ...] = (),
    held: dict[str, Held] | None = None,
) -> Preview:
    """What a plan that was made for `config` takes on `world` ranks, on which calibration data is run in such batches or not.
    `held`: what `assumed` said, where it was asked already.
    """
    sizes = _sizes(config, world)
    held = held or assumed(plan.config, config.tp, config.etp, **sizes)
    grid = grid_of(plan.config, config.tp, config.etp, **sizes)
    output = (config.output or Path.cwd()).resolve()
    disk = next(folder for folder in (output, *output.parents) if folder.is_dir())
    calibration = calibration_bytes(plan, grid, batch, device) if batch else 0
    if batch:
        shape = f"{batch.samples} x {batch.length} tokens"
        kept = ", without the activations of all layers that --effective-bits keeps and their logits"
        remarks += (
            f"counted with a calibration run of {shape} at a time: at most {readable(calibration)} beside the weights"
            + kept * (config.request.effective_bits is not None),
        )
    if device == "cpu":
        remarks += (
            "glibc may keep up to 0.6 GB of what is freed, not counted here; with MALLOC_MMAP_THRESHOLD_=1048576 in the "
            "environment it does not, and encoding takes half as long again",
        )
    return Preview(
        plan=plan,
        grid=grid,
        forecast=forecast(plan, held, grid, device, bool(config.megatron_checkpoint) and not batch, calibration),
        left=_left(plan, config.request.exclude),
        engines=verdicts(of_plan(plan)),
        remarks=plan.remarks + remarks,
        disk=disk,
        free=shutil.disk_usage(disk).free,
        device=device,
    )


def plan_rows(plan: Plan) -> Rows:
    """What any export of a plan writes."""
    first = _first(plan)
    return [
        ("format", plan.format + (f", KV cache {plan.kv.name}" if plan.kv else "")),
        ("modules", f"{len(plan.quantized)} quantized, {len(plan.excluded)} left in bfloat16: {some(plan.excluded)}"),
        ("gathered first", f"{len(first)} of {len(plan.items)} parameters" + (f": {some(first)}" if first else "")),
        ("written", f"{plan.nbytes:,} bytes in {len(plan.files)} file{'s' * (len(plan.files) > 1)}"),
        ("compression", f"{plan.source_nbytes / plan.nbytes:.2f} x against bfloat16 ({plan.source_nbytes:,} bytes)"),
    ]


def rows(preview: Preview) -> Rows:
    """The table."""
    plan, grid, found = preview.plan, preview.grid, preview.forecast
    sizes = f"tp {grid.tp} x pp {grid.pp} x dp {grid.world // grid.tp // grid.pp}"
    if grid.shape.experts:
        sizes += f"; experts etp {grid.etp} x ep {grid.ep} x pp {grid.pp} x dp {grid.world // grid.etp // grid.ep // grid.pp}"
    sending = sum(sent > 0 for sent in found.sent)
    writing = sorted(set(plan.writers.values()))
    to = "rank 0" if writing == [0] else f"{len(writing)} ranks that write"
    moved = f"; before that {sum(found.gathered):,} to other ranks" if any(found.gathered) else ""
    lack = preview.needed - preview.free
    free = f"{readable(preview.free)} free at {preview.disk}" + (f": {readable(lack)} too little" if lack > 0 else "")
    return [
        ("plan", "nothing read, nothing written"),
        ("ranks", f"{grid.world} = {sizes}"),
        *plan_rows(plan),
        ("tensors", f"{found.tensors:,}"),
        ("on disk", f"{sum(found.files.values()):,} bytes, headers too; {free}"),
        ("over the wire", f"{sum(found.sent):,} bytes to {to} from {sending} rank{'s' * (sending != 1)}{moved}"),
        ("peak host memory", _most(found.host)),
        ("peak GPU memory", _most(found.gpu) if preview.device == "cuda" else "no GPU"),
        *(("" if n else "quantized", line) for n, line in enumerate(_counted(plan.quantized))),
        *(("left alone", f"{why}: {', '.join(_counted(names))}") for why, names in preview.left.items()),
        *(("note", remark) for remark in preview.remarks),
        *((engine, verdict.text) for engine, verdict in preview.engines.items()),
        *(
            ("" if n else "config.json", f"{key}: {json.dumps(said)}")
            for n, (key, said) in enumerate(preview.config.items())
        ),
    ]


def as_json(preview: Preview) -> dict:
    """The same for machines; sizes in bytes."""
    plan, grid, found = preview.plan, preview.grid, preview.forecast
    sizes = {name: getattr(grid, name) for name in ("world", "tp", "pp", "vpp", "etp", "ep")}
    first = _first(plan)
    return {
        "kind": "megatron_export plan 1",
        "architecture": grid.shape.architecture,
        "topology": sizes | {"stages": list(grid.stages)},
        "format": plan.format,
        "kv_cache": plan.kv.name if plan.kv else "none",
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "bytes_in_bfloat16": plan.source_nbytes,
        "files": found.files,
        "disk": {"needed": preview.needed, "free": preview.free, "at": str(preview.disk)},
        "writers": plan.writers,
        "wire": {"to_writers": list(found.sent), "gathered_first": list(found.gathered)},
        "peak_host_memory": list(found.host),
        "peak_gpu_memory": list(found.gpu) if preview.device == "cuda" else None,
        "quantized": _patterns(plan.quantized),
        "left_alone": [{"why": why, "modules": _patterns(names)} for why, names in preview.left.items()],
        "gathered_first": {"parameters": len(first), "of": len(plan.items), "first": first[:10]},
        "remarks": list(preview.remarks),
        "engines": {engine: {"loads": v.loads, "why": v.why} for engine, v in preview.engines.items()},
        **({"config": preview.config} if preview.config else {}),
    }


def _first(plan: Plan) -> list[str]:
    """The parameters that are gathered before they are quantized."""
    return [item.source.canonical for item in plan.items if item.gather_first]


def _sizes(config: ExportConfig, world: int | None) -> dict:
    names = ("pp", "ep", "vpp", "pp_layout")
    return {name: getattr(config, name) for name in names} | {"world": world}


def _copied(folder: Path, prefixes: tuple[str, ...]) -> tuple[tuple[Output, ...], tuple[str, ...]]:
    """The tensors that are copied, where their files are there; where not, a remark."""
    try:
        return copied_tensors(folder, prefixes), ()
    except ExportError as error:
        names = ", ".join(prefix.rstrip(".") for prefix in prefixes)
        return (), (f"{names}: copied from the original, and not counted here ({error})",)


def _left(plan: Plan, exclude: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Why modules stay in bfloat16 -> those modules."""
    if not plan.forms:
        return {}
    user, modelopt, engines = [], [], []
    latent = bool(shape_of(plan.config).kv_lora)
    blocks = any(form.tile[0] > 1 for form in plan.forms)
    experts_alone = any(form.native and form.native.alone for form in plan.forms)
    alone = [item for item in plan.items if is_linear_weight(item.source.canonical) and item.form is None]
    for item in alone:
        canonical = item.source.canonical
        # Some plans leave these alone.
        mixing = blocks and canonical.endswith(".mixer.in_proj.weight")
        unread = mixing or makes_keys(canonical) or (latent and ".self_attention." in canonical) or experts_alone
        for name in modules(item.source):
            excluded = any(fnmatchcase(name, glob) for glob in exclude)
            (user if excluded else engines if unread else modelopt).append(name)
    known = {*engines, *user, *modelopt} | {name.partition(".experts.")[0] + ".experts" for name in user + modelopt}
    found = {"by --exclude": user, "by the recipe, or by ModelOpt": modelopt, "not loaded by every engine": engines}
    never = tuple(name for name in plan.excluded if name not in known)
    return {why: tuple(names) for why, names in found.items() if names} | {"never quantized": never}


def _patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with * for their numbers, and how many are so called."""
    return dict(Counter(_NUMBERED.sub(".*", name) for name in names))


def _counted(names: Iterable[str]) -> list[str]:
    return [f"{pattern} ({count:,})" if "*" in pattern else pattern for pattern, count in _patterns(names).items()]


def _most(peaks: tuple[int, ...]) -> str:
    most = max(range(len(peaks)), key=lambda rank: peaks[rank])
    writing = f"{readable(peaks[0])} on rank 0, which writes"
    return writing if most == 0 else f"{readable(peaks[most])} on rank {most}, {writing}"
