"""What an export of a transformers model takes from beside its weights: its own configs, and the tokenizer from whoever has it."""

import json
import shutil
from pathlib import Path
from typing import Protocol

from torch import nn

from ..checkpoint.hf_folder import files_to_copy, find_model, of_folder, tokenizer_remarks
from ..checkpoint.original import Original
from ..common.dtypes import dtype_names
from ..common.errors import ExportError
from ..common.file_names import GENERATION_CONFIG
from ..models import ARCHITECTURES, architecture_of, mtp_prefixes, settings_of, without_mtp
from ..models.other import other_architecture
from ..models.registry import architecture_name, learn
from ..planning.tensor_spec import Output
from .copied import copied_tensors
from .model import bare, class_of, tensors_of


class Tokenizer(Protocol):
    """What `tokenizer=` may be, beside a folder: a tokenizer or processor of transformers."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write its files into a folder."""


def original_of(
    model: nn.Module, hf_model: str | Path | None, tokenizer: Tokenizer | str | Path | None, mtp: str, into: Path | None
) -> Original:
    """The original of a live model, whose files, but for tensors, are put into the folder `into`, if there is one.

    The tokenizer is that of `tokenizer`, an object or a folder, else of `hf_model`, else of the folder that the model came from.
    `ExportError` for an unknown architecture and wrong settings.
    """
    model = bare(model)
    config, dropped, remarks = config_of(model), (), ()
    named = Path(str(getattr(model, "name_or_path", "") or ""))
    home = named if str(named) != "." and named.is_dir() else None
    folder = find_model(hf_model, weights=False) if hf_model else home
    if isinstance(tokenizer, str | Path) and not Path(tokenizer).is_dir():
        raise ExportError(f"tokenizer {tokenizer}: no such folder. Give a folder, or a tokenizer of transformers")
    copied = tuple(
        Output(name, dtype_names()[tensor.dtype], tuple(tensor.shape))
        for name, tensor in copied_tensors(model, config).items()
    )
    if into:
        _put(model, [one for one in (folder, tokenizer) if one is not None], into)
    prefixes = mtp_prefixes(config)
    if prefixes and not any(name.startswith(prefixes) for name in tensors_of(model)):
        remarks = ("the model has no layers that predict one more token, which its config means: they are left out",)
    if mtp == "drop" or remarks:
        config, dropped = without_mtp(config), prefixes
    settings_of(config)
    if (name := architecture_name(config)) not in ARCHITECTURES:
        said = f"{name} is in no table here: its linears were found by name, and no rule of an engine knows it"
        remarks = (*remarks, said)
    if tokenizer is None and folder is None:
        remarks = (*remarks, "the model was given without a tokenizer, and engines want one. Give tokenizer=")
    elif into:
        remarks += tokenizer_remarks(into)
    inputs = tuple(Path(one) for one in (home, folder, tokenizer) if isinstance(one, str | Path))
    files = of_folder(into) if into else {}
    return Original(into or Path(), config, files, copied, dropped=dropped, inputs=inputs, remarks=remarks)


def config_of(model: nn.Module) -> dict:
    """config.json's dict as `save_pretrained` writes it, without quantization and heads of Medusa; `ExportError` for others."""
    found = json.loads(model.config.to_json_string())
    found = {
        key: value for key, value in found.items() if key not in ("quantization_config", "_name_or_path", "medusa")
    }
    found["architectures"] = [name := class_of(model)]
    inner = model.config.get_text_config()
    if (inner if hasattr(inner, "tie_word_embeddings") else model.config).tie_word_embeddings:
        found.setdefault("tie_word_embeddings", True)
    if name not in ARCHITECTURES:
        learn(name, other_architecture(name, tensors_of(model)))
    architecture_of(found)
    return found


def _put(model: nn.Module, origins: list[Tokenizer | str | Path], into: Path) -> None:
    """Put the files of these, the later ones in place of the earlier ones, and the model's generation config into a folder."""
    for one in origins:
        if isinstance(one, str | Path):
            for path in files_to_copy(Path(one)):
                shutil.copyfile(path, into / path.name)
        else:
            one.save_pretrained(str(into))
    if (generation := getattr(model, "generation_config", None)) is not None:
        (into / GENERATION_CONFIG).write_text(generation.to_json_string(), encoding="utf-8")
