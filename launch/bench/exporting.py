"""`export` and `scale`: how long an export takes and what it takes, beside `save_file` of the same bytes in the same run.

    [torchrun --nproc-per-node N] launch/benchmark.py export [--shape 8b] [--formats fp8 nvfp4] [--tp N] [--json FILE]
    [torchrun --nproc-per-node N] launch/benchmark.py scale [--shape 8b] [--sizes 2 4 8 16 32] [--tp N] [--svg FILE]

A model with made-up weights is exported once, when memory is measured. Then an export, and `save_file` by rank 0 from host memory,
take turns, each into a new folder that is deleted before the next; with and without fsync on both sides.
"""

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_export.cli.config import configured
from megatron_export.cli.export_command import EXAMPLE_MODEL
from megatron_export.cli.plan_command import Preview, previewed
from megatron_export.common.errors import ExportError, report
from megatron_export.common.host_memory import available
from megatron_export.common.optional import part
from megatron_export.common.text import readable
from megatron_export.formats import FORMATS

from . import measuring
from .drawing import drawn
from .measuring import (
    Row,
    alone,
    alone_or_torchrun,
    delete,
    held_from,
    peaks_of,
    read_rows,
    save,
    table,
    timed,
    write_rows,
)
from .shapes import SHAPES, build, config_of, made_up, write_config

SOURCES = ("megatron", "transformers")


@dataclass(frozen=True)
class Case:
    """A model and a format to export it in, and what the plan tells of that."""

    model: str
    config: dict
    format: str
    told: Preview


