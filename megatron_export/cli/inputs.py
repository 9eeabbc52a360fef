"""What the command was given: the model's folder, its Megatron checkpoint and calibration data, looked at before any work."""

from pathlib import Path

from torch import Tensor

from ..calibration import data
from ..checkpoint.derived import derived_original
from ..checkpoint.hf_folder import tokenizer_remarks
from ..checkpoint.original import Original, read_original
from ..checkpoint.torch_dist import MegatronCheckpoint
from ..checkpoint.torch_dist_iteration import find_iteration
from ..common.errors import ExportError
from ..distributed.topology import Topology
from ..models import shape_of
from ..models.hf_config import text_of
from ..verify import perplexity
from .config import MEGATRON, TRANSFORMERS, ExportConfig, beyond, sample_length

SAMPLES = 128  # without --calib-samples


def original_of(config: ExportConfig, example_model: Path) -> Original:
    """The HF model, opened; with its weights where they are read from there."""
    if config.megatron_checkpoint and config.hf_model is None:
        return derived_of(config)
    if config.hf_model is None and not example_model.is_dir():
        said = "no example model beside this installation: give --hf-model, or run from a clone of the repository"
        raise ExportError(said)
    own, judged = not (config.megatron_checkpoint or config.dcp_checkpoint), config.verify or config.report
    weights = not config.dry_run and (own or judged)
    dcp = config.dcp_checkpoint.resolve() if config.dcp_checkpoint else None
    return read_original(config.hf_model or example_model, config.request.mtp, weights=weights, own=own, dcp=dcp)


def derived_of(config: ExportConfig) -> Original:
    """What the settings of a Megatron checkpoint say alone. Where they fit several architectures, its tensors are asked too."""

    def fits(hf_config: dict) -> bool:
        try:
            open_checkpoint(config, hf_config)
        except ExportError:
            return False
        return True

    return derived_original(
        find_iteration(config.megatron_checkpoint.resolve(), config.iteration),
        tokenizer=config.tokenizer,
        architecture=config.architecture,
        values=config.keys(),
        mtp=config.request.mtp,
        fits=fits,
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
    given += (config.dcp_checkpoint,)
    return [Path.cwd(), *(path for path in given if path)]


def check_text(config: ExportConfig, reference: Path) -> None:
    """Refuse a --verify-text that cannot be scored, before any work."""
    if config.verify_text and not config.dry_run:
        perplexity.check_text(config.verify_text, reference, "--verify-text")


def read_samples(config: ExportConfig, hf_config: dict, folder: Path, example_model: Path, here: Topology) -> Tensor:
    """The calibration data, int64 [samples, tokens]. `ExportError` where it does not fit the model or the ranks.

    Without --calib-samples there are 128, or as many as the data has and the ranks can share.
    """
    file = config.calib_data or example_model / "calibration.txt"
    shape = {"samples": config.calib_samples or SAMPLES, "length": sample_length(config, hf_config)}
    fewer = config.calib_samples is None
    samples = data.read_samples(file, folder, **shape, trust_remote_code=config.trust_remote_code, fewer=fewer)
    most = text_of(hf_config).get("max_position_embeddings")
    if most and samples.shape[1] > most:
        raise ExportError(f"{file}: samples of {samples.shape[1]} tokens, {beyond(most)}. Give shorter ones")
    _, replicas = replica(config, here)
    alike, step = _alike(config, hf_config, replicas), config.calib_batch_size * replicas
    if fewer and alike and len(samples) >= step:
        samples = samples[: len(samples) // step * step]
    _check_shared(config, len(samples), alike, replicas)
    vocab = shape_of(hf_config).vocab  # Megatron's own is padded, and would take ids that the model does not have
    if samples.min() < 0 or samples.max() >= vocab:
        raise ExportError(
            f"{file}: token ids {int(samples.min())} to {int(samples.max())}, outside the model's vocabulary of {vocab}. "
            "Tokenize it for this model"
        )
    return samples


def remarks(config: ExportConfig, folder: Path, samples: Tensor | None) -> tuple[str, ...]:
    """What the user should know of what was given: no tokenizer, fewer samples than usual."""
    alone = config.megatron_checkpoint is not None and config.hf_model is None  # of which the original says it
    said = () if alone else tokenizer_remarks(folder)
    if samples is not None and config.calib_samples is None and len(samples) < SAMPLES:
        said += (f"calibrated on {len(samples)} samples of {samples.shape[1]} tokens, as the data has no more",)
    return said


def replica(config: ExportConfig, here: Topology) -> tuple[int, int]:
    """Which of how many shares of the calibration data is this rank's."""
    return (here.rank, here.world) if config.engine == TRANSFORMERS else (here.dp_rank, here.dp_size)


def _alike(config: ExportConfig, hf_config: dict, replicas: int) -> str:
    """Why all data-parallel ranks need as many micro-batches; "" if they do not."""
    if config.engine == TRANSFORMERS:
        return "FSDP2 gathers each layer on all ranks at once" if replicas > 1 else ""
    exchanged = bool(shape_of(hf_config).experts) and config.ep * (config.etp or config.tp) > config.tp
    return f"--ep {config.ep} spreads experts over data-parallel ranks" if exchanged else ""


def _check_shared(config: ExportConfig, samples: int, alike: str, replicas: int) -> None:
    """`ExportError` unless data-parallel ranks can share the samples; `alike`: why they need as many micro-batches."""
    batches = -(-samples // config.calib_batch_size)
    if batches < replicas:
        raise ExportError(
            f"--calib-samples {samples} of --calib-batch-size {config.calib_batch_size} make {batches} "
            f"micro-batch{'es' * (batches > 1)}, fewer than the {replicas} data-parallel ranks. Ask for more samples or smaller "
            "batches"
        )
    if alike and (batches % replicas or samples % config.calib_batch_size):
        raise ExportError(
            f"{alike}, so each of these {replicas} needs as many "
            f"micro-batches, all whole: --calib-samples {samples} is no multiple of --calib-batch-size "
            f"{config.calib_batch_size} x {replicas}"
        )


def provenance(config: ExportConfig, original: Original) -> dict:
    """Where the model came from, and what it was calibrated with."""
    names = (
        "calib_data",
        "calib_samples",
        "calib_seq_len",
        "calib_batch_size",
        "calib_all_experts",
        "load_calibration",
    )
    trained = {name: getattr(config, name) for name in ("megatron_checkpoint", "iteration", "dcp_checkpoint")}
    trained |= {"engine": config.engine if config.engine != MEGATRON else None}
    trained |= {"merge_lora": config.request.merge_lora or None, "lora_checkpoint": config.lora_checkpoint}
    trained = {name: value for name, value in trained.items() if value is not None}
    calibration = {name: getattr(config, name) for name in names}
    calibration["calib_seq_len"] = sample_length(config, original.config)
    for said in (trained, calibration):
        said |= {name: str(value) for name, value in said.items() if isinstance(value, Path)}
    if original.derived:
        alone = {
            name: getattr(config, name)
            for name in ("tokenizer", "architecture", "config_value")
            if getattr(config, name)
        }
        return {"config": "made of the settings of the checkpoint", **alone, **trained, "calibration": calibration}
    return {"hf_model": config.hf_model or str(original.folder), **trained, "calibration": calibration}
