"""`peer`: the same model exported by this package and by NVIDIA ModelOpt, where it is installed, in the same run.

    launch/benchmark.py peer [--shape 8b | --hf-model DIR] [--formats fp8 nvfp4] [--json FILE]

One process, TP=1, the same weights. Seconds are without calibration: our statistics are made up, ModelOpt has seen a few tokens.
Neither side syncs what it wrote, and neither is warmed up. ModelOpt changes the model that it quantizes, so it comes second, and
every format begins with a new model. Of `--source transformers` ModelOpt's export leaves nothing, so it runs once.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_export.common.errors import ExportError
from megatron_export.common.optional import part

from .exporting import Case, add_common, case_of, refuse, row_of
from .measuring import Row, alone, delete, peaks_of, table, timed, write_rows
from .shapes import build, config_of, made_up, write_config

CONFIGS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
TOKENS = 64  # that ModelOpt's quantizers are shown
HYBRID = "megatron.core.models.hybrid"  # a package that ModelOpt imports and Megatron-Core 0.16 does not have


def add_peer(parser: argparse.ArgumentParser) -> None:
    """The flags of `peer`."""
    parser.set_defaults(run=peer, tp=1, pp=1, ep=1, etp=None, writers="rank0", alone=True)
    parser.add_argument("--formats", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="default: fp8 nvfp4")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[None], help="one or more, not as many as the model has"
    )
    add_common(parser)


def peer(flags: argparse.Namespace) -> None:
    """Measure both on one model, format by format."""
    parallel_state = part("mcore.parallel_state")

    quantization, peers = modelopt()
    alone()
    rows = []
    with TemporaryDirectory() as temporary:
        configs = [config_of(flags.shape, flags.hf_model, layers) for layers in flags.layers]
        cases = [case_of(flags, config, name, Path(temporary)) for config in configs for name in flags.formats]
        refuse(flags, cases)
        with parallel_state.started(1, 1, flags.device):
            for case in cases:
                rows += _rows(flags, case, write_config(Path(temporary), case.config), quantization, peers)
    print("\n".join(table(rows)), flush=True)
    if flags.json:
        write_rows(flags.json, rows)


def modelopt() -> tuple[ModuleType, ModuleType]:
    """ModelOpt's modules that quantize and export."""
    if find_spec("modelopt") is None:
        needed = "nvidia-modelopt omegaconf pulp pydantic requests"
        raise ExportError(f"ModelOpt is not installed here: pip install {needed}")
    if find_spec(HYBRID) is None:
        from megatron.core.models.mamba import MambaModel

        package, module = ModuleType(HYBRID), ModuleType(f"{HYBRID}.hybrid_model")
        package.__path__ = []
        module.HybridModel = MambaModel  # as it was called before
        sys.modules |= {package.__name__: package, module.__name__: module}
    import modelopt.torch.export as peers
    import modelopt.torch.quantization as quantization

    return quantization, peers


def _rows(
    flags: argparse.Namespace, case: Case, source: Path, quantization: ModuleType, peers: ModuleType
) -> list[Row]:
    """A row of each, from one model."""
    from megatron_export import export_hf_checkpoint
    from megatron_export.mcore import parallel_state
    from megatron_export.mcore.cpu_compat import without_cuda

    out = flags.output.resolve() / "run"
    with parallel_state.current() as here:
        device = here.device
        model = build(flags.source, case.config, here, TOKENS)
    statistics = made_up(case.told.plan)
    ours = partial(export_hf_checkpoint, model, out, hf_model=source, format=case.format, calibration=statistics)
    tool = "megatron_export" if flags.source == "megatron" else f"megatron_export, {flags.source}"
    rows = [_row(flags, case, tool, partial(ours, sync=False), out, device)]
    shown = torch.arange(TOKENS)[None]
    with without_cuda(device), torch.no_grad():
        settings = getattr(quantization, CONFIGS[case.format])
        if flags.source == "transformers":
            quantization.quantize(model, settings, lambda model: model(shown.to(device)))
            theirs = partial(peers.export_hf_checkpoint, model, export_dir=str(out))
            rows.append(_row(flags, case, "ModelOpt, transformers", theirs, out, device, repeat=1))
            return rows
        quantization.quantize(model, settings, lambda model: run_on(model, shown))
        theirs = partial(peers.export_mcore_gpt_to_hf, model, str(source), dtype=torch.bfloat16, export_dir=str(out))
        rows.append(_row(flags, case, "ModelOpt", theirs, out, device))
    return rows


def run_on(model: Any, ids: Tensor) -> None:
    """Run token ids [batch, tokens] through the model."""
    ids = ids.to(next(model.parameters()).device)
    tokens = ids.shape[1]
    places = torch.arange(tokens, device=ids.device).expand_as(ids)
    model(ids, places, torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=ids.device).triu(1))


def _row(
    flags: argparse.Namespace,
    case: Case,
    tool: str,
    work: Callable[[], object],
    out: Path,
    device: torch.device,
    repeat: int | None = None,
) -> Row:
    times: list[float] = []
    delete(out)  # of a run that was stopped
    gpu, host = peaks_of(lambda: times.append(timed(work)), device)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    delete(out)
    for _ in range((repeat or flags.repeat) - 1):
        times.append(timed(work))
        delete(out)
    how = {"ranks": "1", "writers": "rank0", "fsync": False, "saved": (), "wire": 0}
    return row_of(tool, case, device, written=written, times=tuple(times), gpu=gpu, host=host, **how)
