"""What the command was given: the model's folder, its Megatron checkpoint and calibration data, looked at before any work."""

from pathlib import Path

from torch import Tensor

from ..calibration import data, statistics
from ..checkpoint.original import Original, read_original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..checkpoint.torch_dist_iteration import find_iteration
from ..common.errors import ExportError
from ..distributed.topology import Topology
from ..models import shape_of
from .config import ExportConfig


def original_of(config: ExportConfig, example_model: Path) -> Original:
    """The HF model, opened; with its weights where they are read from there."""
    if config.hf_model is None and not example_model.is_dir():
        said = "no example model beside this installation: give --hf-model, or run from a clone of the repository"
        raise ExportError(said)
    own = config.megatron_checkpoint is None
    return read_original(
        config.hf_model or example_model, config.request.mtp, weights=own and not config.dry_run, own=own
    )


def open_checkpoint(config: ExportConfig, hf_config: dict) -> MegatronCheckpoint | None:
    """The Megatron checkpoint that the weights come from, its names, shapes and settings checked."""
    if config.megatron_checkpoint is None:
        return None
    folder = find_iteration(config.megatron_checkpoint.resolve(), config.iteration)
    adapters = find_iteration(config.lora_checkpoint.resolve(), None) if config.lora_checkpoint else None
    settings = {"pp_layout": config.pp_layout, "merge_lora": config.request.merge_lora, "adapters": adapters}
    return MegatronCheckpoint(folder, hf_config, mtp_dropped=config.request.mtp == "drop", **settings)


def apart(config: ExportConfig) -> list[Path]:
    """What --output must lie apart from, beside the HF model."""
    given = (config.calib_data, config.load_calibration, config.megatron_checkpoint, config.lora_checkpoint)
    return [Path.cwd(), *(path for path in given if path)]


def check_saving(config: ExportConfig) -> None:
    """Refuse a --save-calibration that cannot be written, before any work."""
    if not config.save_calibration:
        return
    file = config.save_calibration.resolve()
    if file.is_dir() or not file.parent.is_dir():
        raise ExportError(f"--save-calibration {file}: give a file in a folder that exists")
    if file.exists():
        statistics.check_kind(file)
    if config.output and file.is_relative_to(config.output.resolve()):
        raise ExportError(
            f"--save-calibration {file} is inside --output, which is replaced whole: give a file elsewhere"
        )


def read_samples(config: ExportConfig, hf_config: dict, folder: Path, example_model: Path, here: Topology) -> Tensor:
    """The calibration data, int64 [samples, tokens]. `ExportError` where it does not fit the ranks or the vocabulary."""
    batches = -(-config.calib_samples // config.calib_batch_size)
    if batches < here.dp_size:
        raise ExportError(
            f"--calib-samples {config.calib_samples} of --calib-batch-size {config.calib_batch_size} make {batches} "
            f"micro-batch{'es' * (batches > 1)}, fewer than the {here.dp_size} data-parallel ranks. Ask for more samples "
            "or smaller batches"
        )
    exchanged = shape_of(hf_config).experts and config.ep * (config.etp or config.tp) > config.tp
    if exchanged and (batches % here.dp_size or config.calib_samples % config.calib_batch_size):
        raise ExportError(
            f"--ep {config.ep} spreads experts over data-parallel ranks, so each of these {here.dp_size} needs as many "
            f"micro-batches, all whole: --calib-samples {config.calib_samples} is no multiple of --calib-batch-size "
            f"{config.calib_batch_size} x {here.dp_size}"
        )
    file = config.calib_data or example_model / "calibration.txt"
    shape = {"samples": config.calib_samples, "length": config.calib_seq_len}
    samples = data.read_samples(file, folder, **shape, trust_remote_code=config.trust_remote_code)
    vocab = shape_of(hf_config).vocab  # Megatron's own is padded, and would take ids that the model does not have
    if samples.min() < 0 or samples.max() >= vocab:
        raise ExportError(
            f"{file}: token ids {int(samples.min())} to {int(samples.max())}, outside the model's vocabulary of {vocab}. "
            "Tokenize it for this model"
        )
    return samples


def provenance(config: ExportConfig, folder: Path) -> dict:
    """Where the model came from, and what it was calibrated with."""
    names = (
        "calib_data",
        "calib_samples",
        "calib_seq_len",
        "calib_batch_size",
        "calib_all_experts",
        "load_calibration",
    )
    trained = {name: getattr(config, name) for name in ("megatron_checkpoint", "iteration")}
    trained |= {"merge_lora": config.request.merge_lora or None, "lora_checkpoint": config.lora_checkpoint}
    trained = {name: value for name, value in trained.items() if value is not None}
    calibration = {name: getattr(config, name) for name in names}
    for said in (trained, calibration):
        said |= {name: str(value) for name, value in said.items() if isinstance(value, Path)}
    return {"hf_model": config.hf_model or str(folder), **trained, "calibration": calibration}
