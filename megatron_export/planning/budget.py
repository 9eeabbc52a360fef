"""Which format each group of fused linears gets if all may take so many bits: the recipe of `--effective-bits`.

A group is what engines join (`fused_with`): q, k, v; gate, up; the experts of a layer. It may have the formats of `--from`, each
with the bytes of its codes and scales (single numbers of a tensor, as `input_scale`, do not count) and its sensitivity, in nats per
token (calibration/sensitivity.py); bfloat16 costs none. Bytes are at most bits / 8 for each element of these linears. The choice
depends on config.json, the request and the statistics alone, so it is the same on every topology and on every rank.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from ..common.errors import ExportError, report
from ..formats import PLAIN, Form
from ..models import Source, is_linear_weight, parameters_of
from ..models.statistic_names import experts_module, sensitivity_key
from .exclusions import fused_with, modules, settle
from .parameter import Item
from .plan import tile_problems
from .recipe import Line, Recipe
from .request import RECIPE_OPTIONS, Request

if TYPE_CHECKING:
    from torch import Tensor

MOST_STATES = 2048  # that the knapsack keeps


@dataclass(frozen=True)
class Group:
    """Linears that engines join.

    linears  canonical modules
    modules  HF modules, one for the experts of a layer
    sizes    format -> bytes of all linears in it, of those that the group may have
    """

    linears: tuple[str, ...]
    modules: tuple[str, ...]
    sizes: dict[str, int]


def budgeted(config: dict, request: Request, statistics: dict[str, Tensor] | None) -> Request:
    """The request with the formats that its budget chooses; without statistics, the smallest that each group may have.

    `ExportError` for formats that the architecture refuses, for a budget that cannot be met or would be left over, and for
    statistics without sensitivities.
    """
    groups, elements = _groups(config, request)
    least, most = (sum(pick(group.sizes.values()) for group in groups) for pick in (min, max))
    if not 8 * least / elements <= request.effective_bits <= 8 * most / elements:
        raise ExportError(
            f"--effective-bits {request.effective_bits:g} cannot be met: with --from {request.candidates} this model takes "
            f"{8 * least / elements:.3f} to {8 * most / elements:.3f} bits per weight. Give a number between, or other formats"
        )
    forms = candidates(request) if statistics else {}
    costs = [_costs(group, forms, statistics) if statistics else {} for group in groups]
    choices = [
        [(size, costs[n].get(format, 0.0)) for format, size in group.sizes.items()] for n, group in enumerate(groups)
    ]
    picked = least_loss(choices, int(request.effective_bits * elements / 8) if statistics else least)
    lines = []
    for group, number in zip(groups, picked, strict=True):
        format = list(group.sizes)[number]
        lines += [Line(module, format, f"{module}: {format}, by --effective-bits") for module in group.modules]
    return request.settled(Recipe(f"{request.effective_bits:g} effective bits", tuple(lines)))


def candidates(request: Request) -> dict[str, Form]:
    """The formats that a budget chooses from, and those of the user's own lines, with their options, by name."""
    lines = tuple(Line("*", name, f"--from {request.candidates}") for name in request.candidates_in())
    return request.settled(Recipe("", lines)).forms()


def recipe_text(request: Request) -> str:
    """The recipe file of what a budget chose; "" for a request without one."""
    if request.effective_bits is None:
        return ""
    given = request.said()
    options = {name: given[name] for name in RECIPE_OPTIONS if name in given and given[name] != "none"}
    said = [f"published: chosen by --effective-bits {request.effective_bits:g} --from {request.candidates}", "formats:"]
    said += [f"  - {json.dumps(line.glob)}: {line.format}" for line in request.recipe_lines]
    said += ["options:", *(f"  {name}: {json.dumps(value)}" for name, value in options.items())] if options else []
    return "\n".join(said) + "\n"


