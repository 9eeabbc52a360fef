"""The HF model that an export takes config and tokenizer from, opened once."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..common.errors import ExportError
from ..common.file_names import CONFIG
from ..common.folder_kinds import has_weights
from ..common.safe_files import shown
from ..models import architecture_of, copied_prefixes, mtp_prefixes, parameters_of, settings_of, without_mtp
from ..models.predicting import own_of_mtp, with_mtp
from ..models.sources import stored_names
from ..planning.tensor_spec import Output
from .dialects import dialect_of
from .hf_folder import files_of, find_model, of_folder, quantized_as, read_config, with_copied
from .hf_storage import DcpFolder
from .hf_weights import SourceWeights, copied_tensors


@dataclass(frozen=True)
class Original:
    """folder   of the HF model
    config   config.json's dict, without the layers that `mtp` drops
    files    name -> bytes, and time of the last change, of every file in the folder
    copied   the tensors that Megatron's model does not have, which are copied as they are
    powers   names of weights whose values are e2m1 codes times a power of two that 32 inputs share, as MXFP4 has them
    wide     names of tensors that are in float32, and may stay so
    dropped  prefixes of the names of tensors that are left out
    dcp      the weights, if they are not in the folder but in one that torch.distributed.checkpoint wrote
    inputs   folders of the user that its files were taken from, if `folder` is none of his
    remarks  what the user should know of it, a sentence each
    derived  whether config.json was made of the settings of a Megatron checkpoint, and `folder` has at most a tokenizer
    """

    folder: Path
    config: dict
    files: dict[str, tuple[int, int]]
    copied: tuple[Output, ...]
    powers: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()
    dcp: DcpFolder | None = None
    inputs: tuple[Path, ...] = ()
    remarks: tuple[str, ...] = ()
    derived: bool = False

    @property
    def weights(self) -> Path | DcpFolder:
        """Where its tensors are."""
        return self.dcp or self.folder


def read_original(hf_model: str | Path, mtp: str, *, weights: bool, own: bool, dcp: Path | None = None) -> Original:
    """Open a folder or hub id; with `weights`, all its safetensors files are fetched, and not only those with copied tensors.

    `own`: the export reads its weights, if not now; else they come from Megatron, or from the folder `dcp`. `ExportError` as of
    `config_alone`.
    """
    original = config_alone(hf_model, mtp, weights=weights, own=own, dcp=dcp)
    prefixes = copied_prefixes(original.config)
    if original.dcp:
        return replace(original, files=of_folder(original.folder), copied=copied_tensors(original.dcp, prefixes))
    folder = with_copied(original.folder, hf_model, prefixes)
    return replace(original, folder=folder, files=of_folder(folder), copied=copied_tensors(folder, prefixes))


def config_alone(
    hf_model: str | Path, mtp: str, *, weights: bool = False, own: bool, dcp: Path | None = None
) -> Original:
    """The same from config.json and the names of tensors alone, without what is copied.

    All that an export refuses by config.json alone is refused here, for every command: `ExportError` for a folder that is no HF
    model, an unknown architecture, wrong settings, and weights that are quantized in a way that is not read. Of quantized weights
    that are, headers are read too, and what does not fit is refused. What config.json says of quantization is left out where no
    weights are read, and where none are beside it that could be.
    """
    folder = find_model(hf_model, weights=weights)
    read = own and has_weights(folder)
    config, remarks, dropped = read_config(folder, weights=read), (), ()
    if architecture_of(config).draft:
        raise ExportError(f"{folder} is a draft, which is exported from the model that it is trained in. Give its base")
    how = "" if read else quantized_as(folder, config)
    if not own and not how and config.get("quantization_config"):
        how = f"quant_method {shown(config['quantization_config'].get('quant_method'))}"
    if how:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        remarks = (f"{CONFIG} says {how}: that is left out, as it speaks of weights that are not read",)
    trained = DcpFolder(dcp, config) if dcp else None
    named = mtp == "drop" or own_of_mtp(architecture_of(config))  # else no file is opened for this
    names = trained.homes if trained else files_of(folder) if read and named else ()
    config = with_mtp(config, names)
    if mtp == "drop":
        dropped = mtp_prefixes(config, names)
        config = without_mtp(config)
    settings_of(config)
    powers = _powers(folder, config, dropped, read)
    wide = wide_in(trained or folder, config)
    return Original(folder, config, {}, (), powers, wide, dropped, dcp=trained, remarks=remarks)


def wide_in(place: Path | DcpFolder, config: dict) -> frozenset[str]:
    """The tensors that are float32 in the files of a folder, of those that an export keeps so; none where there are no files."""
    names = stored_names(config)
    if not names or (isinstance(place, Path) and not has_weights(place)):
        return frozenset()
    with SourceWeights(place, tuple(sorted(names))) as weights:
        return wide_of(weights, config)


def wide_of(weights: SourceWeights, config: dict) -> frozenset[str]:
    """The same of files that are open."""
    return frozenset(name for name in stored_names(config) & weights.files.keys() if weights.dtype(name) == "F32")


def _powers(folder: Path, config: dict, dropped: tuple[str, ...], read: bool) -> frozenset[str]:
    """`Original.powers`; of files that are `read`, by their headers, which are checked if config.json speaks of quantization."""
    dialect = dialect_of(config)
    if dialect is None:
        return frozenset()
    if not read:
        sources = (source for source in parameters_of(config).values() if dialect.powers and dialect.holds(source))
        return frozenset(name for s in sources for name in ([s.stack.name] if s.stack else s.names().values()))
    with SourceWeights(folder, config=config) as weights:
        weights.check_model(config, dropped)
        return weights.quantized if dialect.powers else frozenset()
