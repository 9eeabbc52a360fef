"""The HF model that an export takes config and tokenizer from, opened once."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..common.file_names import CONFIG
from ..common.folder_kinds import has_weights
from ..models import copied_prefixes, mtp_prefixes, settings_of, without_mtp
from ..planning.tensor_spec import Output
from .hf_folder import find_model, of_folder, quantized_as, read_config, with_copied
from .hf_weights import copied_tensors, files_of


@dataclass(frozen=True)
class Original:
    """folder   of the HF model
    config   config.json's dict, without the layers that `mtp` drops
    files    name -> bytes, and time of the last change, of every file in the folder
    copied   the tensors that Megatron's model does not have, which are copied as they are
    dropped  prefixes of the names of tensors that are left out
    remarks  what the user should know of it, a sentence each
    """

    folder: Path
    config: dict
    files: dict[str, tuple[int, int]]
    copied: tuple[Output, ...]
    dropped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def read_original(hf_model: str | Path, mtp: str, *, weights: bool, own: bool) -> Original:
    """Open a folder or hub id; with `weights`, all its safetensors files are fetched, and not only those with copied tensors.

    `own`: the export reads its weights, if not now; else they come from Megatron. `ExportError` as of `config_alone`.
    """
    original = config_alone(hf_model, mtp, weights=weights, own=own)
    prefixes = copied_prefixes(original.config)
    folder = with_copied(original.folder, hf_model, prefixes)
    return replace(original, folder=folder, files=of_folder(folder), copied=copied_tensors(folder, prefixes))


def config_alone(hf_model: str | Path, mtp: str, *, weights: bool = False, own: bool) -> Original:
    """The same from config.json and the names of tensors alone, without what is copied.

    All that an export refuses by config.json alone is refused here, for every command: `ExportError` for a folder that is no HF
    model, an unknown architecture, wrong settings, and weights that are quantized already. Where no weights are beside config.json,
    or none of them are read, what it says of their quantization is left out.
    """
    folder = find_model(hf_model, weights=weights)
    read = own and has_weights(folder)
    config, remarks, dropped = read_config(folder, weights=read), (), ()
    if not read and (how := quantized_as(folder, config)):
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        remarks = (f"{CONFIG} says {how}: that is left out, as it speaks of weights that are not read",)
    if mtp == "drop":
        dropped = mtp_prefixes(config, files_of(folder) if read else ())
        config = without_mtp(config)
    settings_of(config)
    return Original(folder, config, {}, (), dropped, remarks)
