"""A finished checkpoint folder, opened as engines open it: every `.safetensors` file in it, whatever the index says.

What is wrong with the files themselves (broken, doubled, strays, another index) is collected, so that one pass can tell everything.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..common.dtypes import torch_dtypes
from ..common.errors import ExportError
from ..common.file_names import INDEX
from ..common.safe_files import check_readable, exists, inside, not_read, opened, read_index, read_table
from ..common.strips import strips_of


def tensor_files(folder: Path) -> list[Path]:
    """The files with tensors of a folder; `ExportError` where it has none."""
    if not exists(folder) or not folder.is_dir():
        raise ExportError(f"{folder} is not a folder. Give the folder of a checkpoint")
    check_readable(folder)
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ExportError(f"{folder}: no .safetensors file. Give the folder of a checkpoint")
    return [inside(folder, path.name) for path in found]


class Finished:
    """The tensors of a checkpoint, by name; slices are read from disk when asked for. `ExportError` if no file can be read.

    problems  what is wrong with its files
    lost      tensors that the index places in files that cannot be read
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.problems: list[str] = []
        self.lost: set[str] = set()
        self.open = {}
        paths = tensor_files(folder)
        broken = [path for path in paths if not self._open(path)]
        if len(broken) == len(paths):
            raise ExportError("\n".join(self.problems))
        self._compare_with_index({path.name for path in broken})

    def _open(self, path: Path) -> bool:
        try:
            self.open[path] = file = opened(path, "Copy or export it again")
        except ExportError as error:
            self.problems.append(str(error))
            return False
        for name in file.keys():  # noqa: SIM118 - not a dict
            if name in self.files:
                self.problems.append(f"{name} is in {self.files[name].name} and in {path.name}")
            self.files[name] = path
        return True

    def _compare_with_index(self, broken: set[str]) -> None:
        if not (self.folder / INDEX).is_file():
            return
        homes = read_index(self.folder)
        self.lost = {name for name, path in homes.items() if path.name in broken}
        for name, path in homes.items():
            if name in self.files and self.files[name].name != path.name:
                self.problems.append(f"{INDEX} says that {name} is in {path.name}; it is in {self.files[name].name}")
        strays = sorted({path.name for path in self.files.values()} - {path.name for path in homes.values()})
        self.problems += [f"{file} is not in {INDEX}, but engines read every .safetensors file" for file in strays]

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.open[self.files[name]].get_slice(name).get_shape())

    def spelled(self, name: str) -> str:
        """The dtype, as safetensors spells it."""
        return self.open[self.files[name]].get_slice(name).get_dtype()

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype; None for one that no checkpoint of these formats has."""
        return torch_dtypes().get(self.spelled(name))

    def nbytes(self) -> int:
        """Bytes of all files with tensors."""
        return sum(path.stat().st_size for path in self.open)

    def read(self, name: str, *where: slice) -> Tensor:
        """A tensor, or what `where` selects of it, as it is on disk."""
        file = self.open[self.files[name]]
        return file.get_slice(name)[where] if where and self.shape(name) else file.get_tensor(name)

    def strips(self, name: str) -> Iterator[Tensor]:
        """A tensor in strips of rows."""
        return (self.read(name, rows) for rows in strips_of(self.shape(name)))


def json_of(folder: Path, name: str) -> dict:
    """A JSON file of a folder; empty if there is none. `ExportError` if it is no table."""
    path = inside(folder, name)
    if not path.is_file():
        return {}
    try:
        return read_table(path)
    except (OSError, ValueError) as error:
        raise not_read(path, "not a JSON table", error, "Export it again") from error
