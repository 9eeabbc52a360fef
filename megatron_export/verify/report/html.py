"""The numbers of report.html; what is said of them stands in templates/report.html."""

from ..snr import BINS
from ..thresholds import HEADS
from . import heatmaps
from .facts import Account
from .render import rendered


def page(run: Account) -> str:
    """The whole file."""
    ends = {"input scales": "input_scale", "KV cache scales": ("k_scale", "v_scale")}
    scalars = {
        what: [value for name, value in run.found.judged.scalars.items() if name.endswith(end)]
        for what, end in ends.items()
    }
    return rendered(
        "report.html",
        run=run,
        heads=HEADS,
        errors=heatmaps.errors(run),
        sensitivities=heatmaps.sensitivities(run),
        alphas=heatmaps.alphas(run),
        tokens=heatmaps.tokens(run),
        scales=_scales(run),
        ranges={what: values for what, values in scalars.items() if values},
    )


def _scales(run: Account) -> dict[int, int]:
    """A power of two -> how many weight scales lie in it; from one below the least to one above the largest."""
    counts = [sum(found) for found in zip(*(one.scales for one in run.quantized), strict=True)]
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return {}
    return {BINS[n]: counts[n] for n in range(max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts)))}
