"""The judgement of a checkpoint with thresholds, for `verify`, for `--verify` and for reports; and its table and JSON."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint import hf_folder
from ..common.errors import ExportError
from ..common.progress import Progress, quiet
from ..common.safe_files import MOST_LETTERS
from ..models import architecture_of
from .judge import Judgement, judge
from .perplexity import Score, check_text, score
from .snr import Likeness, finite

WORST = 10  # weights that are shown


@dataclass(frozen=True)
class Wanted:
    """What is measured, and what is good enough.

    min_snr        least dB of a weight; None: what its format gives at worst
    max_ppl_ratio  largest perplexity over the reference's; None: any
    text, windows  for perplexity: a text, None for none; how many windows of 512 tokens, None for all
    listed         whether files are compared with the sums in the manifest
    flag           that `text` was given with
    """

    min_snr: float | None = None
    max_ppl_ratio: float | None = None
    text: Path | None = None
    windows: int | None = None
    device: str = "cpu"
    listed: bool = True
    flag: str = "--text"


@dataclass
class Inspection:
    """A judgement; the score on a text, or why there is none."""

    judged: Judgement
    score: Score | None
    unscored: str
    problems: list[str]


def inspected(folder: Path, reference: Path, wanted: Wanted, progress: Progress = quiet) -> Inspection:
    """Judge a checkpoint against its original and, on a text, score both. `ExportError` where that cannot begin."""
    if wanted.text and architecture_of(hf_folder.read_config(reference)).draft:
        raise ExportError(f"{reference} is a draft, which writes no text without its base. Leave out {wanted.flag}")
    if wanted.text:
        check_text(wanted.text, reference, wanted.flag)
    how = {"device": wanted.device, "min_snr": wanted.min_snr, "listed": wanted.listed}
    judged = judge(folder, reference, **how, progress=progress)
    problems, scored, unscored = list(judged.problems), None, ""
    if wanted.text and judged.plan and not problems:
        try:
            scored = score(folder, reference, wanted.text, wanted.device, wanted.windows, progress)
        except Exception as error:  # transformers raises its own for models that it does not know in this form
            unscored = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
            unscored = unscored[:MOST_LETTERS]
    elif wanted.text:
        unscored = "it is not sound"
    if wanted.max_ppl_ratio is not None:
        if scored is None:
            problems.append(f"perplexity was not measured ({unscored}), so its ratio is not known")
        elif scored.ratio > wanted.max_ppl_ratio:
            problems.append(f"perplexity is {scored.ratio:.4f} times the reference's, above {wanted.max_ppl_ratio:g}")
    return Inspection(judged, scored, unscored, problems)


def rows(found: Inspection) -> list[tuple[str, str]]:
    """The table."""
    judged = found.judged
    quantized = [one for one in judged.weights if one.quantized]
    exact = sum(one.noise == 0 for one in judged.weights if not one.quantized)
    pairs = [("checkpoint", str(judged.folder)), ("reference", str(judged.reference))]
    if judged.plan:
        cache = f", KV cache {judged.plan.kv.name}" if judged.plan.kv else ""
        pairs.append(("format", judged.plan.format + cache))
    others, kept = len(judged.weights) - len(quantized), sum(one.noise == 0 for one in quantized)
    alike = f" ({kept} equal)" if kept else ""
    pairs.append(("compared", f"{len(quantized)} quantized weights{alike}, {others} others, {exact} equal"))
    if quantized:
        low, middle = min(one.snr for one in quantized), sorted(one.snr for one in quantized)[len(quantized) // 2]
        pairs.append(("signal to noise", f"{low:.1f} dB at least, {middle:.1f} dB in the middle"))
        pairs.append(("cosine", f"{min(one.cosine for one in quantized):.6f} at least"))
    if score := found.score:
        times = f"{score.ratio:.4f} times {score.reference:.4f}"
        change = f"{score.change:+.5f} ± {score.error:.5f} nats per token"
        pairs.append(("perplexity", f"{score.perplexity:.4f}, {times}, in emulated arithmetic"))
        pairs.append(("change", f"{change}, over {score.windows} windows"))
        pairs.append(("KL", f"{score.divergence:.5f} mean, {score.worst:.2f} at most"))
    elif found.unscored:
        pairs.append(("not scored", found.unscored))
    pairs += [("problem", problem) for problem in found.problems]
    return pairs if found.problems else [*pairs, ("sound", "nothing wrong was found")]


def worst_lines(found: Inspection) -> list[list[str]]:
    """Cells of the quantized weights with the lowest signal-to-noise, under `HEADS`."""
    worst = sorted((one for one in found.judged.weights if one.quantized), key=lambda one: one.snr)[:WORST]
    return [
        [one.name, f"{one.snr:z.1f} dB", f"{one.cosine:.5f}", f"{one.worst:z.1f} dB at {one.at[0]}, {one.at[1]}"]
        for one in worst
    ]


HEADS = ("weight", "signal to noise", "cosine", "worst block")


def as_json(found: Inspection) -> dict:
    """The same for machines; infinite decibels are null."""
    judged = found.judged
    return {
        "kind": "megatron_export verify 1",
        "checkpoint": str(judged.folder),
        "reference": str(judged.reference),
        "format": judged.plan.format if judged.plan else None,
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
        "snr_db": finite(one.snr),
        "cosine": one.cosine,
        "worst_block_db": finite(one.worst),
        "worst_block_at": list(one.at),
        "other_codes": one.codes / max(one.count, 1),
        "wrong_blocks": one.wrong,
        "blocks": one.blocks,
    }
