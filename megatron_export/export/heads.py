"""Medusa's heads that are written into their base's folder: more parameters of the base, for the plan and all that follows it."""

from dataclasses import replace

from ..checkpoint.original import Original
from ..common.errors import ExportError
from ..common.safe_files import shown
from ..distributed.collectives import together
from ..distributed.topology import Topology
from ..models import HEADS, config_with_heads, shape_of
from ..planning.request import LAYOUTS, Request
from .origins import Origin, Stored

COMBINED = "combined"


def with_heads(here: Topology, origin: Origin, original: Original, request: Request) -> tuple[Origin, Original]:
    """The model with Medusa's heads among its parameters, if --medusa-layout asks for that; else as it is. Collective.

    `ExportError` for a layout of heads that are not there, and for a base that no engine reads with its heads.
    """
    layout = request.medusa_layout
    if layout is None or shape_of(original.config).medusa:
        return origin, original
    found = origin.draft_beside(here, original.config)
    with together(here, "check the settings"):
        if layout not in LAYOUTS:
            raise ExportError(f"--medusa-layout must be {' or '.join(LAYOUTS)}, not {shown(layout)}")
        if found is None or found.child != HEADS:
            raise ExportError(
                "--medusa-layout has no effect: the model has no heads of Medusa beside itself. Leave it out"
            )
        given = [flag for flag, value in (("output", request.draft_output), ("format", request.draft_format)) if value]
        if given and layout == COMBINED:
            raise ExportError(
                f"--draft-{given[0]} has no effect with --medusa-layout {COMBINED}: the heads are in the model's folder, in its "
                "format. Leave it out"
            )
        if layout != COMBINED:
            return origin, original
        config = config_with_heads(original.config, found.config)
    with together(here, "read the draft"):
        stored = isinstance(origin, Stored)
        return Stored(origin.checkpoint.of(config)) if stored else origin, replace(original, config=config)
