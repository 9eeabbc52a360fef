"""What quantization costs on a text: losses of a checkpoint and of its original, and how far their predictions are apart.

Both are models of transformers whose quantized arithmetic is emulated (`emulation.py`), side by side on one device.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.hf_folder import lacks_tokenizer
from ..common.errors import ExportError
from ..common.file_names import CONFIG
from ..common.host_memory import available
from ..common.progress import Progress, quiet
from ..common.safe_files import exists, read_text
from ..common.text import readable
from .emulation import load
from .folder import json_of

WINDOW, BATCH = 512, 2
LEAST_WINDOWS = 2
LETTERS = 1 << 16  # of a text, which usually have as many windows
SPARE = 1.25  # of the bytes on disk, what a model takes


@dataclass(frozen=True)
class Score:
    """Of a checkpoint and its reference on a text of `windows` windows, in nats.

    change, error      of the mean negative log-likelihood of a token, paired by window, and its standard error
    divergence, worst  KL of the next token from the reference's: mean and largest
    """

    perplexity: float
    reference: float
    change: float
    error: float
    divergence: float
    worst: float
    windows: int

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return math.exp(self.change)


def check_text(text: Path, checkpoint: Path, flag: str = "--text") -> None:
    """`ExportError` for a text, given with `flag`, that cannot be scored with the tokenizer of `checkpoint`; reads no weights."""
    letters = letters_of(text, flag)
    found = _windows(letters[:LETTERS], checkpoint)
    if len(found) < LEAST_WINDOWS and len(letters) > LETTERS:
        found = _windows(letters, checkpoint)
    if len(found) < LEAST_WINDOWS:
        raise ExportError(f"{text}: {_too_few(found)}. Give {flag} a longer text")


def letters_of(text: Path, flag: str = "--text") -> str:
    """What is in a file that was given with `flag`. `ExportError` if there is none, or it is not UTF-8."""
    if not exists(text) or not text.is_file():
        raise ExportError(f"no text file {text}. Give {flag} one that exists")
    return read_text(text, f"Give {flag} a text in UTF-8")


def windows_of(text: Path, checkpoint: Path) -> Tensor:
    """The text's tokens in rows of `WINDOW`; what does not fill a row is left out."""
    return _windows(letters_of(text), checkpoint)


def _windows(letters: str, checkpoint: Path) -> Tensor:
    from transformers import AutoTokenizer

    if lacking := lacks_tokenizer(checkpoint):
        raise ExportError(f"{lacking}, and a text to score needs one. Add these files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise ExportError(f"{checkpoint}: no tokenizer that loads ({error}). The first checkpoint needs one") from error
    ids = tokenizer(letters, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW], dtype=torch.int64).view(-1, WINDOW)


def _too_few(windows: Tensor) -> str:
    return f"{len(windows)} windows of {WINDOW} tokens; a standard error needs two"


def of_window(logits: Tensor, reference: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean negative log-likelihood of a window's tokens after its first, float64 [], and KL of the predictions of all of
    them from the reference's, float32 [tokens - 1]; on the CPU.
    """
    mine, theirs = (part[:-1].float().log_softmax(dim=-1) for part in (logits, reference))  # [tokens - 1, vocabulary]
    loss = -mine.gather(1, ids[1:, None]).double().mean().cpu()
    return loss, (theirs.exp() * (theirs - mine)).sum(dim=-1).cpu()


@torch.no_grad()
def score(
    folder: Path,
    reference: Path,
    text: Path,
    device: torch.device | str = "cpu",
    windows: int | None = None,
    progress: Progress = quiet,
) -> Score:
    """Score the checkpoint in `folder` on a text. `ExportError` where that cannot be done here."""
    rows = windows_of(text, reference)[:windows]
    if len(rows) < LEAST_WINDOWS:
        said = _too_few(rows)
        raise ExportError(f"{text}: {said}. Give a longer text")
    _check_fits(folder, reference, torch.device(device))
    models = [load(path, device) for path in (reference, folder)]
    losses: list[tuple[Tensor, Tensor]] = []
    divergences: list[Tensor] = []
    for batch in progress("score", rows.to(device).split(BATCH)):
        theirs, mine = (model(batch, use_cache=False).logits for model in models)
        for ours, original, ids in zip(mine, theirs, batch, strict=True):
            loss, divergence = of_window(ours, original, ids)
            losses.append((of_window(original, original, ids)[0], loss))
            divergences.append(divergence)
    first, second = map(torch.stack, zip(*losses, strict=True))
    change, divergence = second - first, torch.cat(divergences)
    return Score(
        perplexity=float(second.mean().exp()),
        reference=float(first.mean().exp()),
        change=float(change.mean()),
        error=float(change.std() / math.sqrt(len(change))),
        divergence=float(divergence.mean()),
        worst=float(divergence.max()),
        windows=len(rows),
    )


def _check_fits(folder: Path, reference: Path, device: torch.device) -> None:
    """Raise where two models and what they compute do not fit into memory."""
    size = sum(path.stat().st_size for one in (folder, reference) for path in one.glob("*.safetensors"))
    config = json_of(reference, CONFIG)
    words = (config.get("text_config") or config).get("vocab_size") or 0
    needed = int(SPARE * size) + 2 * BATCH * WINDOW * words * 2 + 6 * WINDOW * words * 4
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()
    if needed > free:
        raise ExportError(
            f"both models take about {readable(needed)} at once, and {readable(free)} are free on this {device.type}"
        )
