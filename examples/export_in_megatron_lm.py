"""Exports quantized HuggingFace checkpoints while Megatron-LM trains. It is started in the place of the training script:

    torchrun ... examples/export_in_megatron_lm.py /path/to/Megatron-LM/pretrain_gpt.py ALL ITS FLAGS \\
        --export-hf export/run --export-hf-model Qwen/Qwen3-8B --export-format fp8 --export-interval 1000

or in a script of your own, with this folder on PYTHONPATH, by two lines before its arguments are parsed:

    from export_in_megatron_lm import install
    install()

After every 1000th step, and after the last one, the model is exported to export/run/iter_N; checkpoints of `--save` are as without.
Training stops until the encoded model is in memory; another process writes it. What can be refused of the flags is refused after
the first step; an export that fails later is told, and training goes on. Seen with Megatron-LM's core_r0.16 and its main after
core_r0.19: `install` replaces two functions that both have, `parse_args` and `checkpoint_and_decide_exit`.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_export import (
    ExportError,
    Handle,
    calibrate,
    export_hf_checkpoint,
    export_hf_checkpoint_async,
    load_calibration,
    plan_hf_tensors,
)
from megatron_export.calibration.data import read_samples
from megatron_export.checkpoint.hf_folder import find_model, read_config
from megatron_export.common.errors import RankLost, message_of
from megatron_export.formats import FORMATS, KV_FORMATS
from megatron_export.planning.request import Request

Batches = Callable[[], list[Tensor]]
Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def install(batches: Batches | None = None) -> None:
    """Let Megatron-LM know the flags below, and export after its steps.

    `batches` gives token ids [batch, tokens] to calibrate each export with, in the place of --export-calib-data.
    """
    from megatron.training import arguments, initialize, training

    parse = arguments.parse_args

    @wraps(parse)
    def parse_args(extra_args_provider: Provider | None = None, ignore_unknown_args: bool = False) -> Any:
        def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return add_export_args(extra_args_provider(parser) if extra_args_provider else parser)

        return parse(provider, ignore_unknown_args)

    for module in (arguments, initialize):  # the latter up to core_r0.17
        if "parse_args" in vars(module):
            module.parse_args = parse_args
    training.checkpoint_and_decide_exit = exporting(training.checkpoint_and_decide_exit, batches)


def add_export_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`."""
    group = parser.add_argument_group("export to HuggingFace")
    add = group.add_argument
    add("--export-hf", type=Path, metavar="DIR", help="turns exports on: each goes to its own folder DIR/iter_N")
    add("--export-hf-model", help="original model, folder or hub id: config and tokenizer")
    add("--export-interval", type=int, metavar="N", help="export after every N steps (default: --save-interval)")
    formats = group.add_mutually_exclusive_group()
    formats.add_argument(
        "--export-format", choices=FORMATS, help="of all linears (default: fp8, or that of ModelOpt's quantizers)"
    )
    formats.add_argument("--export-recipe", help="a format for each module: a name in docs/recipes.md, or FILE.yaml")
    add("--export-kv-cache", choices=KV_FORMATS, help="format of the KV cache")
    add("--export-calibration", type=Path, metavar="FILE", help="statistics of --save-calibration, for all exports")
    add(
        "--export-calib-data",
        type=Path,
        metavar="FILE",
        help="text or token ids (.safetensors) to calibrate each export with",
    )
    add("--export-calib-samples", type=int, default=128, help="samples of --seq-length tokens (default: 128)")
    add(
        "--no-export-in-background",
        dest="export_in_background",
        action="store_false",
        help="let training wait until each export is written, which keeps a few buffers in memory and not the whole export",
    )
    add("--export-overwrite", action="store_true", help="replace exports that a run before this one has written")
    return parser


