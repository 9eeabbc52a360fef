"""Twenty steps of training with Megatron's schedules, exports amid them that succeed or fail: training does not notice."""

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_export import (
    ExportError,
    Handle,
    calibrate,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    formats,
    iter_hf_tensors,
)
from megatron_export.common.piece import Piece
from megatron_export.distributed.collectives import together
from megatron_export.mcore import parallel_state
from megatron_export.mcore.cpu_compat import without_cuda

from ..support.live import batches, loaded
from ..support.models import LENGTH, contents, tensors
from ..support.ranks import Ranks
from .test_failures import broken_encoder, full_disk, on_rank

pytestmark = pytest.mark.whole

HOW = ("waited for", "in the background", "streamed")
STEPS, EXPORTED_AFTER, MICRO_BATCHES = 20, 10, 2


def forward(data: object, model: nn.Module) -> tuple[Tensor, Callable]:
    """One micro-batch, as Megatron's schedules ask for it."""
    ids = next(data)
    positions = torch.arange(LENGTH - 1).expand(len(ids), -1)
    mask = torch.ones(1, 1, LENGTH - 1, LENGTH - 1, dtype=torch.bool).triu(1)
    losses = model(ids[:, :-1], positions, mask, labels=ids[:, 1:])
    return losses, lambda losses: (losses.float().mean(), losses.detach().float().mean())


After = Callable[[int, nn.Module], None]


def train(source: Path, tp: int, pp: int, after: After) -> tuple[list[float], After]:
    """In a rank: the losses of all steps, on the last stage; `after` each, something else is done."""
    samples, losses = batches(source, 2), []
    with loaded(source, tp, pp) as (model, _), without_cuda():
        model.config.deallocate_pipeline_outputs = False
        for layer in model.decoder.layers:
            layer.hidden_dropout = 0.1
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            data = iter([samples[(step + part) % len(samples)] for part in range(MICRO_BATCHES)])
            found = get_forward_backward_func()(
                forward_step_func=forward, data_iterator=data, model=[model],
                num_microbatches=MICRO_BATCHES, micro_batch_size=2, seq_length=LENGTH - 1,
            )  # fmt: skip
            optimizer.step()
            losses += [float(loss) for loss in found]
            after(step, model)
    return losses, after


def nothing(step: int, model: nn.Module) -> None:
    """Train alone."""


