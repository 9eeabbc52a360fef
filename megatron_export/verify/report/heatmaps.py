"""The maps of a report, layers downwards: how near every module is to its original, AWQ's alphas, tokens of experts."""

import math
import re

from ...models import is_linear_weight
from ...models.statistic_names import alpha_of, module_of
from ..snr import Likeness
from . import charts
from .facts import Account

SPAN = 6.0  # dB that the colours of a map stand for at least
DENSE = 24  # columns from which a map has no text
_LAYER = re.compile(r".*?layers\.(\d+)\.(.+)")
_ALPHAS = {
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


def errors(run: Account) -> str:
    """The map of layers and modules; of a layer's experts, the worst."""
    cells: dict[tuple[str, str], list[Likeness]] = {}
    linears = {
        name for i in run.plan.items if is_linear_weight(i.source.canonical) for name in i.source.names().values()
    }
    for one in run.judged.weights:
        if (found := _LAYER.fullmatch(one.name)) and one.name in linears:
            cells.setdefault((found[1], _label(found[2])), []).append(one)
    worst = {place: min(found, key=lambda one: one.snr) for place, found in cells.items() if found[0].format != "bf16"}
    values = {place: one.snr for place, one in worst.items() if one.snr < math.inf}
    if not values:
        return ""
    high = max(values.values())
    low = min(max(0.0, min(values.values())), high - SPAN)
    made = {}
    for (layer, label), found in cells.items():
        value = values.get((layer, label))
        what = f"layer {layer}, {label}" + (f", the worst of {len(found)} experts" if len(found) > 1 else "")
        if value is None:
            made[layer, label] = (math.nan, "bf16", f"{what}: left in bfloat16")
        else:
            made[layer, label] = ((high - value) / (high - low), f"{value:.1f}", f"{what}: {value:.2f} dB")
    rows = sorted({layer for layer, _ in cells}, key=int)
    columns = list(dict.fromkeys(label for _, label in cells))
    return (
        "<h2>How near every weight is</h2><p>Signal to noise of each module's decoded weights in dB, by layer; more is better, "
        "and 6 dB are one bit. "
        + ("Of a layer's experts, the worst one is shown. " if any(len(found) > 1 for found in cells.values()) else "")
        + (
            "The original was smoothed as the checkpoint is before they were compared. "
            if run.plan.form.smoothing
            else ""
        )
        + "The colour shows where quantization hurts most.</p>"
        + charts.heat(rows, columns, made, strong="bad")
        + charts.legend(f"{high:.0f} dB", f"{low:.0f} dB", "bad", "layers downwards, modules across")
    )


def _label(local: str) -> str:
    """A module's name without what all have, and without the number of an expert."""
    parts = local.removesuffix(".weight").split(".")
    name = parts[-1].removesuffix("_proj")
    if "experts" in parts:
        return f"experts {name}"
    return f"shared {name}" if any("shared" in part for part in parts) else name


def alphas(run: Account) -> str:
    used = {alpha_of(i.smoothed.columns) for i in run.plan.items if i.smoothed.columns}
    alphas = run.manifest.get("run", {}).get("alphas", {})
    alphas = {module_of(name): alpha for name, alpha in alphas.items() if name in used}
    cells = {}
    for module, alpha in sorted(
        alphas.items(), key=lambda one: (list(_ALPHAS).index(_leaf(one[0])), ".experts" in one[0])
    ):
        if found := _LAYER.fullmatch(module):
            label = ("experts " if ".experts" in module else "") + _ALPHAS[_leaf(module)]
            cells[found[1], label] = (alpha, f"{alpha:.1f}", f"layer {found[1]}, {label}: alpha {alpha:.1f}")
    if not cells:
        return ""
    rows = sorted({layer for layer, _ in cells}, key=int)
    return (
        "<h2>AWQ</h2><p>The alpha that the search chose for each smoothing vector: at 0 the weights alone decide it, at 1 the "
        "activations.</p>"
        + charts.heat(rows, list(dict.fromkeys(label for _, label in cells)), cells, strong="much")
        + charts.legend("0", "1", "much")
    )


def _leaf(module: str) -> str:
    """A module's own name, without where it is."""
    return module.rpartition(".")[2]


def tokens(run: Account) -> str:
    tokens: dict[str, list[int]] = run.manifest.get("run", {}).get("tokens", {})
    layers = {found[1]: counts for name, counts in tokens.items() if (found := _LAYER.fullmatch(name))}
    if not layers:
        return ""
    most = max(max(counts) for counts in layers.values()) or 1
    cells = {
        (layer, str(n)): (
            math.sqrt(count / most) if count else math.nan,
            f"{count:,}",
            f"layer {layer}, expert {n}: {count:,} tokens",
        )
        for layer, counts in layers.items()
        for n, count in enumerate(counts)
    }
    never = sum(not count for counts in layers.values() for count in counts)
    columns = [str(n) for n in range(max(len(counts) for counts in layers.values()))]
    said = (
        f"{never:,} were given none and are scaled as the others of their layer."
        if never
        else "Every expert was given some."
    )
    return (
        f"<h2>Tokens per expert</h2><p>How many calibration tokens each expert was given, layers downwards. {said}</p>"
        + charts.heat(sorted(layers, key=int), columns, cells, strong="much", dense=len(columns) > DENSE)
        + charts.legend("few", f"{most:,}", "much", "none: grey")
    )
