"""Exports a quantized HuggingFace checkpoint whenever Megatron-LM saves its own. Put this into `pretrain_gpt.py`:

    from megatron.training import training
    from export_in_megatron_lm import add_export_args, exporting

    training.save_checkpoint_and_time = exporting(training.save_checkpoint_and_time)

before `pretrain`, and this folder on PYTHONPATH. The flags below are added by `pretrain` up to Megatron-Core 0.17,

    pretrain(..., extra_args_provider=add_export_args)

and from 0.18 on by the function that parses the arguments before it:

    args = parse_and_validate_args(..., extra_args_provider=add_export_args)

(`pretrain_gpt.py` gives that ModelOpt's provider; `lambda parser: add_export_args(add_modelopt_args(parser))` is both.)

With `--export-hf-model Qwen/Qwen3-8B --export-format fp8` every checkpoint of `--save DIR` has its export in DIR/hf/iter_N.
Training stops until the encoded model is in memory; another process writes it. An export that fails is told, and training goes on.
Only arguments that every version of `save_checkpoint_and_time` begins with are used.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_export import ExportError, Handle, calibrate, export_hf_checkpoint_async, load_calibration
from megatron_export.checkpoint.hf_folder import find_model, read_config
from megatron_export.common.errors import RankLost
from megatron_export.formats import FORMATS, KV_FORMATS, chosen


def add_export_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron-LM's `extra_args_provider`."""
    group = parser.add_argument_group("export to HuggingFace")
    group.add_argument(
        "--export-hf-model", help="original model, folder or hub id: config and tokenizer; turns exports on"
    )
    group.add_argument("--export-format", choices=FORMATS, default="fp8")
    group.add_argument("--export-kv-cache", choices=KV_FORMATS, default="none")
    group.add_argument(
        "--export-calibration", type=Path, help="statistics of --save-calibration, for formats that need them"
    )
    group.add_argument("--export-dir", type=Path, help="default: hf in the folder of --save")
    return parser


def exporting(save: Callable[..., Any], batches: Callable[[], list[Tensor]] | None = None) -> Callable[..., Any]:
    """Wrap Megatron-LM's `save_checkpoint_and_time`, so that an export follows. All ranks call it, as they do the original.

    `batches` gives token ids [batch, tokens] to calibrate each export with; without it --export-calibration serves them all.
    """
    running: list[tuple[int, Handle]] = []

    def save_and_export(iteration: int, model: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(iteration, model, *args, **kwargs)
        flags = _flags()
        if flags.export_hf_model:
            while running:
                earlier, handle = running.pop()
                with _survived(earlier):
                    handle.wait()  # it has ended long ago, or disks are slower than training
            with _survived(iteration):
                running.append((iteration, _export(iteration, model, flags, batches)))
        return saved

    return save_and_export


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


def _export(
    iteration: int, model: Any, flags: argparse.Namespace, batches: Callable[[], list[Tensor]] | None
) -> Handle:
    calibration = None
    if chosen(flags.export_format).calibrated or flags.export_kv_cache != "none":
        if batches:
            calibration = calibrate(model, batches(), format=flags.export_format)
        elif flags.export_calibration:
            calibration = _loaded(flags.export_calibration, flags.export_hf_model)
    folder = (flags.export_dir or Path(flags.save) / "hf") / f"iter_{iteration:07d}"
    return export_hf_checkpoint_async(
        model,
        folder,
        hf_model=flags.export_hf_model,
        format=flags.export_format,
        kv_cache=flags.export_kv_cache,
        calibration=calibration,
        keep_memory=True,
    )


def _loaded(file: Path, hf_model: str) -> dict[str, Tensor]:
    """The statistics of a file. If one rank cannot read it, no rank begins an export that would wait for that one."""
    found, said = {}, ""
    try:
        found = load_calibration(file, read_config(find_model(hf_model, weights=False), weights=False))
    except ExportError as error:
        said = str(error)
    everyone = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, said)
    if any(everyone):
        raise ExportError(next(filter(None, everyone)))
    return found


def _flags() -> argparse.Namespace:
    from megatron.training import get_args

    return get_args()