def exporting(decide: Callable[..., bool], batches: Batches | None = None) -> Callable[..., bool]:
    """Wrap Megatron-LM's `checkpoint_and_decide_exit`, which all ranks call after each step, so that exports follow it."""
    exports = _Exports(batches)

    def decide_and_export(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> bool:
        exits = decide(model, optimizer, scheduler, iteration, *args, **kwargs)
        flags = _flags()
        if flags.export_hf:
            exports.after(iteration, model, optimizer, flags, bool(exits))
        return exits

    return decide_and_export


@dataclass
class _Exports:
    """The exports of one training run. All methods are collective."""

    batches: Batches | None
    checked: bool = False
    running: list[tuple[int, Handle]] = field(default_factory=list)

    def after(self, iteration: int, model: Any, optimizer: Any, flags: argparse.Namespace, exits: bool) -> None:
        """What follows a step: a check of the flags after the first, an export where one is due, the end of the one before."""
        if (flags.export_calib_data or flags.export_calibration) and not flags.export_hf_model:
            raise ExportError("--export-calib-data and --export-calibration need --export-hf-model PATH_OR_ID")
        if _interval(flags) < 1:
            raise ExportError("--export-hf needs --export-interval N, or --save-interval N")
        last = exits or iteration == flags.train_iters
        due = last or iteration % _interval(flags) == 0
        if flags.overlap_param_gather and (due or not self.checked):
            _send_weights(model, optimizer)
        if not self.checked:
            self._check(model, flags)
            self.checked = True
        if due:
            self._finish()
            with _survived(iteration):
                self._export(iteration, model, flags)
        if last:
            self._finish()

    def _export(self, iteration: int, model: Any, flags: argparse.Namespace) -> None:
        asked = _asked(flags) | {"calibration": self._statistics(model, flags), "overwrite": flags.export_overwrite}
        folder = flags.export_hf / f"iter_{iteration:07d}"
        if flags.export_in_background:
            self.running.append((iteration, export_hf_checkpoint_async(model, folder, keep_memory=True, **asked)))
        else:
            export_hf_checkpoint(model, folder, **asked)

    def _finish(self) -> None:
        """Wait for the export before; it has ended long ago, or disks are slower than training."""
        while self.running:
            iteration, handle = self.running.pop()
            with _survived(iteration):
                handle.wait()

    def _statistics(self, model: Any, flags: argparse.Namespace) -> dict[str, Tensor] | None:
        if flags.export_calibration:
            return _on_all(lambda: load_calibration(flags.export_calibration, _config(flags)))
        batches = self.batches() if self.batches else _batches(flags)
        formats = _on_all(lambda: _formats(flags))
        return calibrate(model, batches, format=formats) if batches and formats else None

    def _check(self, model: Any, flags: argparse.Namespace) -> None:
        """`ExportError` for what no export could be made of, so that training ends in its first step and not in its last."""
        measured = self.batches is not None or flags.export_calib_data is not None
        statistics = self._statistics(model, flags) if measured or flags.export_calibration else None
        plan_hf_tensors(model, calibration=statistics, **_asked(flags))


def _send_weights(model: Any, optimizer: Any) -> None:
    """Send the optimizer's new weights, which --overlap-param-gather puts off, as Megatron-LM does before it saves."""
    if hasattr(optimizer, "prepare_model_params_for_param_sync"):  # after core_r0.19
        optimizer.prepare_model_params_for_param_sync()
    for chunk in model:
        chunk.start_param_sync(force_sync=True)


@contextmanager
def _survived(iteration: int) -> Iterator[None]:
    """Training goes on without an export that failed, unless a rank is gone; rank 0 says why."""
    try:
        yield
    except RankLost:
        raise
    except ExportError as error:
        if torch.distributed.get_rank() == 0:
            print(f"iteration {iteration} was not exported: {error}", flush=True)


def _asked(flags: argparse.Namespace) -> dict[str, Any]:
    """Keywords of an export, of those flags that were given."""
    named = {
        "hf_model": flags.export_hf_model,
        "format": flags.export_format,
        "recipe": flags.export_recipe,
        "kv_cache": flags.export_kv_cache,
    }
    return {name: value for name, value in named.items() if value is not None}


def _interval(flags: argparse.Namespace) -> int:
    return flags.export_interval or flags.save_interval or 0


def _formats(flags: argparse.Namespace) -> list[str]:
    """The formats that statistics are measured for; none where the export needs none."""
    options = {name: value for name, value in _asked(flags).items() if name != "hf_model"}
    request = Request(**options).plain()
    forms = request.forms()
    return list(forms) if request.kv() or any(form.calibrated for form in forms.values()) else []


def _config(flags: argparse.Namespace) -> dict[str, Any]:
    return read_config(find_model(flags.export_hf_model, weights=False), weights=False)


def _batches(flags: argparse.Namespace) -> list[Tensor]:
    """Samples of --export-calib-data, one in each batch, the same on all ranks."""
    if flags.export_calib_data is None:
        return []
    sizes = {"samples": flags.export_calib_samples, "length": flags.seq_length, "fewer": True}

    def read() -> Tensor:
        return read_samples(flags.export_calib_data, find_model(flags.export_hf_model, weights=False), **sizes)

    return list(_on_all(read).split(1))


def _on_all(read: Callable[[], Any]) -> Any:
    """What every rank reads from its disk. If one cannot, no rank begins an export that would wait for that one."""
    found, said = None, ""
    try:
        found = read()
    except Exception as error:  # noqa: BLE001 - the others wait for this rank
        said = message_of(error)
    everyone = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, said)
    if any(everyone):
        raise ExportError(next(filter(None, everyone)))
    return found


def _flags() -> argparse.Namespace:
    from megatron.training import get_args

    return get_args()


def main() -> None:
    """Run a script of Megatron-LM with the flags above beside its own."""
    parser = argparse.ArgumentParser(description="Start a training script of Megatron-LM that exports, too.")
    parser.add_argument("script", type=Path, help="pretrain_gpt.py of Megatron-LM")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, help="all of its flags, and those of exports: --export-hf DIR ..."
    )
    asked = parser.parse_args()
    sys.argv = [str(asked.script), *asked.flags]
    sys.path[0] = str(asked.script.resolve().parent)
    install()
    runpy.run_path(str(asked.script), run_name="__main__")


if __name__ == "__main__":
    main()
