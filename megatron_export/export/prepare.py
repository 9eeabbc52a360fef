"""What every export begins with: the opening, where all that can be refused is refused, and the numbers that it encodes with."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from .. import __version__
from ..calibration.lookup import check_calibration
from ..checkpoint.hf_folder import of_folder
from ..checkpoint.original import Original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..common.errors import ExportError, report
from ..distributed import collectives
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..planning.budget import budgeted, recipe_text
from ..planning.engine_check import refusals
from ..planning.plan import Held, Plan, make_plan
from ..planning.request import Request
from ..writing.fingerprint import of_settings, of_statistics
from ..writing.manifest import accelerators, names_in
from ..writing.publish import Destination
from ..writing.target import check_apart, check_target, trial, try_in_trial
from .encode_stream import Work
from .heads import with_heads
from .origins import Model, Origin, Statistics, Tokenizer, live, origin_of, original_of
from .weight_amax import survey

Check = Callable[[Plan, Original], Any]


@dataclass(frozen=True)
class Opening:
    """An export that nothing speaks against.

    held        where the parameters live, by canonical name
    given       what the user asked for
    request     the same, settled: with what ModelOpt's quantizers say, or the defaults
    statistics  what the user gave, or ModelOpt's quantizers hold; None: none so far
    """

    plan: Plan
    held: dict[str, Held]
    origin: Origin
    original: Original
    given: Request
    request: Request
    statistics: Statistics | None


def open_model(
    here: Topology,
    model: Model | MegatronCheckpoint,
    hf_model: str | Path | None,
    request: Request,
    statistics: Statistics | None,
    export_dir: Path | None = None,
    check: Check = lambda plan, original: None,
    tokenizer: Tokenizer | str | Path | None = None,
    beside: str | Path | None = None,
) -> Opening:
    """Open the export of a live model, or of a checkpoint without a model. Collective.

    beside  a folder to put into, on ranks that write files, what a transformers model says of itself
    """
    with together(here, "read the model's shapes"):
        if request.mtp not in ("keep", "drop"):
            raise ExportError(f"mtp must be 'keep' or 'drop', not {request.mtp!r}")
        if request.effective_bits is not None and not statistics:
            raise ExportError("effective_bits needs calibration: pass what calibrate(..., sensitivities=...) returned")
        into = Path(beside) if beside and (here.first or request.writers != "rank0") else None
        original = original_of(model, hf_model, tokenizer, request.mtp, into)
    if export_dir and not isinstance(model, MegatronCheckpoint):
        original = _with_copied(here, model, original, into)
    return open_export(here, origin_of(model), original, request, statistics, export_dir, check=check)


def _with_copied(here: Topology, model: Model, original: Original, into: Path | None) -> Original:
    """The original with the tensors that a live model has of it, put into the folder `into`, if there is one. Collective."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in live(model).copied(original.config) if into}
    with together(here, "keep what is copied"):
        if not (whole and into):
            return original
        save_file(whole, into / "model.safetensors")
        return replace(original, files=of_folder(into))


def open_export(
    here: Topology,
    origin: Origin,
    original: Original,
    request: Request,
    statistics: Statistics | None,
    export_dir: Path | None,
    apart: Iterable[Path] = (),
    check: Check = lambda plan, original: None,
) -> Opening:
    """Plan an export. Collective. `ExportError` for what can be refused before any work.

    statistics  what the formats are chosen by, if a budget chooses them; without them it is planned as small as it can be
    export_dir  where it will be written, if it will: free, on a disk with room, and neither in the original nor in one of `apart`
    check       may refuse the plan on rank 0
    """
    origin, original = with_heads(here, origin, original, request)
    with together(here, "read the model's shapes"):
        origin.check(here, original.config, request)
    settled, statistics = origin.inherit(here, original.config, request, statistics)
    held = origin.held(here, original.config, request)
    nodes = collectives.nodes(here)
    with together(here, "check the settings"):
        if settled.effective_bits is not None:
            settled = budgeted(original.config, settled, statistics)
        plan = make_plan(
            original.config,
            held,
            settled,
            copied=original.copied,
            powers=original.powers,
            wide=original.wide,
            nodes=nodes,
        )
        plan = replace(plan, remarks=(*original.remarks, *plan.remarks))
        if here.first:
            if request.effective_bits is None or statistics:
                report(refusals(plan, request.target))
            if export_dir:
                check_target(export_dir.resolve(), plan, overwrite=request.overwrite, resume=request.resume)
                check_apart(export_dir, original.folder, *original.inputs, *apart)
            check(plan, original)
    if export_dir and set(plan.writers.values()) != {0}:
        _try_writers(here, plan, export_dir.resolve())
    return Opening(plan, held, origin, original, request, settled, statistics)


