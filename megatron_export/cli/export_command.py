"""`megatron-export export`: a progress bar and a table on rank 0, one message and one status at the end."""

import argparse
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import ExportError, Interrupted, RankLost, StartError
from ..common.garbage import no_garbage_collection
from ..common.progress import quiet
from ..common.text import readable
from ..distributed import last_words
from ..distributed.signals import heed, noticed, status_of
from . import terminal
from .config import ExportConfig
from .flags import Parser, Say, add_options, config_of, first, let_rank_0_speak
from .terminal import bar

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Outcome

DESCRIPTION = "Export a Megatron-Core model as a quantized HuggingFace checkpoint."
ON_ERROR = 1
NOTHING_KEPT = "nothing is complete yet, and the same command starts from the beginning"
EXAMPLE_MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"


def main(say: Say, arguments: list[str] | None = None) -> int:
    """Run the command as launch/export.py does; returns its exit status. `say` is `print`."""
    terminal.clean_logs()
    return _export(terminal.cleaned(say), parse(arguments))


def parse(arguments: list[str] | None) -> ExportConfig:
    """Flags of launch/export.py -> settings. Bad usage exits with status 2, and rank 0 says why."""
    parser = Parser(prog="export.py", description=DESCRIPTION)
    add_flags(parser)
    return config_of(parser, vars(parser.parse_args(arguments)))


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_options(parser)


def run(say: Say, parser: argparse.ArgumentParser, flags: argparse.Namespace) -> int:
    """The exit status: 0 done, 1 refused or failed, 2 bad usage, 75 stopped by a signal, try again, 130 stopped by Ctrl-C."""
    return _export(say, config_of(parser, vars(flags)))


def _export(say: Say, config: ExportConfig) -> int:
    warnings.filterwarnings("ignore")  # Megatron and torch name every optional package they miss, once per rank
    try:
        with noticed():
            with no_garbage_collection():
                from .run import run_export

            heed()  # before this rank waits for others
            job = run_export(config, EXAMPLE_MODEL, bar if first() else quiet)
    except ExportError as error:
        return _failed(say, config, error)
    if first():
        pairs, title = (table(job), "exported") if job.report else (_dry(config, job), "dry run")
        say(terminal.rows(pairs, title), flush=True)
    return 0


def _failed(say: Say, config: ExportConfig, error: ExportError) -> int:
    """Say why an export ended, and how to go on, on the one rank that is to speak; returns the exit status."""
    stopped, lost = isinstance(error, Interrupted), isinstance(error, RankLost)
    way_on = _way_on(config) or (NOTHING_KEPT if stopped else "")
    said = f"error: {error}" + (f"{': ' if stopped else chr(10)}{way_on}" if way_on else "")
    last_words.leave(said, blamed=lost)
    alone = isinstance(error, StartError) and os.environ.get("LOCAL_RANK", "0") == "0"
    if first() or alone or (lost and str(error).startswith("rank 0 is gone")):
        say(f"\n{said}", file=sys.stderr, flush=True)
    else:
        let_rank_0_speak()
    return status_of(error.signal) if stopped else 1


def _way_on(config: ExportConfig) -> str:
    """What is left of a failed export, and how to use it."""
    from ..writing.journal import kept
    from .outputs import kept_file

    if config.output is None:
        return ""
    if complete := kept(config.output.resolve()):
        return f"{complete} of its files are complete: the same command with --resume goes on with them"
    file = kept_file(config)
    with suppress(OSError):  # its name is too long
        if file.is_file():
            until = f"until an export into {config.output} is complete"
            return f"the calibration is kept in {file} {until}: give it to --load-calibration"
    return ""


def table(job: "Outcome") -> list[tuple[str, str]]:
    """The rows shown at the end: what was written, from what, in how long, with how much memory."""
    from ..planning.engine_check import of_plan, verdicts
    from ..writing.manifest import accelerators
    from .plan_command import plan_rows

    report, rows = job.report, plan_rows(job.plan)
    rows += [("note", remark) for remark in job.plan.remarks + job.remarks]
    rows += [(engine, verdict.text) for engine, verdict in verdicts(of_plan(job.plan)).items()]
    if job.tokens:
        rows.append(("experts", _experts(job.tokens)))
    if loaded := accelerators():
        rows.append(("Megatron-Core with", ", ".join(f"{name} {number}" for name, number in loaded.items())))
    if report.kept:
        rows.append(("resumed", f"{report.kept} of {len(job.plan.files)} files were complete already"))
    rows += [
        ("over the wire", f"{sum(report.wire):,} bytes"),
        ("read", f"{job.bytes_read:,} bytes by all ranks"),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in job.seconds.items())),
        ("peak host memory", _peaks(report.peak_host)),
        ("peak GPU memory", _peaks(report.peak_gpu) if any(report.peak_gpu) else "no GPU"),
        ("folder", str(report.folder)),
    ]
    return rows + _draft(job) + job.verdict


def _draft(job: "Outcome") -> list[tuple[str, str]]:
    """The rows about the model's draft, if it has one."""
    from ..planning.engine_check import of_plan, verdicts

    if job.draft is None:
        return []
    plan = job.draft.opening.plan
    said = f"{plan.format}, {readable(plan.nbytes)} in {len(plan.files)} file(s)"
    rows = [("draft", said)] + ([("draft folder", str(job.draft.folder))] if job.draft.folder else [])
    judged = verdicts(of_plan(plan), base=of_plan(job.plan))
    rows += [("draft note", remark) for remark in plan.remarks]
    return rows + [(f"draft in {engine}", verdict.text) for engine, verdict in judged.items()]


def _dry(config: ExportConfig, job: "Outcome") -> list[tuple[str, str]]:
    """The rows shown after a dry run: those of `plan`."""
    import torch

    from .plan_command import preview_of, rows

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return rows(preview_of(config, job.plan, job.world, device, job.batch, job.remarks)) + _draft(job)


def _experts(tokens: dict[str, "Tensor"]) -> str:
    """How many calibration tokens experts were given, and which were given none."""
    from ..common.text import some
    from ..models.statistic_names import layer_of

    counts = {f"{layer_of(name)}.{n}": count for name in tokens for n, count in enumerate(tokens[name].tolist())}
    few, median, many = min(counts.values()), sorted(counts.values())[len(counts) // 2], max(counts.values())
    never = tuple(expert for expert, count in counts.items() if not count)
    said = f"{few:,} / {median:,} / {many:,} tokens each (min, median, max of {len(counts)})"
    unseen = f"; {len(never)} given none (layer.expert {some(never)}), scaled as the others of their layer"
    return said + (unseen if never else "")


def _peaks(peaks: tuple[int, ...]) -> str:
    """One number per rank; of many ranks, the range."""
    if len(peaks) <= 8:
        return ", ".join(readable(peak) for peak in peaks) + " by rank"
    return f"{readable(min(peaks))} to {readable(max(peaks))} on {len(peaks)} ranks"
