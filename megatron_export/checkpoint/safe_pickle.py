"""Pickles, read without running, importing or calling anything that they name.

A pickle is a program that calls what it names. Here a name of a short list is a value; a name in a package whose objects are in
checkpoints is a `Name`, and calling it makes an `Inert`, which only keeps the arguments; any other name is an error. In 280 bytes a
pickle can hold a thing twice, that twice, and so on 45 times: what would walk through that, such as hashing it, is never done.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..common.safe_files import MOST_ELEMENTS, not_read, reason_of, shown

WAY_OUT = "Copy or save the checkpoint again, or do not trust it"
MOST_BYTES = 1 << 30  # of a pickle: the metadata of the largest model with its optimizer may have some hundred million
MOST_STEPS = 200_000_000  # of the program that it is; each takes up to 216 bytes of memory
MOST_MARKS = 1_000  # that are open at a time: lists and tuples in one another
MOST_VALUES, MOST_LEVELS = 10_000_000, 50  # of an object that is read as a whole
_MOST_TUPLES, _MOST_IN_TUPLE = 10_000, 16  # that are keys: their hashes can be chosen so that all are the same
_INERT = {  # packages whose objects are in checkpoints; nothing of them is needed
    *("argparse", "collections", "datetime", "enum", "functools", "lightning", "megatron", "modelopt", "nemo"),
    *("numpy", "omegaconf", "pathlib", "signal", "torch", "transformer_engine", "types", "_codecs", "copy_reg"),
}
_BUILTINS = ("bool", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")
_TABLES = ("collections.OrderedDict", "collections.defaultdict")
_SETS = ("builtins.set", "builtins.frozenset", "__builtin__.set", "__builtin__.frozenset")  # of pickle 3, and 2


@cache
def _dtypes() -> dict[str, torch.dtype]:
    """Of torch, by the names in pickles."""
    dtype = torch.dtype  # before what torch has is looked at: it may not be imported yet
    return {str(found): found for found in vars(torch).values() if isinstance(found, dtype)}


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    name: str


class Inert:
    """Stands for an object: the name of its class or function, the arguments, and the state that it was given."""

    def __init__(self, name: str, args: tuple) -> None:
        self.name, self.args, self.state = name, args, None

    def get(self, name: str) -> Any:
        """An attribute that it was saved with; `ValueError` if it has none."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"a {shown(self.name)[1:-1]} has no {name}")
        return self.state[name]


def unpickled(data: bytes) -> Any:
    """The object of a pickle. `ValueError` says why it is refused."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    try:
        return _Reader(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle may fail in any way
        raise ValueError(f"a damaged pickle: {type(error).__name__}: {reason_of(error)}") from error


def read_pickle(path: Path) -> Any:
    """The object of a file that pickle wrote."""
    with clear_errors(path), path.open("rb") as file:
        return unpickled(file.read(MOST_BYTES + 1))


def check_size(found: object) -> None:
    """`ValueError` for an object that would be larger than any in a checkpoint if it were written out."""
    level, count = [found], 0
    for _ in range(MOST_LEVELS):
        inner: list[object] = []
        for value in level:
            mine = _parts(value)
            count += len(mine)
            if count > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES:,} values")
            inner += mine
        level = inner
    if level:
        raise ValueError(f"more than {MOST_LEVELS} levels deep")


@contextmanager
def clear_errors(path: Path, way_out: str = WAY_OUT) -> Iterator[None]:
    """Why a file is not read becomes an `ExportError` about it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise not_read(path, "not read", error, way_out) from error


def is_sizes(found: object) -> bool:
    """Whether a value of a pickle can be sizes, offsets or strides."""
    return isinstance(found, tuple) and all(type(size) is int and 0 <= size <= MOST_ELEMENTS for size in found)


