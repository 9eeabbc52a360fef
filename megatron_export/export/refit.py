"""A live model's HF tensors, one after the other and quantized as an export would, for a loop that refits an engine with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExportError
from ..common.options import takes_options
from ..planning.request import SILENCE, Request, requested
from ..planning.shard_files import BUCKET_BYTES
from ..planning.tensor_spec import Output
from . import transport
from .encode_stream import Stream
from .origins import Model, Statistics, live, world_of
from .prepare import Opening, open_model, renewed, surveyed

NO_FOLDER = (
    "overwrite",
    "resume",
    "sync",
    "target",
    "writers",
    "draft_output",
    "draft_format",
    "medusa_layout",
)  # options that a stream has no use for


@takes_options(Request, NO_FOLDER)
def plan_hf_tensors(
    model: Model,
    *,
    hf_model: str | Path | None = None,
    calibration: Statistics | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    **options: Any,
) -> Opening:
    """Plan a stream of a model's tensors once, for many calls of `iter_hf_tensors` while it is trained. Reads no weights.

    model, hf_model, calibration  as for `export_hf_checkpoint`
    bucket_bytes  of encoded tensors that are made at a time; a larger parameter is made alone
    Collective: every rank calls it with the same arguments. `ExportError` on every rank when it cannot be done.
    """
    request = requested(options, NO_FOLDER, bucket_bytes=bucket_bytes)
    with world_of(model, request.timeout) as here:
        return open_model(here, model, hf_model, request, calibration)


def iter_hf_tensors(
    model: Model,
    *,
    calibration: Statistics | None = None,
    plan: Opening | None = None,
    everywhere: bool = False,
    timeout: float = SILENCE,
    **options: Any,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `export_hf_checkpoint` would write, by HF name and on this rank's device: on rank 0, or `everywhere`.

    model       as for `export_hf_checkpoint`; it is left as it was, and must not be changed before the last tensor came
    calibration as for `export_hf_checkpoint`
    plan        what `plan_hf_tensors` returned for this model, or another of its shape; or give its arguments as `options`
    Every rank must take all tensors: it is collective from one bucket to the next. On ranks that get none it yields none. Memory
    is a few buckets, whatever the model; a tensor belongs to whom it was given. `ExportError` as there.
    """
    if plan is not None and options:
        raise ExportError(f"iter_hf_tensors: give either plan or {', '.join(options)}")
    if plan is None:
        plan = plan_hf_tensors(model, calibration=calibration, timeout=timeout, **options)
    with world_of(model, timeout) as here:
        opening = renewed(here, plan, model, calibration)
        work, _ = surveyed(here, opening)
        slices: dict[str, dict[int, Tensor]] = {}  # of one tensor, until all have come
        taken: list[tuple[Output, Tensor]] = []
        for bucket in Stream(here, work, taken.extend).run(plan.plan.buckets):
            own = ((output, tensor.clone()) for output, tensor in taken)  # some are the model's own memory
            tensors = transport.to_all(here, bucket, taken) if everywhere else list(own)
            taken.clear()
            for output, tensor in tensors:
                if not output.count:
                    yield output.name, tensor
                    continue
                made = slices.setdefault(output.name, {})
                made[output.index] = tensor
                if len(made) == output.count:
                    del slices[output.name]
                    yield output.name, torch.stack([made[index] for index in sorted(made)])
        for name, tensor in live(model).copied(opening.original.config):
            if here.first or everywhere:
                yield name, tensor.to(here.device, copy=True)
