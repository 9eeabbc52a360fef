"""`trace`: where the time of one export goes, by kind of thread and by kind of work.

    python launch/benchmark.py trace [--shape 8b] [--layers 2] [--format nvfp4] [--events trace.json]

The functions in `SPANS` are timed while an export runs, after one to warm up. A function's seconds are without those of timed
functions that it calls, so that a thread's seconds add up. `--events` writes all of it for chrome://tracing or ui.perfetto.dev.
"""

import argparse
import importlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_export.formats import FORMATS

from .exporting import add_model, model_for
from .measuring import delete, markdown
from .shapes import made_up

SPANS = {  # what it does -> the functions that do it
    "survey: maxima and checksum of the model": ("export.weight_amax:_read",),
    "split": ("planning.parameter:Item.split",),
    "encode": ("planning.parameter:Item.encode",),
    "pack": ("export.transport:parcel_to_writer",),
    "between ranks": ("export.transport:deliver", "distributed.collectives:everyone"),
    "hand over, wait for a free chunk": ("writing.device_to_disk:Conveyor._add",),
    "wait for the copy from the device": ("writing.device_to_disk:Conveyor._write",),
    "checksum of what is written": ("writing.safetensors_file:crc32",),
    "write": ("writing.byte_sink:OnDisk.write",),
    "sync": ("writing.byte_sink:OnDisk.finish",),
    "open and note files": ("writing.writer:CheckpointWriter._begin", "writing.staging:Staging.finish"),
    "wait until it is written": ("writing.safetensors_file:SafetensorsFile.ready",),
    "wait for judges": ("writing.read_back:_read",),
    "read back": ("writing.read_back:_judge",),
    "checksum of what was read": ("writing.read_back:crc32",),
    "look for NaN and Inf": ("writing.read_back:_wrong_values",),
}


@dataclass
class Trace:
    """Seconds of functions, from several threads."""

    began: float = field(default_factory=time.perf_counter)
    events: list[tuple[str, str, float, float, float]] = field(default_factory=list)  # thread, what, start, end, own
    inner: threading.local = field(default_factory=threading.local)

    def timed(self, what: str, work: Callable) -> Callable:
        """A function that does the same and is timed."""

        @wraps(work)
        def timing(*arguments: Any, **named: Any) -> Any:
            outer = getattr(self.inner, "seconds", 0.0)
            self.inner.seconds = 0.0
            start = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                end = time.perf_counter()
                own = end - start - self.inner.seconds
                self.events.append((threading.current_thread().name, what, start, end, own))
                self.inner.seconds = outer + end - start

        return timing

    def told(self) -> list[list[str]]:
        """Rows: kind of thread, how many, what, calls, seconds in all, and the last one's end after the start."""
        threads, found = defaultdict(set), defaultdict(list)
        for thread, what, _, end, own in self.events:
            kind = thread.rpartition("_")[0] or thread
            threads[kind].add(thread)
            found[kind, what].append((own, end - self.began))
        rows = sorted(found.items(), key=lambda one: (one[0][0], -sum(own for own, _ in one[1])))
        told = []
        for (kind, what), calls in rows:
            owns, ends = zip(*calls, strict=True)
            told.append([kind, str(len(threads[kind])), what, str(len(calls)), f"{sum(owns):.3f}", f"{max(ends):.2f}"])
        return told

    def written(self) -> str:
        """All events, as Chrome's trace viewer reads them."""
        events = [
            {
                "ph": "X",
                "pid": 0,
                "tid": thread,
                "name": what,
                "ts": 1e6 * (start - self.began),
                "dur": 1e6 * (end - start),
            }
            for thread, what, start, end, _ in self.events
        ]
        return json.dumps({"traceEvents": events})


def add_trace(parser: argparse.ArgumentParser) -> None:
    """The flags of `trace`."""
    parser.set_defaults(run=trace)
    parser.add_argument("--format", choices=FORMATS, default="nvfp4", help="default: nvfp4")
    parser.add_argument("--layers", type=int, help="instead of as many as the model has")
    parser.add_argument("--output", type=Path, default=Path("export/benchmark"), help="folder to write in and clear")
    parser.add_argument("--sync", action="store_true", help="wait until all is on the disk")
    parser.add_argument("--events", type=Path, help="write every call here, for chrome://tracing")
    add_model(parser)


def trace(flags: argparse.Namespace) -> None:
    """Export once to warm up and once with all timed."""
    from megatron_export import export_hf_checkpoint

    out = flags.output.resolve() / "run"
    with model_for(flags, [flags.format]) as (model, source, [case]):
        statistics = made_up(case.told.plan)
        run = partial(export_hf_checkpoint, model, out, hf_model=source, format=flags.format, calibration=statistics)
        for _ in range(2):  # the first also starts what is compiled late
            delete(out)
            with tracing() as found:
                report = run(sync=flags.sync)
        delete(out)
    print(f"{case.model} {case.config['num_hidden_layers']} layers, {flags.format}: {report.seconds:.2f} s")
    print(", ".join(f"{stage} {seconds:.2f}" for stage, seconds in report.stages.items()))
    print("\n".join(markdown(["thread", "of them", "what", "calls", "seconds in all", "last end"], found.told())))
    if flags.events:
        flags.events.write_text(found.written())


@contextmanager
def tracing() -> Iterator[Trace]:
    """Time the functions in `SPANS` meanwhile."""
    found = Trace()
    with ExitStack() as stack:
        for what, places in SPANS.items():
            for place in places:
                module, _, name = place.partition(":")
                owner = importlib.import_module(f"megatron_export.{module}")
                *outer, name = name.split(".")
                for one in outer:
                    owner = getattr(owner, one)
                stack.enter_context(patch.object(owner, name, found.timed(what, getattr(owner, name))))
        yield found