class _Reader(pickle._Unpickler):
    """In Python: the one in C, which is faster, takes as much memory as a few bytes of a pickle ask for.

    Each method that would call, hash or change what the pickle chooses is replaced.
    """

    tuples = 0  # that were keys
    dispatch = dict(pickle._Unpickler.dispatch)

    def load(self) -> Any:
        """The same loop, with a bound."""
        frames = pickle._Unframer(self._file_read, self._file_readline)
        self._unframer, self.read, self.readinto, self.readline = frames, frames.read, frames.readinto, frames.readline
        self.metastack, self.stack, self.proto = [], [], 0
        self.append = self.stack.append
        try:
            for _ in range(MOST_STEPS):
                self.dispatch[self.read(1)[0]](self)
        except pickle._Stop as stop:
            return stop.value
        raise ValueError(f"more than {MOST_STEPS:,} steps")

    def find_class(self, module: str, name: str) -> Any:
        named = f"{module}.{name}"
        if named in _dtypes():
            return _dtypes()[named]
        builtin = module in ("builtins", "__builtin__") and name in _BUILTINS
        # `getattr`: by which Python 3.11 named members of enums
        if not builtin and module.partition(".")[0] not in _INERT and name != "getattr":
            raise ValueError(f"it names {shown(named)}, which no checkpoint needs; nothing of it was run")
        return Name(named)

    def persistent_load(self, pid: Any) -> Any:
        """Of a tensor: ("storage", its kind, its file in the archive, device, how many numbers)."""
        return pid

    def get_extension(self, code: int) -> None:
        raise ValueError(f"it names extension {code}, which no checkpoint needs; nothing of it was run")

    def _load_call(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)

    def _load_call_with_keywords(self) -> None:
        self.stack.pop()  # not kept
        self._load_call()

    def _instantiate(self, klass: object, args: Iterable) -> None:
        self.append(self._made(klass, tuple(args)))

    def _made(self, called: object, args: object) -> Any:
        """What calling a name makes: a table, a set, a size, or what does nothing."""
        if not isinstance(called, Name) or not isinstance(args, tuple):
            raise ValueError(f"it calls {shown(called)}; nothing of it was run")
        if called.name in _TABLES:  # whose arguments are not kept
            return {}
        if called.name in _SETS and len(args) == 1 and isinstance(args[0], list | tuple):
            return set(map(self._key, args[0]))
        if called.name == "torch.Size" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        return Inert(called.name, args)

    def _load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):  # attributes of others, such as an OrderedDict's, are not kept
            self.stack[-1].state = state

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Inert):  # whose values are not kept
            raise ValueError(f"it adds to {shown(self.stack[-1])}")

    def _load_set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _load_set_items(self) -> None:
        self._fill(self.pop_mark())

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list) -> None:
        if isinstance(self.stack[-1], dict):
            keys = map(self._key, items[::2])
            self.stack[-1].update(zip(keys, items[1::2], strict=True))
        elif not isinstance(self.stack[-1], Inert):
            raise ValueError(f"it adds to {shown(self.stack[-1])}")

    def _load_add_items(self) -> None:
        items = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise ValueError(f"it adds to {shown(self.stack[-1])}")
        self.stack[-1].update(map(self._key, items))

    def _load_frozen_set(self) -> None:
        self.append(frozenset(map(self._key, self.pop_mark())))

    def _load_mark(self) -> None:
        if len(self.metastack) >= MOST_MARKS:
            raise ValueError(f"more than {MOST_MARKS:,} levels deep")
        self.load_mark()

    def _key(self, found: Any) -> Any:
        """A key of a table or set, if it is hashed at once: a text, a number, an object, or a tuple of a few of them."""
        if isinstance(found, tuple):
            self.tuples += 1
            flat = len(found) <= _MOST_IN_TUPLE and all(map(_is_flat, found))
        else:
            flat = _is_flat(found)
        if not flat or self.tuples > _MOST_TUPLES:
            raise ValueError(f"a key is {shown(found)}")
        return found

    for _code, _load in (
        (pickle.REDUCE, _load_call),
        (pickle.NEWOBJ, _load_call),
        (pickle.NEWOBJ_EX, _load_call_with_keywords),
        (pickle.BUILD, _load_build),
        (pickle.APPEND, _load_append),
        (pickle.APPENDS, _load_appends),
        (pickle.SETITEM, _load_set_item),
        (pickle.SETITEMS, _load_set_items),
        (pickle.DICT, _load_dict),
        (pickle.ADDITEMS, _load_add_items),
        (pickle.FROZENSET, _load_frozen_set),
        (pickle.MARK, _load_mark),
    ):
        dispatch[_code[0]] = _load


def _is_flat(found: object) -> bool:
    """Whether a value is hashed at once; few of the numbers have the same hash."""
    if isinstance(found, int):
        return -(1 << 63) <= found < 1 << 64
    return found is None or isinstance(found, str | bytes | float | torch.dtype | Name | Inert)


def _parts(found: object) -> list | tuple:
    """What a value holds."""
    if isinstance(found, dict):
        return (*found, *found.values())
    if isinstance(found, Inert):
        return (found.args, found.state)
    return found if isinstance(found, list | tuple) else tuple(found) if isinstance(found, set | frozenset) else ()