def _try_writers(here: Topology, plan: Plan, target: Path) -> None:
    """Let every rank that is to write files do so where they will be. Collective. `ExportError` where one cannot."""
    with ExitStack() as stack:
        with together(here, "try to write"):
            place = stack.enter_context(trial(target)) if here.first else ""
        place = collectives.from_first(here, place)
        with together(here, "try to write"):
            if here.rank in plan.writers.values():
                try_in_trial(target, place, here.rank)


def renewed(here: Topology, opening: Opening, model: Model, statistics: Statistics | None) -> Opening:
    """The same plan for the weights that a model has now. Collective. `ExportError` if it has other shapes than the opened one."""
    origin, config = live(model), opening.original.config
    with together(here, "read the model's shapes"):
        shapes = origin.shapes(here, config, opening.given)
        planned = {name: one.shape for name, one in opening.held.items() if name in shapes or here.rank in one.ranks}
        if shapes != planned:
            raise ExportError("the model has other parameters than that of the plan. Make a plan for this one")
    settled, statistics = origin.inherit(here, config, opening.given, statistics)
    return replace(opening, origin=origin, request=settled, statistics=statistics)


def built(here: Topology, opening: Opening, model: Model) -> Opening:
    """The opening of a model that was not built yet, now that it is. Collective."""
    origin, config = live(model), opening.original.config
    with together(here, "read the model's shapes"):
        origin.check(here, config, opening.given)
    held = origin.held(here, config, opening.given)
    with together(here, "read the model's shapes"):
        assert held == opening.held, "the model was built otherwise than it was planned"
    return replace(opening, origin=origin)


def destination_of(
    opening: Opening, target: Path, identity: dict[str, str], provenance: dict | None, notes: dict | None = None
) -> Destination:
    """Where an opened export goes, and what its manifest says of it."""
    given = opening.request
    return Destination(
        target,
        given.overwrite,
        given.resume,
        given.sync,
        given.sha256,
        opening.original,
        identity,
        provenance or {},
        {"settings": names_in(given.said()), "versions": accelerators(), **(notes or {})},
        recipe_text(given),
    )


def surveyed(here: Topology, opening: Opening) -> tuple[Work, dict[str, str]]:
    """What is to be encoded, with the maxima that all ranks agreed on; and the identity of the manifest. Collective.

    `ExportError` for statistics that are missing or odd, and for NaN and Inf in weights.
    """
    plan, statistics = opening.plan, opening.statistics or {}
    shards = opening.origin.shards(here, plan.config, opening.request)
    with together(here, "check the calibration"):
        check_calibration(plan, opening.statistics)
    amaxes, digest = survey(here, plan, shards, statistics)
    files = {file: [(o.name, str(o.torch_dtype), o.shape) for o in outputs] for file, outputs in plan.files.items()}
    layers = {module: form.name for module, form in plan.layers.items()}
    planned = {"config": plan.config, "files": files, "layers": layers}
    if cast := [item.source.canonical for item in plan.items if item.cast]:
        planned["cast"] = cast
    identity = {
        "version": __version__,
        "settings": of_settings([opening.request.digested(), planned]),
        "model": digest,
        "statistics": of_statistics(statistics),
    }
    return Work(plan, shards, amaxes, statistics), identity
