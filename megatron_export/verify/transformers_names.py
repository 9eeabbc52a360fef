"""The tensors of a checkpoint folder, asked for by the names that they have in transformers' modules.

An architecture says where the two differ (`on_disk`), and which tensors a model of text alone does not need (`copied`). And

    experts.gate_up_proj.K.weight_scale     is number K of the stack experts.gate_up_proj_weight_scale, its dims swapped

a name of emulated_experts.py, for experts that transformers does not take apart.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.hf_weights import SourceWeights
from ..common.errors import ExportError
from ..common.safe_files import inside, opened
from ..models import Architecture
from ..models.predicting import own_of_mtp
from .folder import tensor_files

CODES = (torch.uint8, torch.float8_e4m3fn)
_OF_STACK = re.compile(r"(.+\.experts\.(?:gate_up|down)_proj)\.(\d+)\.(\w+)")


def files_of(folder: Path) -> list[Path]:
    """The files with tensors of a folder that none of its links leads out of; `ExportError` where it has none."""
    return [inside(folder, path.name) for path in tensor_files(folder)]


class Respelled:
    """The tensors of a folder's files; `left` names, as the files do, those that nobody took.

    `architecture` is None for one that is not in the table, whose names are taken to be the same.
    """

    def __init__(self, files: list[Path], architecture: Architecture | None, device: torch.device | str) -> None:
        self.folder = files[0].parent
        self.architecture = architecture
        self.unread = (*architecture.copied, *own_of_mtp(architecture)) if architecture else ()
        self.tensors: dict[str, Tensor] = {}
        for path in files:
            file = opened(path)
            names = [name for name in file.keys() if not name.startswith(self.unread)]  # noqa: SIM118
            if twice := self.tensors.keys() & names:
                raise ExportError(f"{path}: tensor {min(twice)} is in another file too. Fetch both again")
            self.tensors |= {name: file.get_tensor(name).to(device) for name in names}
        self.left = set(self.tensors)

    def multiply_out(self, config: dict) -> None:
        """Put the weights of an original, which are quantized as its config.json says, in the place of what they are kept in."""
        with SourceWeights(self.folder, config=config) as weights:
            for name in weights.quantized:
                kept = [self.tensors.pop(name + suffix, None) for suffix in weights.dialect.tensors]
                self.tensors[name] = weights.read(name, (), torch.bfloat16).to(kept[0].device)
        self.left = set(self.tensors)

    def on_disk(self, name: str) -> str:
        """How the files spell a name of transformers."""
        if found := _OF_STACK.fullmatch(name):
            stack, _, leaf = found.groups()
            name = stack if leaf == "weight" else f"{stack}_{leaf}"
        return self.architecture.name_on_disk(name) if self.architecture else name

    def is_copied(self, name: str) -> bool:
        """Whether what transformers calls so is not of the language model, so that it was copied."""
        return self.on_disk(name).startswith(self.unread)

    def __contains__(self, name: str) -> bool:
        return self.on_disk(name) in self.tensors

    def quantized(self, module: str, scales: Iterable[str]) -> bool:
        """Whether the weight of a linear is there in codes, or any of its `scales` is there."""
        name = f"{module}.weight"
        coded = name in self and self.tensors[self.on_disk(name)].dtype in CODES
        return coded or any(f"{module}.{suffix}" in self for suffix in scales)

    def turned(self, name: str, memory: Tensor) -> bool:
        """Whether a stack is there in another shape than in memory; transformers too goes by the shape alone."""
        return name in self and self.tensors[self.on_disk(name)].shape != memory.shape

    def check_counts(self, names: list[str], count: int) -> None:
        """`ExportError` where one of these stacks is there and is not one of `count` experts."""
        for name in (self.on_disk(name) for name in names if name in self):
            held = self.tensors[name]
            if held.numel() > 1 and len(held) != count:
                raise ExportError(
                    f"{self.folder}: tensor {name} is of {len(held)} experts, config.json has {count}. Fetch both again"
                )

    def take(self, name: str) -> Tensor:
        """A tensor that is there; of a stack what belongs to one expert, as it would stand alone: [out, in], [in], []."""
        found = self.tensors[self.on_disk(name)]
        self.left.discard(self.on_disk(name))
        if not (place := _OF_STACK.fullmatch(name)) or found.numel() == 1:
            return found
        mine = found[int(place[2])]
        return mine.T if mine.dim() == 2 else mine
