"""report.html: one file that tells what was exported and how good it is, for a reader who has a minute, then for one who has ten.

It needs nothing but itself. Sections without anything to tell are left out.
"""

from collections.abc import Iterator
from html import escape
from statistics import median

from ... import __version__
from ...common.text import readable, some
from ..snr import BINS, Likeness
from ..thresholds import HEADS, worst
from . import charts, heatmaps
from .facts import Account
from .model_card import commands
from .style import CSS


def page(run: Account) -> str:
    """The whole file."""
    body = "".join([_head(run), *(f"<section>{part}</section>" for part in _sections(run) if part), _foot(run)])
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>{escape(run.name)}</title><style>{CSS}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(run: Account) -> str:
    plan, sound = run.plan, not run.problems
    cache = f" with an {plan.kv.NAME.upper()} KV cache" if plan.kv else ""
    verdict = "nothing wrong was found" if sound else f"{len(run.problems)} problem{'s' * (len(run.problems) > 1)}"
    tiles = "".join(
        f"<div class=tile><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in _tiles(run)
    )
    return (
        f"<p class=eyebrow>Quantized checkpoint, read back and compared with its original</p><h1>{escape(run.name)}</h1>"
        f"<p class=lede><code>{escape(run.origin)}</code> in {escape(plan.form.name)}{escape(cache)}.</p>"
        f"<span class='badge {'ok' if sound else 'no'}'>{verdict}</span><div class=tiles>{tiles}</div>"
    )


def _tiles(run: Account) -> Iterator[tuple[str, str]]:
    yield (
        readable(run.judged.nbytes),
        f"on disk, {run.plan.source_nbytes / run.plan.nbytes:.2f} times smaller than bfloat16",
    )
    yield f"{run.bits:.2f}", "bits per quantized weight, scales included"
    if run.score:
        yield f"×{run.score.ratio:.4f}", f"perplexity: {run.score.perplexity:.3f}, original {run.score.reference:.3f}"
        yield f"{run.score.divergence:.4f}", "nats from the original's next token (KL)"
    if quantized := _quantized(run):
        yield f"{median(one.snr for one in quantized):.1f} dB", "signal to noise of a weight, in the middle"
        yield f"{min(one.snr for one in quantized):.1f} dB", "signal to noise of the worst weight"


def _sections(run: Account) -> Iterator[str]:
    yield _problems(run)
    yield heatmaps.errors(run)
    yield _engines(run)
    yield _score(run)
    yield _worst(run)
    yield _scales(run)
    yield heatmaps.alphas(run)
    yield heatmaps.tokens(run)
    yield _time(run)
    yield _contents(run)


def _problems(run: Account) -> str:
    if not run.problems:
        return ""
    return "<h2 class=no>What is wrong</h2>" + charts.listed(run.problems[:50])


def _quantized(run: Account) -> list[Likeness]:
    return [one for one in run.judged.weights if one.format != "bf16"]


def _score(run: Account) -> str:
    if run.score is None:
        return f"<h2>Perplexity</h2><p>Not measured: {escape(run.unscored)}.</p>" if run.unscored else ""
    found = run.score
    return (
        "<h2>Perplexity</h2><p>Both models on the same text, the quantized arithmetic emulated in plain torch; engines round the "
        "same values and add in another order.</p>"
        + charts.facts(
            [
                ("perplexity", f"{found.perplexity:.4f}; original {found.reference:.4f}; ratio {found.ratio:.4f}"),
                ("change", f"{found.change:+.5f} ± {found.error:.5f} nats per token, paired by window"),
                ("KL from the original", f"{found.divergence:.5f} nats on average, {found.worst:.2f} at most"),
                ("text", f"{found.windows} windows of 512 tokens"),
            ]
        )
    )


def _worst(run: Account) -> str:
    lines = [
        [one.name, f"{one.snr:z.1f} dB", f"{one.cosine:.5f}", f"{one.worst:z.1f} dB at {one.at[0]}, {one.at[1]}"]
        for one in worst(run.judged.weights)
    ]
    if not lines:
        return ""
    return (
        "<h2>The worst weights</h2><p>The worst block is the scale group with the lowest signal to noise, at (row, input).</p>"
        + charts.table(HEADS, lines)
    )


def _scales(run: Account) -> str:
    counts = [sum(found) for found in zip(*(one.scales for one in _quantized(run)), strict=True)]
    filled = [n for n, count in enumerate(counts) if count]
    if not filled:
        return ""
    shown = range(max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts)))
    total = sum(counts)
    inputs = [value for name, value in run.judged.scalars.items() if name.endswith("input_scale")]
    caches = [value for name, value in run.judged.scalars.items() if name.endswith(("k_scale", "v_scale"))]
    ranges = [
        (what, f"{min(found):.3g} to {max(found):.3g}, {median(found):.3g} in the middle, of {len(found):,}")
        for what, found in (("input scales", inputs), ("KV cache scales", caches))
        if found
    ]
    return (
        f"<h2>Scales</h2><p>{total:,} weight scales by size, in powers of two.</p>"
        + charts.bars(
            [counts[n] for n in shown],
            [f"2^{BINS[n]}" for n in shown],
            [f"{counts[n]:,} from 2^{BINS[n]} ({counts[n] / total:.1%})" for n in shown],
        )
        + (charts.facts(ranges) if ranges else "")
    )


def _time(run: Account) -> str:
    seconds = run.manifest.get("run", {}).get("seconds", {})
    if not seconds:
        return ""
    total = sum(seconds.values())
    return f"<h2>Time</h2><p>{total:.0f} seconds before the export itself.</p>" + charts.stack(seconds, "s")


def _engines(run: Account) -> str:
    starting = commands(run)
    code = "".join(f"<pre>{escape(command)}</pre>" for command in starting.values())
    return "<h2>Where it runs</h2>" + charts.facts(run.engines.items()) + (f"<p></p>{code}" if code else "")


def _contents(run: Account) -> str:
    plan, said = run.plan, run.manifest.get("run", {})
    sizes = said.get("topology", {})
    calibration = {key: value for key, value in said.get("calibration", {}).items() if value is not None}
    pairs = [
        ("format", plan.form.name + (f", KV cache {plan.kv.NAME}" if plan.kv else "")),
        ("quantized", f"{len(plan.quantized):,} modules"),
        ("in bfloat16", f"{len(plan.excluded):,}: {some(plan.excluded)}"),
        ("tensors", f"{sum(len(outputs) for outputs in plan.files.values()):,}"),
        ("files", f"{len(run.manifest.get('files', {})) or len(plan.files)}"),
        ("exported on", ", ".join(f"{name} {size}" for name, size in sizes.items())),
        ("calibrated with", ", ".join(f"{name} {value}" for name, value in calibration.items())),
        ("versions", ", ".join(f"{name} {number}" for name, number in said.get("versions", {}).items())),
        *(("note", remark) for remark in plan.remarks),
    ]
    return "<h2>What is in the folder</h2>" + charts.facts((name, value) for name, value in pairs if value)


def _foot(run: Account) -> str:
    digest = (
        f"<p class=soft>sha256 of export_manifest.json, which lists every other file:<br><code>{run.digest}</code></p>"
        if run.digest
        else ""
    )
    return f"{digest}<p class=soft>megatron_export {escape(__version__)}</p>"
