"""Plans of what tests ask for, by keyword."""

from typing import Any

from megatron_export.planning.plan import Held, Plan, assumed, make_plan
from megatron_export.planning.request import Request
from megatron_export.planning.tensor_spec import Output


def plan_for(
    config: dict,
    held: dict[str, Held],
    copied: tuple[Output, ...] = (),
    nodes: tuple[int, ...] = (),
    wide: frozenset[str] = frozenset(),
    **fields: Any,
) -> Plan:
    """The plan of a request with these fields."""
    return make_plan(config, held, Request(**fields).plain(), copied=copied, nodes=nodes, wide=wide)


def plan_of(config: dict, **fields: Any) -> Plan:
    """The same on one rank."""
    return plan_for(config, assumed(config, 1), **fields)
