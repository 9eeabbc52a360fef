"""The maps of a report, layers downwards: how near every module is to its original, what each format costs where, AWQ's alphas,
tokens of experts.
"""

import math
import re
from dataclasses import dataclass

from ...models import is_linear_weight
from ...models.statistic_names import alpha_of, module_of
from ..snr import Likeness
from .facts import Account

SPAN = 6.0  # dB that the colours of a map stand for at least
_LAYER = re.compile(r".*?layers\.(\d+)\.(.+)")
_LABELS = {
    "linear_qkv": "qkv",
    "linear_q_proj": "q",
    "linear_kv_down_proj": "q_a, kv_a",
    "linear_q_down_proj": "q_a",
    "linear_q_up_proj": "q_b",
    "linear_kv_up_proj": "kv_b",
    "linear_proj": "o",
    "linear_fc1": "gate, up",
    "linear_fc2": "down",
}


@dataclass(frozen=True)
class Cell:
    """strength: of the colour from 0 to 1, NaN for grey; text: what is written in it; title: what it says when pointed at."""

    strength: float
    text: str
    title: str

    @property
    def share(self) -> int | None:
        """Of the strong colour in percent, None for grey."""
        return None if math.isnan(self.strength) else round(100 * min(max(self.strength, 0.0), 1.0))


@dataclass(frozen=True)
class Map:
    """Cells by layer and column; `calm`, `strong`: what the ends of the colours mean; `several`: a cell is of the worst of some."""

    cells: dict[tuple[str, str], Cell]
    calm: str
    strong: str
    several: bool = False

    @property
    def layers(self) -> list[str]:
        return sorted({layer for layer, _ in self.cells}, key=int)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column in self.cells))

    @property
    def greys(self) -> int:
        return sum(cell.share is None for cell in self.cells.values())


def errors(run: Account) -> Map | None:
    """The map of layers and modules in dB; of a layer's experts, the worst."""
    weights: dict[tuple[str, str], list[Likeness]] = {}
    linears = {
        name for i in run.plan.items if is_linear_weight(i.source.canonical) for name in i.source.names().values()
    }
    for one in run.found.judged.weights:
        if (found := _LAYER.fullmatch(one.name)) and one.name in linears:
            weights.setdefault((found[1], _label(found[2])), []).append(one)
    worst = {place: min(found, key=lambda one: one.snr) for place, found in weights.items() if found[0].quantized}
    values = {place: one.snr for place, one in worst.items() if one.snr < math.inf}
    if not values:
        return None
    high = max(values.values())
    low = min(max(0.0, min(values.values())), high - SPAN)
    cells = {}
    for (layer, label), found in weights.items():
        value = values.get((layer, label))
        what = f"layer {layer}, {label}" + (f", the worst of {len(found)} experts" if len(found) > 1 else "")
        cells[layer, label] = (
            Cell(math.nan, "bf16", f"{what}: left in bfloat16")
            if value is None
            else Cell((high - value) / (high - low), f"{value:.1f}", f"{what}: {value:.2f} dB")
        )
    return Map(cells, f"{high:.0f} dB", f"{low:.0f} dB", several=any(len(found) > 1 for found in weights.values()))


def _label(local: str) -> str:
    """A module's name without what all have, and without the number of an expert."""
    parts = local.removesuffix(".weight").split(".")
    name = parts[-1].removesuffix("_proj")
    if "experts" in parts:
        return f"experts {name}"
    return f"shared {name}" if any("shared" in part for part in parts) else name


def alphas(run: Account) -> Map | None:
    """The map of layers and smoothing vectors."""
    used = {alpha_of(i.smoothed.columns) for i in run.plan.items if i.smoothed.columns}
    alphas = {module_of(name): alpha for name, alpha in run.made.get("alphas", {}).items() if name in used}
    cells = {
        (layer, label): Cell(alpha, f"{alpha:.1f}", f"layer {layer}, {label}: alpha {alpha:.1f}")
        for (layer, label), alpha in _placed(alphas).items()
    }
    return Map(cells, "0", "1") if cells else None


def sensitivities(run: Account) -> dict[str, Map]:
    """Format -> the map of layers and linears: what it costs there, nats per token; colours are logarithmic, the same for all."""
    by_format: dict[str, dict[str, float]] = {}
    for name, cost in run.made.get("sensitivities", {}).items():
        module, found, format = name.rpartition(".sensitivity.")
        if found and 0 < cost < math.inf:
            by_format.setdefault(format, {})[module] = cost
    placed = {format: costs for format, found in sorted(by_format.items()) if (costs := _placed(found))}
    sizes = [math.log10(cost) for costs in placed.values() for cost in costs.values()]
    low, high = min(sizes, default=0.0), max(sizes, default=0.0)
    maps = {}
    for format, costs in placed.items():
        cells = {}
        for (layer, label), cost in costs.items():
            title = f"layer {layer}, {label} in {format}: {cost:.3g} nats per token"
            cells[layer, label] = Cell((math.log10(cost) - low) / ((high - low) or 1), f"{cost:.0e}", title)
        maps[format] = Map(cells, f"{10**low:.0e}", f"{10**high:.0e} nats per token")
    return maps


def _placed(values: dict[str, float]) -> dict[tuple[str, str], float]:
    """Numbers of canonical linears by layer and label, in the order of a layer."""
    order, placed = list(_LABELS), {}
    known = [module for module in values if module.rpartition(".")[2] in _LABELS]
    for module in sorted(known, key=lambda one: (order.index(one.rpartition(".")[2]), ".experts." in one)):
        if found := _LAYER.fullmatch(module):
            label = "experts " * (".experts." in module) + _LABELS[module.rpartition(".")[2]]
            placed[found[1], label] = values[module]
    return placed


def tokens(run: Account) -> Map | None:
    """The map of layers and experts, a cell the stronger the more tokens calibration gave the expert, grey for none."""
    tokens: dict[str, list[int]] = run.made.get("tokens", {})
    layers = {found[1]: counts for name, counts in tokens.items() if (found := _LAYER.fullmatch(name))}
    if not layers:
        return None
    most = max(max(counts) for counts in layers.values()) or 1
    cells = {
        (layer, str(n)): Cell(
            math.sqrt(count / most) if count else math.nan, f"{count:,}", f"layer {layer}, expert {n}: {count:,} tokens"
        )
        for layer, counts in layers.items()
        for n, count in enumerate(counts)
    }
    return Map(cells, "few", f"{most:,}")