@dataclass
class Exporting:
    """Calibrate and export amid the steps, to `out`."""

    source: Path
    out: Path
    how: str
    handle: Handle | None = None

    def __call__(self, step: int, model: nn.Module) -> None:
        if step == EXPORTED_AFTER:
            asked = {"hf_model": self.source, "calibration": calibrate(model, batches(self.source, 2))}
            if self.how == "streamed":
                list(iter_hf_tensors(model, format="fp8", **asked))
            elif self.how == "in the background":
                self.handle = export_hf_checkpoint_async(model, self.out, **asked)
            else:
                export_hf_checkpoint(model, self.out, **asked)
        if step == STEPS and self.handle:
            self.handle.wait()
            self.handle = None


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_losses_after_an_export_are_those_of_a_run_without(
    tp: int, pp: int, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    source = models["qwen3"]
    undisturbed = [losses for losses, _ in ranks.call(2, train, source, tp, pp, nothing)]
    assert len(set(undisturbed[1])) == STEPS * MICRO_BATCHES
    for how in HOW:
        after = Exporting(source, tmp_path / how, how)
        assert [losses for losses, _ in ranks.call(2, train, source, tp, pp, after)] == undisturbed
    waited, background = (contents(tmp_path / how) for how in HOW[:2])
    assert waited == background
    assert len(tensors(tmp_path / "waited for")) > 100


def another_dtype() -> AbstractContextManager:
    """Rank 1 makes codes of a dtype that nobody planned."""

    def replacement(real: Callable) -> Callable:
        def encode(form: Any, weight: Tensor, amax: Any) -> dict[str, Piece]:
            pieces = real(form, weight, amax)
            if weight.device.type == "meta":
                return pieces
            return pieces | {"weight": Piece(pieces["weight"].data.view(torch.uint8), pieces["weight"].axes)}

        return encode

    return on_rank(1, formats, "encode", replacement)


@contextmanager
def without_memory_of(module: nn.Module) -> Iterator[None]:
    """Rank 1 has freed a weight, which it gets back."""
    if os.environ["RANK"] == "1":
        held, storage = module.weight.detach().clone(), module.weight.untyped_storage()
        storage.resize_(0)
    try:
        yield
    finally:
        if os.environ["RANK"] == "1":
            storage.resize_(held.nbytes)
            module.weight.data.copy_(held)


def killed(model: nn.Module, out: Path, **asked: Any) -> None:
    """The process that writes is killed."""
    handle = export_hf_checkpoint_async(model, out, **asked)
    if handle.process:
        handle.process.kill()
    handle.wait()


@dataclass
class Failing:
    """After each step, try an export that fails, and go on; after the last one, export."""

    source: Path
    out: Path
    said: list[str] = field(default_factory=list)
    statistics: dict[str, Tensor] | None = None

    def ways(self, model: nn.Module) -> list[tuple[AbstractContextManager, Callable[[], object]]]:
        """What is the matter, and what fails of it."""
        asked = {"hf_model": self.source, "format": "fp8", "calibration": self.statistics}
        taken, ids = self.out.parent, batches(self.source, 2)
        export = partial(export_hf_checkpoint, model, self.out, **asked)
        linear = model.decoder.layers[1].mlp.linear_fc1
        return [
            (nullcontext(), partial(export_hf_checkpoint, model, taken, **asked)),
            (nullcontext(), partial(export, format="fp9")),
            (nullcontext(), partial(export, calibration=None)),
            (nullcontext(), partial(export, max_shard_size="5XB")),
            (nullcontext(), partial(calibrate, model, [ids[0] + 10**6])),
            (without_memory_of(linear), partial(list, iter_hf_tensors(model, **asked))),
            (broken_encoder(), export),
            (another_dtype(), export),
            (full_disk(), export),
            (nullcontext(), partial(killed, model, self.out, **asked)),
        ]

    def __call__(self, step: int, model: nn.Module) -> None:
        self.statistics = self.statistics or calibrate(model, batches(self.source, 2))
        ways = self.ways(model)
        if step <= len(ways):
            matter, way = ways[step - 1]
            try:
                with matter:
                    way()
            except ExportError as error:
                assert error.everywhere, error
                self.said.append(str(error))
        elif step == STEPS:
            export_hf_checkpoint(model, self.out, hf_model=self.source, format="bf16")


SAID = (
    "is not empty. Give another --output",
    "unknown format 'fp9'. Did you mean 'fp8'?",
    "calibrat",
    "'5XB' is not a size. Write it like 5GB or 500MB",
    "outside the model's vocabulary",
    "decoder.layers.1.mlp.linear_fc1.weight: as torch.bfloat16 (96, 64) it takes 12,288 bytes of memory, and has 0",
    "rank 1 failed to quantize: RuntimeError: a broken encoder",
    "was planned as torch.float8_e4m3fn",
    "No space left",
    "ended with status -9",
)


def test_a_training_loop_that_catches_failed_exports_goes_on_with_the_same_losses(
    ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    source, out = models["qwen3"], tmp_path / "place" / "out"
    out.parent.mkdir()
    (out.parent / "precious").touch()
    undisturbed = [losses for losses, _ in ranks.call(2, train, source, 2, 1, nothing)]
    found = ranks.call(2, train, source, 2, 1, Failing(source, out))
    assert [losses for losses, _ in found] == undisturbed
    first, second = (after.said for _, after in found)
    assert first == second
    assert len(first) == len(SAID)
    for said, words in zip(first, SAID, strict=True):
        assert words in said
        assert "AssertionError" not in said and "Output(" not in said
    assert "This is a mistake of megatron_export, and not of your model" in first[7]
    assert len(tensors(out)) > 30


def kept_of_a_failure() -> bool:
    """In a rank: whether a tensor of a stage that failed is still there, without a search for cycles of garbage."""
    found = []

    def fail() -> None:
        tensor = torch.zeros(3)
        found.append(weakref.ref(tensor))
        raise RuntimeError("broken")

    with parallel_state.started(1, 1, "cpu"), parallel_state.current() as here:
        gc.disable()
        try:
            with suppress(ExportError), together(here, "fail"):
                fail()
            return found[0]() is not None
        finally:
            gc.enable()


def test_a_failure_that_was_handled_holds_no_memory(ranks: Ranks) -> None:
    assert ranks.call(1, kept_of_a_failure) == [False]
