"""A checkpoint as `diff` reads it: each weight decoded as its own configs say, in ModelOpt's dialect or another that is known."""

from functools import partial

import torch
from torch import Tensor

from ..checkpoint.dialects import Dialect
from ..common.errors import ExportError
from ..common.piece import Piece
from ..common.safe_files import reason_of
from ..formats import SUFFIXES, TAILS, Form, module_of
from .detect_format import described
from .dialects import foreign
from .folder import Finished

CODED = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")  # dtypes that no weight has which is not quantized


def side_of(found: Finished) -> "Side":
    """The side that a checkpoint is; `ExportError` where its dialect is not known."""
    dialects = foreign(found)
    return Foreign(found, dialects) if dialects else Side(found)


class Side:
    """A checkpoint of this tool or of ModelOpt, or one that is not quantized.

    names  the weights that are compared: all but scales of weights
    """

    def __init__(self, found: Finished) -> None:
        self.found, self.said = found, described(found)
        self.names = {name for name in found if module_of(name)[1] in ("weight", name)}

    def tensors(self, name: str) -> dict[str, str]:
        """Name within its module -> tensor, of a weight and its scales."""
        module, local = module_of(name)
        if local != "weight":
            return {"weight": name}
        joint = "." if name.endswith(".weight") else "_"
        found = {suffix: f"{module}{joint}{suffix}" for suffix in SUFFIXES}
        found |= {suffix: module + tail for tail, suffix in TAILS.items() if module + tail in self.found}
        return {"weight": name} | {suffix: tensor for suffix, tensor in found.items() if tensor in self.found}

    def tile(self, name: str) -> int:
        """Strips of this many rows can be decoded alone."""
        form = self._form(name)
        return form.tile[0] if form else 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight before it was encoded."""
        shape, form = self.found.shape(name), self._form(name)
        if form is None:
            return shape
        codes = form.stored["weight"]
        return (shape[0] * codes.rows, shape[1] * codes.columns)

    def decoded(self, name: str, rows: slice) -> Tensor:
        """Some rows, float32."""
        form = self._form(name)
        if form is None:
            return self.found.read(name, rows).float()
        pieces, count = {}, self.shape(name)[0]
        for suffix, tensor in self.tensors(name).items():
            shape, each = self.found.shape(tensor), form.stored[suffix].rows if suffix in form.stored else None
            whole = each is None or not shape or shape[0] != -(-count // each)
            part = () if whole else (slice(rows.start // each, -(-rows.stop // each)),)
            pieces[suffix] = Piece(self.found.read(tensor, *part), ())
        try:
            return form.decode(pieces)
        except (KeyError, RuntimeError) as error:
            told = ", ".join(f"{suffix} {list(piece.data.shape)}" for suffix, piece in pieces.items())
            raise ExportError(
                f"{self.found.folder}: {name} cannot be decoded as {form.name} from {told} ({reason_of(error)}). Export it again"
            ) from error

    def _form(self, name: str) -> Form | None:
        """The format that decodes a weight; None for one that is not quantized, or stacked."""
        module, local = module_of(name)
        return self.said.forms.get(module) if local == "weight" and len(self.found.shape(name)) == 2 else None


class Foreign(Side):
    """A checkpoint in dialects of others, whose weights have the names that they would have without.

    `ExportError` for codes that none of the dialects decodes.
    """

    def __init__(self, found: Finished, dialects: tuple[Dialect, ...]) -> None:
        self.found = found
        self.kept = {name: one for one in dialects for name in self._kept_so(one)}
        parts = {name + suffix for name, dialect in self.kept.items() for suffix in dialect.tensors}
        odd = sorted(name for name in found if name not in parts and found.spelled(name) in CODED)
        unread = (suffix for one in dialects for suffix in one.unread)
        odd += sorted(name for name in found if name.endswith(tuple(unread)))
        if odd:
            raise ExportError(
                f"{found.folder} cannot be decoded: {odd[0]} ({found.spelled(odd[0])}) is not part of a weight that its "
                "quantization_config means, or what belongs to it is missing. Fetch the checkpoint again"
            )
        self.names = {name for name in found if name not in parts} | self.kept.keys()
        for name in self.kept:
            self._check(name)

    def _check(self, name: str) -> None:
        """That what a weight is kept in has the shapes that its codes mean."""
        dialect = self.kept[name]
        try:
            shapes = dialect.shapes(self.shape(name))
        except ValueError as error:
            raise ExportError(f"{self.found.folder}: tensor {name} {error}. Fetch the checkpoint again") from error
        for suffix, means in zip(dialect.tensors, shapes, strict=False):
            has = self.found.shape(name + suffix)
            if has != means and not torch.Size(has).numel() == torch.Size(means).numel() == 1:
                raise ExportError(
                    f"{self.found.folder}: tensor {name}{suffix} is {list(has)}, but {name}{dialect.codes} means {list(means)}. "
                    "Fetch the checkpoint again"
                )

    def _kept_so(self, dialect: Dialect) -> list[str]:
        """The weights of which all tensors of a dialect are there, in its dtypes."""
        found, sign = self.found, dialect.sign
        named = (name.removesuffix(sign) for name in found if name.endswith(sign))
        return [
            name
            for name in named
            if all(name + suffix in found for suffix in dialect.tensors)
            and all(found.spelled(name + suffix) in dtypes for suffix, dtypes in dialect.tensors.items())
            and len(found.shape(name + dialect.codes)) == 2
        ]

    def tensors(self, name: str) -> dict[str, str]:
        dialect = self.kept.get(name)
        return {suffix: name + suffix for suffix in dialect.tensors} if dialect else {"weight": name}

    def tile(self, name: str) -> int:
        return 1

    def shape(self, name: str) -> tuple[int, ...]:
        dialect = self.kept.get(name)
        return dialect.whole(self.found.shape(name + dialect.codes)) if dialect else self.found.shape(name)

    def decoded(self, name: str, rows: slice) -> Tensor:
        if name not in self.kept:
            return self.found.read(name, rows).float()
        try:
            return self.kept[name].read(partial(self._take, name), self.shape(name), (rows,)).float()
        except ValueError as error:
            raise ExportError(f"{self.found.folder}: tensor {name} {error}. Fetch the checkpoint again") from error

    def _take(self, name: str, suffix: str, where: tuple[slice, ...]) -> Tensor:
        return self.found.read(name + suffix, *(slice(cut.start, cut.stop) for cut in where))
