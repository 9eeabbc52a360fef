"""Where the tensors of an HF checkpoint lie on disk: in safetensors files, or where torch.distributed.checkpoint saved the state
dict of a model with HF's names (FSDP2, accelerate). Both are untrusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ..common.dtypes import dtype_names
from ..common.errors import ExportError, report
from ..common.safe_files import exists, opened, shown
from ..models import parameters_of
from .hf_folder import files_of
from .torch_dist_metadata import METADATA
from .torch_dist_storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

if TYPE_CHECKING:
    from safetensors import PySafeSlice, safe_open

ROTARY = "rotary_emb.inv_freq"  # which old files have, and everybody computes
_EMBEDDING = "embedding.word_embeddings.weight"
_TRAINING = ("optim", "lr_scheduler", "scheduler", "train_state", "dataloader", "rng_state", "scaler")
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile, and of activation checkpoints
_OTHERS = {  # the end of a key -> whose names these are
    "tok_embeddings.weight": "the names are torchtitan's own. Save it with checkpoint.last_save_in_hf of torchtitan, or convert it "
    "with its scripts/checkpoint_conversion/convert_to_hf.py, and give that folder as --hf-model",
    "word_embeddings.weight": "the names are Megatron's. Give it as --megatron-checkpoint",
}


class HfStorage(Protocol):
    """Tensors by name.

    homes  name -> the file that it is in, or begins in
    """

    folder: Path
    homes: dict[str, Path]

    def shape(self, name: str) -> list[int]: ...

    def dtype(self, name: str) -> str:
        """As safetensors spells it."""

    def part(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """What slices without steps select; the last dims may be left out."""

    def close(self) -> None:
        """Nothing is read any more."""


class SafetensorsFiles:
    """The safetensors files of a folder that hold tensors whose names begin with one of `only`."""

    def __init__(self, folder: Path, only: tuple[str, ...] = ("",)) -> None:
        """`ExportError` where the files and the index contradict each other."""
        self.folder, files = folder, files_of(folder)
        self.homes = {name: path for name, path in files.items() if name.startswith(only)}
        self.open, self.sizes = {}, {}
        for path in sorted(set(self.homes.values())):
            self.open[path] = opened(path)
            self.sizes[path] = path.stat().st_size
        seen: dict[str, Path] = {}
        for path, file in self.open.items():
            for name in file.keys():  # noqa: SIM118 - not a dict
                if seen.setdefault(name, path) is not path:
                    both = f"{seen[name].name} and in {path.name}"
                    raise ExportError(f"{folder}: tensor {name} is in {both}. Fetch both again")
        lost = ((name, path) for name, path in sorted(self.homes.items()) if seen.get(name) != path)
        said = [f"{path}: the index says that {name} is here. Fetch file and index again" for name, path in lost]
        odd = ((name, seen[name]) for name in sorted(seen.keys() - files.keys()) if not name.endswith(ROTARY))
        report(
            said + [f"{path}: {name} is here, and the index does not say so. Fetch both again" for name, path in odd]
        )

    def shape(self, name: str) -> list[int]:
        return self._header(name).get_shape()

    def dtype(self, name: str) -> str:
        return self._header(name).get_dtype()

    def part(self, name: str, where: tuple[slice, ...]) -> Tensor:
        return self._mapped(name).get_slice(name)[where] if where else self._mapped(name).get_tensor(name)

    def close(self) -> None:
        self.open.clear()

    def _header(self, name: str) -> PySafeSlice:
        """What the header says of a tensor."""
        return self.open[self.homes[name]].get_slice(name)

    def _mapped(self, name: str) -> safe_open:
        """The open file that holds a tensor. Files are mapped: if one got shorter, a read behind its end would kill the process."""
        path = self.homes[name]
        size = path.stat().st_size if path.exists() else 0
        if size != self.sizes[path]:
            raise ExportError(
                f"{path} changed while it was read: it has {size:,} bytes now, it had {self.sizes[path]:,}. Start again when "
                "nobody writes there"
            )
        return self.open[path]


class DcpFolder:
    """The tensors of the model in a folder that torch.distributed.checkpoint wrote; what else training keeps there is not read.

    The state dict may lie in tables, of which one key after the other is before all names (`model.`).
    """

    def __init__(self, folder: Path, config: dict) -> None:
        """`config` is config.json's dict of the model. `ExportError` where the model is not there once, or its files are not."""
        self.folder = folder
        if not exists(folder / METADATA):
            raise ExportError(f"--dcp-checkpoint {folder} {_without_metadata(folder)}")
        self.storage = Storage(folder, _TRAINING, _named)
        start = self._start(parameters_of(config)[_EMBEDDING].names()[""])
        found = self.storage.tensors.items()
        self.tensors = {name.removeprefix(start): one for name, one in found if name.startswith(start)}
        self.storage.check_files(self.tensors.values())
        self.homes = {
            name: folder / (tensor.chunks[0].place.file if tensor.chunks else METADATA)
            for name, tensor in self.tensors.items()
        }

    def _start(self, embedding: str) -> str:
        """What is before the names of the model."""
        names = self.storage.tensors
        starts = sorted(
            name.removesuffix(embedding) for name in names if name == embedding or name.endswith(f".{embedding}")
        )
        if len(starts) == 1:
            return starts[0]
        if starts:
            raise ExportError(
                f"{self.folder} has {len(starts)} models, whose names begin with {' and with '.join(map(shown, starts))}. Save one "
                "of them alone"
            )
        whose = (why for end, why in _OTHERS.items() if any(name.endswith(end) for name in names))
        first = ", ".join(shown(name)[1:-1] for name in list(names)[:3]) or "no tensor"
        raise ExportError(
            f"{self.folder}: there is no {embedding}, which config.json means, but {first} and so on: "
            + next(whose, "give the --hf-model that belongs to it, or save the model with HF's names")
        )

    def shape(self, name: str) -> list[int]:
        return list(self.tensors[name].shape)

    def dtype(self, name: str) -> str:
        dtype = self.tensors[name].dtype
        return dtype_names().get(dtype, str(dtype).removeprefix("torch."))

    def part(self, name: str, where: tuple[slice, ...]) -> Tensor:
        tensor = self.tensors[name]
        every = (*where, *[slice(None)] * (len(tensor.shape) - len(where)))
        cuts = tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(every, tensor.shape, strict=True))
        into = torch.empty([max(cut.stop - cut.start, 0) for cut in cuts], dtype=tensor.dtype)
        self.storage.read(tensor, (), cuts, into)
        return into

    def close(self) -> None:
        """No file is open between two reads."""


def _named(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _without_metadata(folder: Path) -> str:
    """What to say of a folder without `.metadata`."""
    if not exists(folder) or not folder.is_dir():
        return "is no folder. Give one that torch.distributed.checkpoint wrote"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{METADATA}"))
    if inner:
        return f"has no {METADATA}. Give one of the folders in it that have: {', '.join(inner[-5:])}"
    return f"has no {METADATA}, which torch.distributed.checkpoint writes last: it is no checkpoint, or saving it was interrupted"
