"""What the command writes, tried before any work, and where the statistics are kept that it measured and could not use."""

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..calibration import statistics
from ..common.errors import ExportError
from ..common.safe_files import reason_of
from ..writing.journal import CALIBRATION, journal_of
from ..writing.target import check_writable
from . import hub
from .config import ExportConfig


def check(config: ExportConfig) -> None:
    """Refuse a --save-calibration that cannot be written, and a --push-to-hub that nobody may write to."""
    if config.save_calibration:
        _check_saving(config, config.save_calibration.resolve())
    if config.push_to_hub and not config.dry_run:
        hub.check(config.push_to_hub)


def _check_saving(config: ExportConfig, file: Path) -> None:
    if file.is_dir() or not file.parent.is_dir():
        raise ExportError(f"--save-calibration {file}: give a file in a folder that exists")
    if file.exists():
        statistics.check_kind(file)
    if config.output and file.is_relative_to(config.output.resolve()):
        raise ExportError(
            f"--save-calibration {file} is inside --output, which is replaced whole: give a file elsewhere"
        )
    check_writable(file.parent, statistics.partial_of(file).name, f"--save-calibration {file}")


def save_calibration(config: ExportConfig, known: dict[str, Tensor], hf_config: dict, measured: bool) -> None:
    """Write the statistics where they are asked for. What was `measured` and is not written there is kept beside --output.

    `ExportError`, which names the place, where they cannot be written.
    """
    if config.save_calibration:
        try:
            return statistics.save(known, config.save_calibration, hf_config)
        except (OSError, SafetensorError) as error:
            kept = _keep(config, known, hf_config) if measured else None
            said = f"--save-calibration {config.save_calibration} could not be written ({reason_of(error)})"
            raise ExportError(
                said + ("" if kept else ", and the statistics are lost: there is no place for them")
            ) from error
    if measured:
        _keep(config, known, hf_config)
    return None


def _keep(config: ExportConfig, known: dict[str, Tensor], hf_config: dict) -> bool:
    """Keep a calibration file until an export into --output is complete. Whether that could be done."""
    file = kept_file(config)
    with suppress(OSError, SafetensorError):
        file.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(known, file, hf_config)
        return True
    return False


def kept_file(config: ExportConfig) -> Path:
    """Where a calibration is kept for the next run."""
    return journal_of(config.output.resolve()) / CALIBRATION
