"""The judgement of a checkpoint with thresholds: what `verify` prints, what `--verify` holds an export back for, and what a
report shows.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..common.errors import ExportError
from ..common.progress import Progress, quiet
from ..common.safe_files import MOST_LETTERS
from .judge import Judgement, judge
from .perplexity import Score, score
from .snr import Likeness

WORST = 10  # weights that are shown


@dataclass(frozen=True)
class Wanted:
    """What is measured, and what is good enough. `text` None: no perplexity; `listed`: whether files are compared with
    the sums in the manifest."""

    min_snr: float | None = None
    max_ppl_ratio: float | None = None
    text: Path | None = None
    windows: int | None = None
    device: str = "cpu"
    listed: bool = True


@dataclass
class Inspection:
    """A judgement; the score on a text, or why there is none."""

    judged: Judgement
    score: Score | None
    unscored: str
    problems: list[str]


def inspected(folder: Path, reference: Path, wanted: Wanted, progress: Progress = quiet) -> Inspection:
    """Judge a checkpoint against its original and, on a text, score both."""
    how = {"device": wanted.device, "min_snr": wanted.min_snr, "listed": wanted.listed}
    judged = judge(folder, reference, **how, progress=progress)
    problems, scored, unscored = list(judged.problems), None, ""
    if wanted.text and judged.plan and not problems:
        try:
            scored = score(folder, reference, wanted.text, wanted.device, wanted.windows, progress)
        except Exception as error:  # transformers raises its own for models that it does not know in this form
            unscored = (str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}")[
                :MOST_LETTERS
            ]
    elif wanted.text:
        unscored = "it is not sound"
    if wanted.max_ppl_ratio is not None:
        if scored is None:
            problems.append(f"perplexity was not measured ({unscored}), so its ratio is not known")
        elif scored.ratio > wanted.max_ppl_ratio:
            problems.append(f"perplexity is {scored.ratio:.4f} times the reference's, above {wanted.max_ppl_ratio:g}")
    return Inspection(judged, scored, unscored, problems)


def worst(weights: list[Likeness]) -> list[Likeness]:
    """The quantized weights with the lowest signal-to-noise."""
    return sorted((one for one in weights if one.quantized), key=lambda one: one.snr)[:WORST]


def rows(found: Inspection) -> list[tuple[str, str]]:
    """The table."""
    judged = found.judged
    quantized = [one for one in judged.weights if one.quantized]
    exact = sum(one.noise == 0 for one in judged.weights if not one.quantized)
    pairs = [("checkpoint", str(judged.folder)), ("reference", str(judged.reference))]
    if judged.plan:
        cache = f", KV cache {judged.plan.kv.name}" if judged.plan.kv else ""
        pairs.append(("format", judged.plan.form.name + cache))
    pairs.append(
        (
            "compared",
            f"{len(quantized)} quantized weights, {len(judged.weights) - len(quantized)} others, {exact} equal",
        )
    )
    if quantized:
        low, middle = min(one.snr for one in quantized), sorted(one.snr for one in quantized)[len(quantized) // 2]
        pairs.append(("signal to noise", f"{low:.1f} dB at least, {middle:.1f} dB in the middle"))
        pairs.append(("cosine", f"{min(one.cosine for one in quantized):.6f} at least"))
    if found.score:
        pairs += score_rows(found.score)
    elif found.unscored:
        pairs.append(("not scored", found.unscored))
    pairs += [("problem", problem) for problem in found.problems]
    return pairs if found.problems else [*pairs, ("sound", "nothing wrong was found")]


def score_rows(found: Score) -> list[tuple[str, str]]:
    """What a text shows, in emulated arithmetic."""
    return [
        (
            "perplexity",
            f"{found.perplexity:.4f}, {found.ratio:.4f} times {found.reference:.4f}, in emulated arithmetic",
        ),
        ("change", f"{found.change:+.5f} ± {found.error:.5f} nats per token, over {found.windows} windows"),
        ("KL", f"{found.divergence:.5f} mean, {found.worst:.2f} at most"),
    ]


def worst_lines(found: Inspection) -> list[list[str]]:
    """Cells of the worst weights."""
    return [
        [one.name, f"{one.snr:z.1f} dB", f"{one.cosine:.5f}", f"{one.worst:z.1f} dB at {one.at[0]}, {one.at[1]}"]
        for one in worst(found.judged.weights)
    ]


HEADS = ("weight", "signal to noise", "cosine", "worst block")


def as_json(found: Inspection) -> dict:
    """The same for machines; infinite decibels are null."""
    judged = found.judged
    return {
        "kind": "megatron_export verify 1",
        "checkpoint": str(judged.folder),
        "reference": str(judged.reference),
        "format": judged.plan.form.name if judged.plan else None,
        "kv_cache": judged.plan.kv.name if judged.plan and judged.plan.kv else "none",
        "sound": not found.problems,
        "problems": found.problems,
        "score": (asdict(found.score) | {"ratio": found.score.ratio}) if found.score else None,
        "not_scored": found.unscored or None,
        "weights": {one.name: _of_weight(one) for one in judged.weights},
    }


def _of_weight(one: Likeness) -> dict:
    return {
        "format": one.form.name,
        "snr_db": _finite(one.snr),
        "cosine": one.cosine,
        "worst_block_db": _finite(one.worst),
        "worst_block_at": list(one.at),
        "other_codes": one.codes / max(one.count, 1),
        "wrong_blocks": one.wrong,
        "blocks": one.blocks,
    }


def _finite(decibels: float) -> float | None:
    return round(decibels, 3) if abs(decibels) < 1e9 else None