def least_loss(groups: list[list[tuple[int, float]]], budget: int) -> list[int]:
    """Which (bytes, loss) to take of each group, so that the bytes are at most `budget` and the losses the least in all.

    Dynamic programming over the groups: of all choices so far, those stay that no smaller one beats. It is exact until there are
    more than `MOST_STATES` of them; then the best of each of so many equal ranges of bytes stays. Of equal ones the first wins.
    """
    rest = [0]  # bytes that the groups from here on take at least
    for group in reversed(groups):
        rest.append(rest[-1] + min(size for size, _ in group))
    states: list[tuple[int, float, tuple]] = [(0, 0.0, ())]
    for group, needed in zip(groups, reversed(rest[:-1]), strict=True):
        grown = [
            (size + more, loss + worse, (path, number))
            for number, (more, worse) in enumerate(group)
            for size, loss, path in states
            if size + more + needed <= budget
        ]
        states, least = [], inf
        for state in sorted(grown, key=lambda one: one[:2]):
            if state[1] < least:
                states.append(state)
                least = state[1]
        states = _thinned(states)
    path, picked = states[-1][2], []
    while path:
        path, number = path
        picked.append(number)
    return picked[::-1]


def _thinned(states: list[tuple[int, float, tuple]]) -> list[tuple[int, float, tuple]]:
    if len(states) <= MOST_STATES:
        return states
    sizes, low = [size for size, _, _ in states], states[0][0]
    ends = (low + (states[-1][0] - low) * n // MOST_STATES for n in range(MOST_STATES + 1))
    return [states[n] for n in sorted({bisect_right(sizes, end) - 1 for end in ends})]


def _groups(config: dict, request: Request) -> tuple[list[Group], int]:
    """The groups of a model, and the elements of all their linears."""
    sources = parameters_of(config)
    forms, named = candidates(request), []
    for name in request.candidates_in():
        only = Recipe(name, (Line("*", name, f"--from {request.candidates}"),))
        policy = settle(config, sources, request.settled(only), forms, ())
        report(policy.problems)
        named.append(policy.forms)
    members: dict[str, list[Source]] = {}
    for name in sorted(filter(is_linear_weight, policy.forms.keys() | policy.left_alone)):
        members.setdefault(fused_with(name), []).append(sources[name])
    groups = [_group(members[key], named) for key in sorted(members)]
    return groups, sum(source.shape[0] * source.shape[1] for found in members.values() for source in found)


def _group(sources: list[Source], named: list[dict[str, Form]]) -> Group:
    sizes: dict[str, int] = {}
    for forms in named:
        form = forms.get(sources[0].canonical)
        items = [Item(s, (0,), s.shape, forms.get(s.canonical), None, gather_first=False) for s in sources]
        if not any(tile_problems(item) for item in items):
            outputs = [output for item in items for output in item.pieces if output.axes]
            sizes[form.name if form else PLAIN] = sum(output.nbytes for output in outputs)
    names = [name for source in sources for name in modules(source)]
    names = [experts_module(name) if ".experts." in name else name for name in names]
    linears = tuple(source.canonical.removesuffix(".weight") for source in sources)
    return Group(
        linears, tuple(dict.fromkeys(names)), sizes or {PLAIN: sum(2 * s.shape[0] * s.shape[1] for s in sources)}
    )


def _costs(group: Group, forms: dict[str, Form], statistics: dict[str, Tensor]) -> dict[str, float]:
    """What each format of a group costs, nats per token; of experts, of all together."""
    costs = {}
    for format in group.sizes if len(group.sizes) > 1 else ():
        asked = forms[format].measured_as
        keys = dict.fromkeys(sensitivity_key(name, asked) for name in group.linears) if format != PLAIN else {}
        if lacking := [key for key in keys if key not in statistics]:
            prefix = lacking[0].removesuffix(asked)
            known = sorted(key.removeprefix(prefix) for key in statistics if key.startswith(prefix + format))
            others = f" It was measured with other options, as {' and '.join(known)}." if known else ""
            raise ExportError(
                f"the calibration has no {lacking[0]}, which --effective-bits chooses by.{others} Calibrate with --effective-bits, "
                f"{format} in --from and the same options (in the library, calibrate(..., sensitivities=...))"
            )
        costs[format] = sum(float(statistics[key]) for key in keys)
        if not 0 <= costs[format] < inf:
            raise ExportError(f"the calibration's {next(iter(keys))} is no number of at least 0. Calibrate again")
    return costs
