"""Twenty steps of training with Megatron's schedules, an export after the tenth: training does not notice."""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_export import calibrate, export_hf_checkpoint, export_hf_checkpoint_async, iter_hf_tensors
from megatron_export.mcore.cpu_compat import without_cuda

from ..support.live import batches, loaded
from ..support.models import EXAMPLE, LENGTH, contents, tensors
from ..support.ranks import Ranks

pytestmark = pytest.mark.whole

STEPS, EXPORTED_AFTER, MICRO_BATCHES = 20, 10, 2
HOW: dict[str, Callable] = {
    "waited for": export_hf_checkpoint,
    "in the background": export_hf_checkpoint_async,
}


def forward(data: object, model: nn.Module) -> tuple[Tensor, Callable]:
    """One micro-batch, as Megatron's schedules ask for it."""
    ids = next(data)
    positions = torch.arange(LENGTH - 1).expand(len(ids), -1)
    mask = torch.ones(1, 1, LENGTH - 1, LENGTH - 1, dtype=torch.bool).triu(1)
    losses = model(ids[:, :-1], positions, mask, labels=ids[:, 1:])
    return losses, lambda losses: (losses.float().mean(), losses.detach().float().mean())


def train(source: Path, out: Path | None, tp: int, pp: int, how: str) -> list[float]:
    """In a rank: the losses of all steps, on the last stage; with `out`, the model is calibrated and exported amid them."""
    samples, losses, handle = batches(source, 2), [], None
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
            if out and step == EXPORTED_AFTER:
                statistics = calibrate(model, samples)
                if how == "streamed":
                    for _ in iter_hf_tensors(model, hf_model=source, format="fp8", calibration=statistics):
                        pass
                else:
                    handle = HOW[how](model, out, hf_model=source, calibration=statistics)
        if how == "in the background" and handle:
            handle.wait()
    return losses


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_losses_after_an_export_are_those_of_a_run_without(
    tp: int, pp: int, ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    run = partial(ranks.call, 2, train, models["qwen3"])
    undisturbed = run(None, tp, pp, "")
    assert len(set(undisturbed[1])) == STEPS * MICRO_BATCHES
    for how in (*HOW, "streamed"):
        assert run(tmp_path / how, tp, pp, how) == undisturbed
    waited, background = (contents(tmp_path / how) for how in HOW)
    assert waited == background
    assert len(tensors(tmp_path / "waited for")) > 100


def in_megatron_lm(source: Path, out: Path) -> list[str]:
    """In a rank: what the example's wrapper does around a stand-in for Megatron-LM's `save_checkpoint_and_time`."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE.parent / "export_in_megatron_lm.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    saved: list[str] = []
    with loaded(source, 2) as (model, _):
        flags = example.add_export_args(argparse.ArgumentParser()).parse_args(["--export-hf-model", str(source)])
        flags.save = str(out)
        example._flags = lambda: flags
        wrapped = example.exporting(
            lambda iteration, model, optimizer, **more: saved.append(f"{iteration} {optimizer} {more}"),
            lambda: batches(source),
        )
        for iteration in (10, 20):
            wrapped(iteration, [model], "optimizer", context="any")
        deadline = time.monotonic() + 60
        while not (out / "hf" / "iter_0000020").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        flags.export_hf_model = None
        wrapped(30, [model], "optimizer")
    return saved


def test_megatron_lm_exports_what_it_saves(ranks: Ranks, models: dict, tmp_path: Path) -> None:
    for saved in ranks.call(2, in_megatron_lm, models["llama31"], tmp_path):
        assert saved == ["10 optimizer {'context': 'any'}", "20 optimizer {'context': 'any'}", "30 optimizer {}"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["iter_0000010", "iter_0000020"]
    assert contents(tmp_path / "hf" / "iter_0000010") == contents(tmp_path / "hf" / "iter_0000020")