def add_export(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    parser.set_defaults(run=export)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8", "nvfp4"], help="default: fp8 nvfp4")
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    add_common(parser)
    _add_ranks(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """The flags of `scale`."""
    parser.set_defaults(run=scale)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nvfp4"], help="default: nvfp4")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="of layers; default: 2 4 8 16 32"
    )
    parser.add_argument("--with", dest="others", type=Path, nargs="+", default=[], help="files of --json to show too")
    parser.add_argument("--svg", type=Path, help="a plot of time and memory against the size of the model")
    add_common(parser)
    _add_ranks(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """The flags of what is measured, and how often."""
    add_model(parser)
    parser.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="whose model it is; default: megatron")
    parser.add_argument("--repeat", type=int, default=3, help="of which the median is shown; default: 3")
    parser.add_argument("--output", type=Path, default=Path("export/benchmark"), help="folder to write in and clear")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags of the model, of where it runs and where the rows go."""
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of a known model; default: 8b")
    parser.add_argument("--hf-model", help="or those in this folder's config.json; its weights are not read")
    measuring.add_device(parser)
    parser.add_argument("--json", type=Path, help="write the rows here too")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1, help="default: 1")
    parser.add_argument("--etp", type=int, help="default: as --tp")
    parser.add_argument("--writers", choices=("rank0", "node", "all"), default="rank0", help="default: rank0")
    parser.add_argument("--fsync", choices=("no", "yes", "both"), default="both", help="default: both")
    parser.add_argument("--alone", action="store_true", help="no save_file beside it, which holds all bytes in memory")


def export(flags: argparse.Namespace) -> None:
    """Measure each format of one model."""
    _show(flags, _measured(flags, [flags.layers]))


def scale(flags: argparse.Namespace) -> None:
    """Measure models of the same shape and ever more layers."""
    measured = _measured(flags, flags.sizes)
    again = {row.case for row in measured}
    rows = [row for file in flags.others for row in read_rows(file) if row.case not in again] + measured
    _show(flags, rows)
    if flags.svg and os.environ["RANK"] == "0":
        flags.svg.write_text(drawn(rows))


def _show(flags: argparse.Namespace, rows: list[Row]) -> None:
    if os.environ["RANK"] == "0":
        print("\n".join(table(rows)), flush=True)
        if flags.json:
            write_rows(flags.json, rows)


def _measured(flags: argparse.Namespace, sizes: list[int | None]) -> list[Row]:
    """A row for each size, format and kind of sync. All is planned first, so that what does not fit is refused before any work."""
    parallel_state = part("mcore.parallel_state")

    alone_or_torchrun()
    if flags.source != "megatron" and int(os.environ["WORLD_SIZE"]) > 1:
        raise ExportError("--source transformers is for one process")
    if flags.repeat < 1:
        raise ExportError(f"--repeat must be at least 1, not {flags.repeat}")
    rows = []
    with TemporaryDirectory() as temporary:
        source = Path(temporary)
        configs = [config_of(flags.shape, flags.hf_model, size) for size in sizes]
        models = [[case_of(flags, config, name, source) for name in flags.formats] for config in configs]
        refuse(flags, [case for cases in models for case in cases])
        with parallel_state.started(flags.tp, flags.pp, flags.device, ep=flags.ep, etp=flags.etp):
            for cases in models:
                config = cases[0].config
                write_config(source, config)
                with parallel_state.current() as here:
                    model = build(flags.source, config, here)
                for case in cases:
                    rows += _rows(flags, case, model, source, here.device)
                del model
    return rows


def case_of(flags: argparse.Namespace, config: dict, form: str, source: Path) -> Case:
    """What the plan tells of an export by these flags; `source` gets the model's config.json."""
    asked = {name: getattr(flags, name) for name in ("tp", "pp", "ep", "etp", "device")}
    model = str(write_config(source, config))
    settings = configured(hf_model=model, format=form, output=flags.output / "run", **asked)
    name = Path(flags.hf_model).name if flags.hf_model else flags.shape
    return Case(name, config, form, previewed(settings, EXAMPLE_MODEL, int(os.environ["WORLD_SIZE"])))


@contextmanager
def model_for(flags: argparse.Namespace, forms: Iterable[str]) -> Iterator[tuple[Any, Path, list[Case]]]:
    """On one rank: a model of made-up weights, the folder of its config, and what the plan tells of it in each format. What does
    not fit is refused before it is built.
    """
    parallel_state = part("mcore.parallel_state")
    alone()
    flags = argparse.Namespace(**vars(flags) | {"tp": 1, "pp": 1, "ep": 1, "etp": None, "alone": True})
    config = config_of(flags.shape, flags.hf_model, flags.layers)
    with TemporaryDirectory() as temporary:
        source = Path(temporary)
        cases = [case_of(flags, config, form, source) for form in dict.fromkeys(forms)]
        refuse(flags, cases)
        with parallel_state.started(1, 1, flags.device):
            with parallel_state.current() as here:
                model = build("megatron", config, here)
            yield model, source, cases


def refuse(flags: argparse.Namespace, cases: list[Case]) -> None:
    """`ExportError` if there is too little room for one of them."""
    report([problem for case in cases for problem in _problems(flags, case)])


def _problems(flags: argparse.Namespace, case: Case) -> list[str]:
    told, what = case.told, f"{case.model} of {case.config['num_hidden_layers']} layers in {case.format}"
    problems = []
    if told.needed > told.free:
        problems.append(
            f"{what} takes {readable(told.needed)} on the disk of {told.disk}, which has {readable(told.free)} free. "
            "Give fewer --layers, or an --output on another disk"
        )
    if flags.device == "cuda":
        room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if (peak := max(told.forecast.gpu)) > room:
            problems.append(f"{what} takes {readable(peak)} of a GPU that has {readable(room)}. Use more ranks")
    beside = 0 if flags.alone else told.plan.nbytes
    host, room = sum(told.forecast.host) + beside, available()
    if host > room:
        problems.append(
            f"{what} takes {readable(host)} of memory, and {readable(room)} are available here. Give fewer --layers"
            + (", or --alone" if host - beside <= room else "")
        )
    return problems


def _rows(flags: argparse.Namespace, case: Case, model: Any, source: Path, device: torch.device) -> list[Row]:
    from megatron_export import export_hf_checkpoint

    out, beside = flags.output.resolve() / "run", flags.output.resolve() / "saved"
    how = {"format": case.format, "calibration": made_up(case.told.plan), "writers": flags.writers}
    run = partial(export_hf_checkpoint, model, out, hf_model=source, **how)
    reports = []
    delete(out, beside)  # of a run that was stopped
    gpu, host = peaks_of(lambda: reports.append(run(sync=False)), device)
    first = os.environ["RANK"] == "0"
    held = held_from(out) if first and not flags.alone else {}
    delete(out)
    rows = []
    for sync in {"no": [False], "yes": [True], "both": [False, True]}[flags.fsync]:
        times, saved = [], []
        for _ in range(flags.repeat):
            times.append(timed(partial(run, sync=sync)))
            delete(out)
            if not flags.alone:
                saved.append(timed(partial(save, held, beside, sync) if first else lambda: None))
                delete(beside)
        took = {"times": tuple(times), "saved": tuple(saved), "wire": sum(reports[0].wire), "gpu": gpu, "host": host}
        how = {"ranks": _ranks(flags), "writers": flags.writers, "fsync": sync}
        tool = "megatron_export" if flags.source == "megatron" else f"megatron_export, {flags.source}"
        rows.append(row_of(tool, case, device, written=reports[0].plan.nbytes, **took, **how))
    return rows


def row_of(tool: str, case: Case, device: torch.device, **found: Any) -> Row:
    """What was found of a case, which is said."""
    row = Row(
        tool=tool,
        model=case.model,
        layers=case.config["num_hidden_layers"],
        format=case.format,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        model_bytes=case.told.plan.source_nbytes,
        **found,
    )
    row.tell()
    return row


def _ranks(flags: argparse.Namespace) -> str:
    """The world and how it is divided."""
    sizes = {name: getattr(flags, name) for name in ("tp", "pp", "ep", "etp")}
    return " ".join([os.environ["WORLD_SIZE"], *(f"{name} {size}" for name, size in sizes.items() if (size or 1) > 1)])
