"""The command: flags from `ExportConfig`, a progress bar and a table on rank 0, one message and one status at the end."""

import argparse
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from ..common.errors import ExportError, Interrupted, RankLost, StartError
from ..common.progress import quiet
from ..common.text import parse_size, readable
from ..distributed.signals import AGAIN, noticed
from ..engines import targets_in
from . import terminal
from .config import ExportConfig, helps
from .terminal import bar

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Job

EXAMPLE_MODEL = Path(__file__).resolve().parents[2] / "examples" / "model"
PLANNED = (  # the settings that decide what is written and what it takes
    *("output", "tp", "pp", "vpp", "pp_layout", "ep", "etp", "hf_model", "format", "kv_cache", "group_size"),
    *("fp8_pb_spelling", "awq_output", "awq_clip", "max_shard_size", "writers", "exclude", "mtp"),
    *("quantize_mla", "target", "device"),
)


def main(say: Callable[..., None], arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 refused or failed, 2 bad usage, 75 stopped by a signal, try again.
    `say` is `print`.
    """
    first = os.environ.get("RANK", "0") == "0"
    config = parse(arguments, first)
    warnings.filterwarnings("ignore")  # Megatron and torch name every optional package they miss, once per rank
    from .run import run

    try:
        with noticed():
            job = run(config, EXAMPLE_MODEL, bar if first else quiet)
    except ExportError as error:
        status = AGAIN if isinstance(error, Interrupted) else 1
        alone = isinstance(error, StartError) and os.environ["LOCAL_RANK"] == "0"
        if not (first or alone or (isinstance(error, RankLost) and str(error).startswith("rank 0 is gone"))):
            _let_rank_0_speak()
            return status
        say(f"\nerror: {error}{_way_on(config)}", file=sys.stderr, flush=True)
        return status
    if first:
        pairs, title = (table(job), "exported") if job.report else (_dry(config, job), "dry run")
        say(terminal.rows(pairs, title), flush=True)
    return 0


def _way_on(config: ExportConfig) -> str:
    """What is left of a failed export, and how to use it."""
    from ..writing.journal import kept

    complete = kept(config.output.resolve()) if config.output else 0
    return (
        f"\n{complete} of its files are complete: the same command with --resume goes on with them" if complete else ""
    )


def parse(arguments: list[str] | None, first: bool) -> ExportConfig:
    """Flags -> `ExportConfig`. Bad usage exits with status 2, and rank 0 says why."""
    parser = _Parser(first)
    _add_flags(parser, {field.name for field in fields(ExportConfig)})
    return _config(parser, vars(parser.parse_args(arguments)))


def plan(say: Callable[..., None], arguments: list[str] | None = None) -> int:
    """Run `python -m megatron_export plan`; returns its exit status: 0 done, 1 refused, 2 bad usage. `say` is `print`."""
    parser = argparse.ArgumentParser(prog="python -m megatron_export", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "What an export would write and take, from config.json alone: on one process, for any topology."
    planning = commands.add_parser("plan", help=about, description=about, allow_abbrev=False)
    _add_flags(planning, PLANNED)
    planning.add_argument("--world", type=int, help="number of ranks (default: the fewest that the other sizes allow)")
    planning.add_argument("--json", action="store_true", help="print JSON instead of a table, sizes in bytes")
    values = vars(parser.parse_args(arguments))
    world, as_json = values.pop("world"), values.pop("json")
    if world is not None and world < 1:
        planning.error(f"--world must be at least 1, not {world}")
    config = _config(planning, values | {"dry_run": True})
    from . import plan_command

    gc.disable()  # a plan of a large model is millions of objects that all stay; looking for cycles takes half of its time
    try:
        found = plan_command.previewed(config, EXAMPLE_MODEL, world)
    except ExportError as error:
        say(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        gc.enable()
    say(
        json.dumps(plan_command.as_json(found), indent=2)
        if as_json
        else terminal.rows(plan_command.rows(found), "plan"),
        flush=True,
    )
    return 0


def _add_flags(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    texts = helps()
    for field in fields(ExportConfig):
        default = f" (default: {field.default})" if field.default not in (None, (), False, "") else ""
        flag = f"--{field.name.replace('_', '-')}"
        if field.name in names:
            parser.add_argument(flag, help=texts[field.name] + default, **_argument(field.type, field.default))


def _config(parser: argparse.ArgumentParser, values: dict) -> ExportConfig:
    try:
        parse_size(values["max_shard_size"])
        targets_in(values["target"])
        return ExportConfig(**values | {"exclude": tuple(values["exclude"])})
    except ValueError as error:
        parser.error(str(error))


def table(job: "Job") -> list[tuple[str, str]]:
    """The rows shown at the end: what was written, from what, in how long, with how much memory."""
    from ..planning.engine_check import of_plan, verdicts
    from .plan_command import plan_rows

    report, rows = job.report, plan_rows(job.plan)
    rows += [("note", remark) for remark in job.plan.remarks]
    rows += [(engine, verdict.text) for engine, verdict in verdicts(of_plan(job.plan)).items()]
    if job.tokens:
        rows.append(("experts", _experts(job.tokens)))
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
    return rows + job.verdict


def _dry(config: ExportConfig, job: "Job") -> list[tuple[str, str]]:
    """The rows shown after a dry run: those of `plan`."""
    import torch

    from .plan_command import preview_of, rows

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return rows(preview_of(config, job.plan, int(os.environ["WORLD_SIZE"]), device, job.calibrates))


class _Parser(argparse.ArgumentParser):
    """Speaks on rank 0 only; the other ranks leave a little later, so that rank 0 is heard before torchrun ends it."""

    def __init__(self, first: bool) -> None:
        super().__init__(
            prog="export.py",
            description="Export a Megatron-Core model as a quantized HuggingFace checkpoint.",
            allow_abbrev=False,
        )
        self.first = first

    def error(self, message: str) -> NoReturn:
        if not self.first:
            _let_rank_0_speak()
            self.exit(2)
        super().error(message)


def _let_rank_0_speak() -> None:
    time.sleep(2)


def _experts(tokens: dict[str, "Tensor"]) -> str:
    """How many calibration tokens experts were given, and which were given none."""
    from ..common.text import some
    from ..models.statistic_names import layer_of

    counts = {
        f"{layer_of(name)}.{n}": count for name, found in tokens.items() for n, count in enumerate(found.tolist())
    }
    few, median, many = min(counts.values()), sorted(counts.values())[len(counts) // 2], max(counts.values())
    never = tuple(expert for expert, count in counts.items() if not count)
    unseen = (
        f"; {len(never)} given none (layer.expert {some(never)}), scaled as the others of their layer" if never else ""
    )
    return f"{few:,} / {median:,} / {many:,} tokens each (min, median, max of {len(counts)}){unseen}"


def _peaks(peaks: tuple[int, ...]) -> str:
    """One number per rank; of many ranks, the range."""
    if len(peaks) <= 8:
        return ", ".join(readable(peak) for peak in peaks) + " by rank"
    return f"{readable(min(peaks))} to {readable(max(peaks))} on {len(peaks)} ranks"


def _argument(kind: Any, default: Any) -> dict:
    if NoneType in get_args(kind):
        kind = next(option for option in get_args(kind) if option is not NoneType)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "default": default, "metavar": "GLOB"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "default": default, "type": type(default or "")}
    return {"type": kind, "default": default}
