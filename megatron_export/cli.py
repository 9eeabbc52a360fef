"""The command: flags from `ExportConfig`, a progress bar and a table on rank 0, one message and one status at the end."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from .config import ExportConfig, helps
from .errors import ExportError, StartError
from .progress import quiet
from .sizes import parse_size, readable

if TYPE_CHECKING:
    from torch import Tensor

    from .job import Job

EXAMPLE_MODEL = Path(__file__).resolve().parents[1] / "examples" / "model"


def main(say: Callable[..., None], arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 refused or failed, 2 bad usage. `say` is `print`."""
    first = os.environ.get("RANK", "0") == "0"
    config = parse(arguments, first)
    warnings.filterwarnings("ignore")  # Megatron and torch name every optional package they miss, once per rank
    from .job import run

    try:
        job = run(config, EXAMPLE_MODEL, bar if first else quiet)
    except ExportError as error:
        if not first and not (isinstance(error, StartError) and os.environ["LOCAL_RANK"] == "0"):
            _let_rank_0_speak()
            return 1
        say(f"\nerror: {error}", file=sys.stderr, flush=True)
        return 1
    if first:
        say("\n".join(table(job)), flush=True)
    return 0


def parse(arguments: list[str] | None, first: bool) -> ExportConfig:
    """Flags -> `ExportConfig`. Bad usage exits with status 2, and rank 0 says why."""
    parser = _Parser(first)
    texts = helps()
    for field in fields(ExportConfig):
        default = f" (default: {field.default})" if field.default not in (None, (), False) else ""
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, help=texts[field.name] + default, **_argument(field.type, field.default))
    values = vars(parser.parse_args(arguments))
    try:
        parse_size(values["max_shard_size"])
        return ExportConfig(**values | {"exclude": tuple(values["exclude"])})
    except ValueError as error:
        parser.error(str(error))


def bar(stage: str, steps: Iterable) -> Iterable:
    """A progress bar for one stage."""
    from tqdm import tqdm

    return tqdm(steps, bar_format=f"{stage:>9} {{bar:30}} {{n_fmt}}/{{total_fmt}} {{elapsed}}")


def table(job: "Job") -> list[str]:
    """The lines shown at the end: what was written, from what, in how long, with how much memory."""
    plan, report = job.plan, job.report
    rows = [
        ("format", plan.form.name + (f", KV cache {plan.kv.NAME}" if plan.kv else "")),
        ("modules", f"{len(plan.quantized)} quantized, {len(plan.excluded)} left in bfloat16: {_some(plan.excluded)}"),
        ("gathered first", f"{sum(item.gather_first for item in plan.items)} of {len(plan.items)} parameters"),
        ("written", f"{plan.nbytes:,} bytes in {len(plan.files)} file{'s' * (len(plan.files) > 1)}"),
        ("compression", f"{plan.source_nbytes / plan.nbytes:.2f} x against bfloat16 ({plan.source_nbytes:,} bytes)"),
    ]
    rows += [("note", remark) for remark in plan.remarks]
    if job.tokens:
        rows.append(("experts", _experts(job.tokens)))
    if report is None:
        return _aligned([("dry run", "nothing read, nothing written"), *rows])
    rows += [
        ("read", f"{job.bytes_read:,} bytes by all ranks"),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in job.seconds.items())),
        ("peak host memory", _peaks(report.peak_host)),
        ("peak GPU memory", _peaks(report.peak_gpu) if any(report.peak_gpu) else "no GPU"),
        ("folder", str(report.folder)),
    ]
    return _aligned(rows)


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


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<16}  {value}" for name, value in rows]


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _experts(tokens: dict[str, "Tensor"]) -> str:
    """How many calibration tokens experts were given, and which were given none."""
    counts = {
        f"{name.split('.')[2]}.{n}": count for name, found in tokens.items() for n, count in enumerate(found.tolist())
    }
    few, median, many = min(counts.values()), sorted(counts.values())[len(counts) // 2], max(counts.values())
    never = tuple(expert for expert, count in counts.items() if not count)
    unseen = (
        f"; {len(never)} given none (layer.expert {_some(never)}), scaled as the others of their layer" if never else ""
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
