"""The example for Megatron-LM around stand-ins for the functions that it replaces: flags, when it exports, what ends training."""

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from megatron_export import ExportError, calibrate, save_calibration

from ..support.live import batches, loaded
from ..support.models import EXAMPLE, LENGTH, contents, read_json
from ..support.ranks import Ranks

MEGATRON_LM = EXAMPLE.parent / "export_in_megatron_lm.py"


class Args(argparse.Namespace):
    """The arguments of Megatron-LM that the example reads; no others are there."""


MEGATRON_LM_READS = {"save_interval": 10, "train_iters": 25, "overlap_param_gather": False, "seq_length": LENGTH}


def example_of_megatron_lm() -> Any:
    spec = importlib.util.spec_from_file_location("example", MEGATRON_LM)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


@contextmanager
def megatron_lm(provider_of: str) -> Iterator[dict[str, Any]]:
    """Stand-ins for modules of Megatron-LM that the example changes; `initialize` has its own name for `parse_args`, or not."""

    def parse_args(
        extra_args_provider: Callable | None = None, ignore_unknown_args: bool = False
    ) -> argparse.Namespace:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--save-interval", type=int)
        return (extra_args_provider(parser) if extra_args_provider else parser).parse_args(None)

    parts = {name: ModuleType(f"megatron.training.{name}") for name in ("arguments", "initialize", "training")}
    parts["arguments"].parse_args = parse_args
    if provider_of == "initialize":
        parts["initialize"].parse_args = parse_args
    parts["training"].checkpoint_and_decide_exit = lambda *args: False
    package = ModuleType("megatron.training")
    vars(package).update(parts)
    modules = {"megatron.training": package} | {f"megatron.training.{name}": one for name, one in parts.items()}
    with mock.patch.dict(sys.modules, modules):
        yield parts


@pytest.mark.parametrize("provider_of", ["initialize", "arguments"])
def test_megatron_lm_takes_the_flags_beside_those_of_other_providers(provider_of: str) -> None:
    def others(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--theirs", type=int)
        return parser

    command = [
        "pretrain_gpt.py",
        "--save-interval",
        "5",
        "--export-hf",
        "out",
        "--export-recipe",
        "nvfp4_mlp_only",
        "--theirs",
        "3",
    ]
    with megatron_lm(provider_of) as parts, mock.patch.object(sys, "argv", command):
        original = parts["training"].checkpoint_and_decide_exit
        example_of_megatron_lm().install()
        flags = parts[provider_of].parse_args(others)
        assert parts["training"].checkpoint_and_decide_exit is not original
    assert (flags.save_interval, flags.theirs, flags.export_hf, flags.export_recipe) == (
        5,
        3,
        Path("out"),
        "nvfp4_mlp_only",
    )
    assert flags.export_in_background and flags.export_interval is None


def in_megatron_lm(source: Path, out: Path) -> tuple[list[int], str, str]:
    """In a rank: what the example does around a stand-in for `checkpoint_and_decide_exit`: calls, what is printed, a refusal."""
    example = example_of_megatron_lm()
    called: list[int] = []
    (out / "hf" / "iter_0000020").mkdir(parents=True, exist_ok=True)
    (out / "hf" / "iter_0000020" / "precious").touch()
    optimizer = mock.Mock()
    with loaded(source, 2) as (model, _), redirect_stdout(io.StringIO()) as printed:

        def decide(chunks: object, optimizer: object, scheduler: str, iteration: int, *more: str) -> bool:
            called.append(iteration)
            return False

        def started(*flags: str, batches: Callable | None = None, **other: object) -> Callable[[int], bool]:
            parser = example.add_export_args(argparse.ArgumentParser())
            args = Args(**MEGATRON_LM_READS | other, **vars(parser.parse_args(flags)))
            example._flags = lambda: args
            wrapped = example.exporting(decide, batches)
            return lambda iteration: wrapped([model], optimizer, "scheduler", iteration, 1e9, {}, None)

        asked = ("--export-hf", f"{out}/hf", "--export-hf-model", f"{source}")
        step = started(*asked, batches=lambda: batches(source))
        assert [step(iteration) for iteration in (9, 10, 19, 20, 25)] == [False] * 5
        statistics, file = calibrate(model, batches(source)), out / os.environ["RANK"]
        if os.environ["RANK"] == "0":
            save_calibration(statistics, file, read_json(source / "config.json"))
        with pytest.raises(ExportError) as refusal:
            started(*asked, "--export-calibration", f"{file}")(1)
        optimizer.prepare_model_params_for_param_sync.assert_not_called()
        wait = ("--no-export-in-background", "--export-format", "bf16", "--export-interval", "3")
        with mock.patch.object(model, "start_param_sync", create=True) as sync:
            step = started(*asked[2:], "--export-hf", f"{out}/waited", *wait, overlap_param_gather=True)
            for iteration in range(1, 6):
                step(iteration)
        assert optimizer.prepare_model_params_for_param_sync.call_count == 2  # before the check, and before the export
        assert sync.call_args_list == [mock.call(force_sync=True)] * 2
        started()(30)
    return called, printed.getvalue(), str(refusal.value)


@pytest.mark.whole
def test_megatron_lm_exports_at_its_intervals_and_goes_on_where_that_fails(
    ranks: Ranks, models: dict, tmp_path: Path
) -> None:
    found = ranks.call(2, in_megatron_lm, models["llama31"], tmp_path)
    for called, _, refusal in found:
        assert called == [9, 10, 19, 20, 25, 1, 1, 2, 3, 4, 5, 30]
        assert refusal.startswith(f"no calibration file {tmp_path / '1'}")
    printed = [text for _, text, _ in found]
    assert printed[0].startswith("iteration 20 was not exported: ") and "iter_0000020 is not empty" in printed[0]
    assert len(printed[0].splitlines()) == 1 and printed[1] == ""
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["iter_0000010", "iter_0000020", "iter_0000025"]
    assert contents(tmp_path / "hf" / "iter_0000010") == contents(tmp_path / "hf" / "iter_0000025")
    assert [path.name for path in (tmp_path / "hf" / "iter_0000020").iterdir()] == ["precious"]
    assert [path.name for path in (tmp_path / "waited").iterdir()] == ["iter_0000003"]
