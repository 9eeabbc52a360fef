"""`serve`: what a real vLLM or SGLang does with checkpoints, beside what `check` says of them and what their decoded numbers do.

    python launch/benchmark.py serve [--engine ENGINE] [--text FILE] [--jobs N] [--tp N] [--with FILE] [--json FILE] FOLDER ...
    python launch/benchmark.py serve --through decode --text FILE --json FILE FOLDER ...

Each folder is loaded by the engine in a process of its own (vLLM with its check for missing weights on), and gives a few greedy
tokens and, with a text, its perplexity over the windows that `quality` takes. Whatever happens there, the others are tried too.
`--through decode` does the same in transformers, with the quantized arithmetic emulated; `--with` shows that beside the engine's.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from megatron_export.common.errors import ExportError
from megatron_export.engines import GPUS, verdict_of
from megatron_export.formats import FORMATS
from megatron_export.formats.form import not_rounded
from megatron_export.planning.engine_check import of_folder
from megatron_export.verify.emulation import EmulatedLinear, load
from megatron_export.verify.perplexity import BATCH, WINDOW, of_window, windows_of

from . import vllm_process
from .measuring import compared, markdown
from .vllm_process import MARK, PROMPT, TOKENS, of_scales

CENTERED = (
    "Gemma",
    "Qwen3Next",
    "Qwen3_5",
)  # their norms multiply by one more than their weights, and round once by themselves
TOKENIZING = Lock()  # transformers makes its names when they are first asked for, and not by several threads at a time
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")
SAID = {True: "loads", False: "refused", None: "unknown"}
SERVED = ("vllm", "sglang")  # each has a file here, NAME_process.py
COLUMNS = ("folder", "`check`", "here", "first tokens")
COLUMNS += ("perplexity", "through decode", "ratio", "change, nats per token")


@dataclass(frozen=True)
class Row:
    """What became of one folder.

    through         the engine, or decode
    loads, why      what the rules of `check` say that the engine does; decode is not held against them
    error           what went wrong; then there are no `tokens` and no `losses` (of the windows, nats per token)
    warned, chose   what the engine warned of, and which kernels it took
    """

    folder: str
    through: str
    loads: bool | None
    why: str
    seconds: float = 0.0
    version: str = ""
    device: str = ""
    error: str | None = None
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    chose: list[str] = field(default_factory=list)

    @property
    def became(self) -> str:
        """Without a version nobody answered: the process died, was ended, or was never asked."""
        if self.error is None:
            return "generates"
        return "refused" if self.version else "no answer"

    @property
    def agrees(self) -> bool:
        """Whether the engine did what the rules say; where they say nothing, any answer does."""
        expected = {True: ("generates",), False: ("refused",), None: ("generates", "refused")}[self.loads]
        return self.through == "decode" or self.became in expected


def add_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.set_defaults(run=serve)
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="checkpoints")
    parser.add_argument("--engine", choices=SERVED, default="vllm", help="default: vllm")
    parser.add_argument("--version", help="release that the rules are asked about; default: that they were read in")
    parser.add_argument("--through", choices=("engine", "decode"), default="engine", help="default: engine")
    parser.add_argument(
        "--weights-only",
        metavar="FORMAT,...",
        type=named_formats,
        default=(),
        help="decode: leave the inputs of linears in these formats as they are, as Marlin does with nvfp4,mxfp8 on Hopper",
    )
    parser.add_argument(
        "--round-norms-once",
        action="store_true",
        help="decode: norms multiply by their weights before they round, as vLLM's do, and not after it too",
    )
    parser.add_argument("--text", type=Path, help="for perplexity; without a tokenizer, its bytes are the tokens")
    parser.add_argument("--windows", type=int, help=f"how many windows of {WINDOW} tokens; default: all there are")
    parser.add_argument("--jobs", type=int, default=1, help="folders at a time, on one GPU; default: 1")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that it has for a folder; default: 300")
    attention = "as the engine names it, TRITON_ATTN in vLLM, triton in SGLang; default: its choice"
    parser.add_argument("--attention", metavar="BACKEND", help=attention)
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each layer in the engine; default: 1")
    parser.add_argument("--gpu", choices=GPUS, help="the GPU that the rules are asked about; default: any")
    parser.add_argument("--json", type=Path, help="add a line about each folder to this file as soon as it is known")
    parser.add_argument("--with", dest="beside", type=Path, help="such a file of --through decode, to compare with")


def serve(flags: argparse.Namespace) -> None:
    """Try every folder; print the table. `ExportError` where one did not do what the rules say."""
    if min(flags.jobs, flags.tp) < 1:
        raise ExportError("--jobs and --tp must be at least 1")
    decoded = {row.folder: row for row in (read_rows(flags.beside) if flags.beside else [])}
    attempt = {"engine": through_engine, "decode": through_decode}[flags.through]
    with ThreadPoolExecutor(flags.jobs if flags.through == "engine" else 1) as pool:
        waiting = [pool.submit(tried, folder, flags, attempt) for folder in flags.folders]
        rows = [one.result() for one in waiting]
    print("\n" + "\n".join(table(rows, decoded)), flush=True)
    print("\n".join(["", *notes(rows)]), flush=True)
    if odd := [row.folder for row in rows if not row.agrees or of_scales(row.warned)]:
        raise ExportError(f"{len(odd)} of {len(rows)} did not do what `check` says: {', '.join(odd)}")


def tried(folder: Path, flags: argparse.Namespace, attempt: Callable[..., dict[str, Any]]) -> Row:
    """One folder; what goes wrong is in its row."""
    began = time.monotonic()
    name, loads, why = f"{folder.resolve().parent.name}/{folder.resolve().name}", None, ""
    try:
        verdict = verdict_of(of_folder(folder), flags.engine, flags.version, flags.gpu, flags.tp)
        loads, why = verdict.loads, verdict.why
        with TOKENIZING:
            windows = ids_of(flags.text, folder)[: flags.windows].tolist() if flags.text else []
        found = attempt(folder, windows, flags)
    except Exception as error:  # noqa: BLE001 - no folder may stop the others
        found = {"error": f"{type(error).__name__}: {error}"[:1500]}
    through = flags.engine if flags.through == "engine" else flags.through
    row = Row(name, through, loads, why, round(time.monotonic() - began, 1), **found)
    if flags.json:
        with flags.json.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    print(f"{name}: {row.seconds} s, {row.error or row.tokens}", flush=True)
    return row


def ids_of(text: Path, folder: Path) -> torch.Tensor:
    """The text's tokens in rows of `WINDOW`; its bytes, for a model that has no tokenizer."""
    if any((folder / name).exists() for name in VOCABULARIES):
        return windows_of(text, folder)
    held = text.read_bytes()
    return torch.frombuffer(bytearray(held[: len(held) // WINDOW * WINDOW]), dtype=torch.uint8).long().view(-1, WINDOW)


def through_engine(folder: Path, windows: list[list[int]], flags: argparse.Namespace) -> dict[str, Any]:
    """What the engine's process answers, or how it ended without an answer."""
    request = {"folder": str(folder), "windows": windows, "attention": flags.attention, "tp": flags.tp}
    script = Path(vllm_process.__file__).with_name(f"{flags.engine}_process.py")
    status, out, said = ended([sys.executable, str(script)], json.dumps(request), flags.timeout)
    answers = [line for line in out.splitlines() if line.startswith(MARK)]
    if answers:
        return json.loads(answers[-1].removeprefix(MARK))
    how = f"no answer in {flags.timeout:g} s" if status is None else f"exit status {status}"
    return {"error": f"{how}; its last words: {(out + said)[-1500:]}"}


def ended(command: list[str], given: str, seconds: float) -> tuple[int | None, str, str]:
    """Exit status, output and errors of a process, which is ended after so many seconds (then the status is None), as are all
    processes that it has started."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, **pipes, text=True, errors="replace", start_new_session=True)
    try:
        out, said = process.communicate(given, timeout=seconds)
        return process.returncode, out, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@torch.no_grad()
def through_decode(folder: Path, windows: list[list[int]], flags: argparse.Namespace) -> dict[str, Any]:
    """The same from transformers, with the quantized arithmetic emulated."""
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids, losses = load(folder, device), list(PROMPT), []
    leave_inputs(model, flags.weights_only)
    if flags.round_norms_once:
        round_norms_once(model)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids], device=device), use_cache=False).logits[0, -1].argmax()))
    for batch in torch.tensor(windows, device=device).split(BATCH) if windows else ():
        logits = model(batch, use_cache=False).logits
        losses += [float(of_window(mine, mine, row)[0]) for mine, row in zip(logits, batch, strict=True)]
    return {"tokens": ids[len(PROMPT) :], "losses": losses, "version": transformers.__version__, "device": device}


def named_formats(said: str) -> tuple[str, ...]:
    """The names of formats with commas between them; `ArgumentTypeError`, which ends the command, for an unknown one."""
    names = tuple(said.split(","))
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0]!r}. Known: {', '.join(FORMATS)}")
    return names


def leave_inputs(model: torch.nn.Module, formats: tuple[str, ...]) -> None:
    """From now on linears in these formats do not round their inputs, as kernels that quantize weights alone."""
    for module in model.modules():
        if isinstance(module, EmulatedLinear) and module.form.name in formats:
            module.arithmetic = replace(module.arithmetic, inputs=not_rounded)


def round_norms_once(model: torch.nn.Module) -> None:
    """From now on norms multiply by their weights in float32; transformers rounds what it multiplies to bfloat16 first, but not in
    norms that multiply by one more than their weights.
    """
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and not name.startswith(CENTERED):
            module.forward = partial(_normed, module)


def _normed(norm: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    weight = norm.weight.float()
    return torch.nn.functional.rms_norm(inputs.float(), weight.shape, weight, eps).to(inputs.dtype)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file of --json."""
    try:
        return [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{file}: not written by --json ({error}). Give a file that was") from error


def table(rows: Iterable[Row], decoded: dict[str, Row]) -> list[str]:
    """The lines of a markdown table."""
    cells = []
    for row in rows:
        beside = decoded.get(row.folder)
        became = row.became if row.agrees else f"**{row.became}**"
        cells.append([row.folder, SAID[row.loads], became, first_tokens(row, beside), *figures(row, beside)])
    return markdown(COLUMNS, cells)


def first_tokens(row: Row, beside: Row | None) -> str:
    """The tokens, and how many of them decode gives too before the first that differs."""
    shown = " ".join(map(str, row.tokens))
    if not (row.tokens and beside and beside.tokens):
        return shown
    pairs = zip(row.tokens, beside.tokens, strict=True)
    same = next((n for n, (mine, theirs) in enumerate(pairs) if mine != theirs), len(row.tokens))
    return f"{shown} ({same} as decode)"


def figures(row: Row, beside: Row | None) -> list[str]:
    """Perplexity, decode's, their ratio, and the change, paired by window, with its standard error."""
    mine = torch.tensor(row.losses, dtype=torch.float64)
    theirs = torch.tensor(beside.losses if beside else [], dtype=torch.float64)
    cells = [f"{losses.mean().exp():.4f}" if len(losses) else "" for losses in (mine, theirs)]
    if len(mine) < 2 or len(mine) != len(theirs):
        return [*cells, "", ""]
    return [*cells, *compared(mine - theirs)]


def notes(rows: list[Row]) -> list[str]:
    """What the table has no room for: engines, kernels, warnings of scales, and every error beside what the rules say."""
    lines = sorted({f"{row.through} {row.version} on {row.device}" for row in rows if row.device})
    for row in rows:
        lines += [f"{row.folder}: warned: {text}" for text in of_scales(row.warned)]
        if row.error:
            said = row.error.strip().splitlines()
            line = said[0] if row.became == "refused" else said[-1]  # a traceback tells at its end
            lines.append(f"{row.folder}: {row.became}: {line[:300]}" + (f"; check: {row.why}" if row.why else ""))
    return lines
