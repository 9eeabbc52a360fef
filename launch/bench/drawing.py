"""Plots as SVG, by hand: seconds and memory of exports against the size of the model; KL against bits."""

import math
from collections.abc import Callable, Iterable
from html import escape
from statistics import median

from .measuring import Row

WIDTH, HEIGHT, MARGIN = 360, 260, 52  # of a panel; its axes are MARGIN from its edges
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#c77d0a", "#555555")
GB = 1e9

Line = list[tuple[float, float]]


def drawn(rows: Iterable[Row]) -> str:
    """Two panels: seconds, those of `save_file` beside them; GPU memory above the model, or host memory where there is no GPU."""
    rows = list(rows)
    on_gpu = all(row.device != "cpu" for row in rows)
    memory = ("GB of GPU above the model", lambda row: row.gpu / GB)
    runs: dict[str, list[Row]] = {}
    for row in rows:
        tool = "" if row.tool == "megatron_export" else f"{row.tool}: "
        label = f"{tool}{row.model}, {row.format}, ranks {row.ranks}, {'fsync' if row.fsync else 'no fsync'}"
        runs.setdefault(label, []).append(row)
    seconds = {label: _line(some, lambda row: row.seconds) for label, some in runs.items()}
    seconds |= {
        f"save_file: {label}": _line(some, _saved) for label, some in runs.items() if all(row.saved for row in some)
    }
    title, value = memory if on_gpu else ("GB of host", lambda row: row.host / GB)
    panels = {"seconds": seconds, title: {label: _line(some, value) for label, some in runs.items()}}
    height = HEIGHT + 16 * len(seconds) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{2 * WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, (title, lines) in enumerate(panels.items()):
        parts += _panel(number * WIDTH, title, lines)
    for number, label in enumerate(seconds):
        y = HEIGHT + 16 * number
        parts.append(f'<rect x="{MARGIN}" y="{y}" width="10" height="10" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{MARGIN + 16}" y="{y + 9}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _line(rows: Iterable[Row], value: Callable[[Row], float]) -> Line:
    return sorted((row.model_bytes / GB, value(row)) for row in rows)


def _saved(row: Row) -> float:
    return median(row.saved)


def _panel(left: int, title: str, lines: dict[str, Line]) -> list[str]:
    """Both axes begin at 0, so that what grows in proportion is straight, and what does not grow is level."""
    right = max(x for line in lines.values() for x, _ in line)
    top = max(y for line in lines.values() for _, y in line) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (WIDTH - 1.5 * MARGIN) * x / right, (HEIGHT - 2 * MARGIN) * y / top
        return round(left + MARGIN + across, 1), round(HEIGHT - MARGIN - up, 1)

    (x0, y0), (x1, y1) = place(0, 0), place(right, top)
    parts = [
        f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#999"/>',
        f'<text x="{x0}" y="{y1 - 14}" font-weight="bold">{escape(title)}</text>',
        f'<text x="{x1}" y="{y0 + 32}" text-anchor="end">GB of the model in bfloat16</text>',
    ]
    for part in (0, 0.5, 1):
        (x, _), (_, y) = place(right * part, 0), place(0, top * part)
        parts.append(f'<text x="{x}" y="{y0 + 16}" text-anchor="middle">{right * part:.3g}</text>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{top * part:.3g}</text>')
    for number, line in enumerate(lines.values()):
        colour = COLOURS[number % len(COLOURS)]
        points = [place(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def frontier(points: dict[str, tuple[float, float]]) -> str:
    """KL on a logarithmic axis against bits per weight, a point for each label; a line joins those that none beats in both."""
    width, height, right = 2 * WIDTH, 2 * HEIGHT, 190
    inside = {label: (bits, kl) for label, (bits, kl) in points.items() if kl > 0} or {"nothing": (0.0, 1.0)}
    least, most = (pick(math.log10(kl) for _, kl in inside.values()) for pick in (min, max))
    few, many = (pick(bits for bits, _ in inside.values()) for pick in (min, max))

    def place(bits: float, kl: float) -> tuple[float, float]:
        across = (width - MARGIN - right) * (bits - few) / ((many - few) or 1)
        down = (height - 2 * MARGIN) * (most - math.log10(kl)) / ((most - least) or 1)
        return round(MARGIN + across, 1), round(MARGIN + down, 1)

    best: list[tuple[float, float]] = []
    for bits, kl in sorted(inside.values()):
        if not best or kl < best[-1][1]:
            best.append((bits, kl))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-weight="bold">mean KL from bf16 (logarithmic)</text>',
        f'<text x="{width - right}" y="{height - 8}" text-anchor="end">bits per weight of all linears</text>',
    ]
    for number in range(5):
        bits, kl = few + (many - few) * number / 4, 10 ** (least + (most - least) * number / 4)
        (x, _), (_, y) = place(bits, 10**least), place(few, kl)
        parts.append(f'<text x="{x}" y="{height - 26}" text-anchor="middle">{bits:.3g}</text>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4}" text-anchor="end">{kl:.2g}</text>')
    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in best))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="1.5"/>')
    for label, point in inside.items():
        x, y = place(*point)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{COLOURS[0 if point in best else 5]}"/>')
        parts.append(f'<text x="{x + 6}" y="{y + 4}" font-size="9">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])
