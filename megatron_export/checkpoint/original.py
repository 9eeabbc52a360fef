"""The HF model that an export takes config and tokenizer from, opened once."""

from dataclasses import dataclass
from pathlib import Path

from ..models import architecture_of, copied_prefixes, mtp_prefixes, without_mtp
from ..planning.tensor_spec import Output
from .hf_folder import find_model, of_folder, read_config, with_copied
from .hf_weights import copied_tensors


@dataclass(frozen=True)
class Original:
    """folder   of the HF model
    config   config.json's dict, without the layers that `mtp` drops
    files    name -> bytes, and time of the last change, of every file in the folder
    copied   the tensors that Megatron's model does not have, which are copied as they are
    dropped  prefixes of the names of tensors that are left out
    """

    folder: Path
    config: dict
    files: dict[str, tuple[int, int]]
    copied: tuple[Output, ...]
    dropped: tuple[str, ...]


def read_original(hf_model: str | Path, mtp: str, *, weights: bool) -> Original:
    """Open a folder or hub id; with `weights`, all its safetensors files are fetched, and not only those with copied tensors.

    `ExportError` for a folder that is no HF model, an unknown architecture, and a model that is quantized already.
    """
    folder, config, dropped = config_of(hf_model, mtp, weights=weights)
    folder = with_copied(folder, hf_model, copied_prefixes(config))
    copied = copied_tensors(folder, copied_prefixes(config))
    return Original(folder, config, of_folder(folder), copied, dropped)


def config_of(hf_model: str | Path, mtp: str, *, weights: bool = False) -> tuple[Path, dict, tuple[str, ...]]:
    """The folder of a model, its config.json as an export with this `mtp` sees it, and prefixes of the names that are left out."""
    folder = find_model(hf_model, weights=weights)
    config = read_config(folder)
    architecture_of(config)  # first: of an unknown architecture, no key of config.json is known
    return (folder, without_mtp(config), mtp_prefixes(config)) if mtp == "drop" else (folder, config, ())
