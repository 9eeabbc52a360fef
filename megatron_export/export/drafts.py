"""A draft beside its base: an export of its own, by the same pipeline, into a folder beside the base's."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.lookup import Statistics, check_calibration
from ..common.errors import ExportError, report
from ..common.text import some
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..models import architecture_of, is_linear_weight
from ..planning.engine_check import refusals
from ..planning.plan import Plan
from .heads import COMBINED
from .prepare import Opening, open_export

NONE = "none"


@dataclass(frozen=True)
class Draft:
    """A draft that nothing speaks against, and the folder that it goes to, if it is written."""

    folder: Path | None
    opening: Opening


def open_draft(
    here: Topology, base: Opening, export_dir: Path | None, statistics: Statistics | None, apart: Iterable[Path] = ()
) -> Draft | None:
    """Plan the export of the draft beside a model, None where there is no draft, or it is left out. Collective. `ExportError` for
    what can be refused before any work.

    export_dir  where the model will be written, if it will
    statistics  with those of the draft's linears, whose names begin with that of the draft's module, if it has no quantizers
    """
    request = base.given
    if request.draft_output == NONE or request.medusa_layout == COMBINED:
        return None
    found = base.origin.draft_beside(here, base.original.config)
    if found is None:
        with together(here, "check the settings"):
            if request.draft_output or request.draft_format:
                flag = "--draft-output" if request.draft_output else "--draft-format"
                raise ExportError(f"{flag} has no effect: the model has no draft beside itself. Leave it out")
        return None
    folder = Path(request.draft_output or f"{export_dir}-draft").resolve() if export_dir else None
    with together(here, "check the settings"):
        if folder and (folder.is_relative_to(export_dir) or export_dir.is_relative_to(folder)):
            raise ExportError(f"--draft-output {folder}: the base goes to {export_dir}. Give a folder beside it")
        asked = request.of_draft()
        known = architecture_of(found.config).formats
        if request.draft_format not in (None, *known):
            raise ExportError(f"--draft-format {request.draft_format}: {found.child} has only {' and '.join(known)}")
    start = f"{found.child}."
    own = {name.removeprefix(start): one for name, one in (statistics or {}).items() if name.startswith(start)}
    original = replace(
        base.original, config=found.config, copied=(), powers=frozenset(), dropped=(), remarks=found.remarks
    )
    opening = open_export(here, found.origin, original, asked, own or None, folder, apart)
    shards = found.origin.shards(here, found.config, opening.request)
    with together(here, "check the settings"):
        if "d2t" in shards:
            _check_tokens(shards["d2t"], found.config)
        _check_uniform(opening.plan)
        report(refusals(opening.plan, request.target, base.plan))
        check_calibration(opening.plan, opening.statistics)
    return Draft(folder, opening)


def refuse_draft(here: Topology, base: Opening) -> None:
    """`ExportError` for a model with a draft that is not left out, where no draft is written. Collective."""
    apart = base.given.draft_output != NONE and base.given.medusa_layout != COMBINED
    found = apart and base.origin.draft_beside(here, base.original.config)
    with together(here, "check the settings"):
        if found or base.given.draft_output not in ("", NONE):
            raise ExportError(
                "no draft is written in the background. Leave it out with draft_output='none', or use export_hf_checkpoint"
            )


def _check_tokens(d2t: Tensor, config: dict) -> None:
    """`ExportError` where tokens of a draft are mapped to none of its base."""
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    if int(ids.min()) < 0 or int(ids.max()) >= config["vocab_size"]:
        raise ExportError(
            f"the draft's d2t maps its tokens to {int(ids.min())} to {int(ids.max())}, and its base has {config['vocab_size']}: "
            "token i of the draft is token i + d2t[i]"
        )


def _check_uniform(plan: Plan) -> None:
    """`ExportError` where linears have several formats."""
    plain = [i for i in plan.items if is_linear_weight(i.source.canonical) and i.form is None]
    if plan.forms and (plain or len(plan.forms) > 1):
        left = [module for item in plain for module in item.source.names().values()]
        raise ExportError(
            f"the draft's linears have several formats ({some(left) or ' and '.join(form.name for form in plan.forms)}), and "
            "engines know no layers of a draft by name. Quantize all of them alike, or none"
        )
