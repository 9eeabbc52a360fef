"""The pictures of a report, as HTML that needs no script: heat maps, bars, tables. All text is escaped here."""

import math
from collections.abc import Iterable, Sequence
from html import escape

Cell = tuple[float, str, str]  # how strong from 0 to 1, what is written in it, what it says when it is pointed at


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first column holds names, the others numbers."""
    top = "".join(f"<th{' class=n' if n else ''}>{escape(head)}</th>" for n, head in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class=n>{escape(c)}</td>" if n else f"<td class=name>{_breakable(c)}</td>" for n, c in enumerate(line)
        )
        + "</tr>"
        for line in lines
    )
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what is to be said of them."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def listed(sentences: Iterable[str]) -> str:
    """Sentences with long names in them."""
    return "<ul>" + "".join(f"<li>{_breakable(sentence)}</li>" for sentence in sentences) + "</ul>"


def heat(
    rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[str, str], Cell], *, strong: str, dense: bool = False
) -> str:
    """A map of rows x columns, a cell the more in the colour `strong` (a variable of the style) the stronger it is.

    `dense`: small cells without text or heads of columns.
    """
    top = (
        "" if dense else "<thead><tr><th></th>" + "".join(f"<th>{_wrapped(c)}</th>" for c in columns) + "</tr></thead>"
    )
    lines = []
    for row in rows:
        found = "".join(_cell(cells.get((row, column)), strong, dense) for column in columns)
        lines.append(f"<tr><th>{escape(row)}</th>{found}</tr>")
    kind = "heat dense" if dense else "heat"
    return f"<div class=wide><table class='{kind}'>{top}<tbody>{''.join(lines)}</tbody></table></div>"


def _cell(cell: Cell | None, strong: str, dense: bool) -> str:
    if cell is None:
        return "<td></td>"
    strength, text, title = cell
    written = "" if dense else escape(text)
    if math.isnan(strength):
        return f'<td class=none title="{escape(title)}">{written}</td>'
    share = round(100 * min(max(strength, 0.0), 1.0))
    colour = f"color-mix(in oklab, var(--{strong}) {share}%, var(--calm))"
    return f'<td style="background:{colour}" title="{escape(title)}">{written}</td>'


def legend(low: str, high: str, strong: str, note: str = "") -> str:
    """What the colours mean, from calm to strong."""
    style = f"--from:var(--calm);--to:var(--{strong})"
    return f'<div class=legend>{escape(low)} <i style="{style}"></i> {escape(high)}<span>{escape(note)}</span></div>'


def bars(heights: Sequence[float], labels: Sequence[str], titles: Sequence[str]) -> str:
    """Upright bars; of labels, so many are shown as have room on a phone."""
    most, step = max(heights, default=0) or 1, -(-len(labels) // 7)
    drawn = "".join(
        f'<i style="height:{100 * height / most:.1f}%" title="{escape(title)}"></i>'
        for height, title in zip(heights, titles, strict=True)
    )
    ticks = "".join(f"<span>{escape(label) if not n % step else ''}</span>" for n, label in enumerate(labels))
    return f"<div class=bars>{drawn}</div><div class=ticks>{ticks}</div>"


def stack(parts: dict[str, float], unit: str) -> str:
    """One bar of several parts, with a key."""
    total = sum(parts.values()) or 1
    drawn = "".join(
        f'<i style="flex:{max(value / total, 0.004):.4f}" title="{escape(name)}"></i>' for name, value in parts.items()
    )
    keys = "".join(f"<span class=key>{escape(name)} {value:.1f} {unit}</span>" for name, value in parts.items())
    return f"<div class=stack>{drawn}</div><div class=keys>{keys}</div>"


def _breakable(text: str) -> str:
    """A name may be broken after its dots."""
    return escape(text).replace(".", ".<wbr>")


def _wrapped(head: str) -> str:
    return escape(head).replace(", ", ",<br>").replace("experts ", "experts<br>").replace("shared ", "shared<br>")
