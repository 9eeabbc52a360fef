"""One safetensors file: the header, known from the plan, and tensors that threads write chunk by chunk. Source: file format 0.3."""

import json
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from math import prod
from operator import itemgetter

from ..common.dtypes import SIZES
from ..planning.tensor_spec import Output
from .byte_sink import Sheet
from .crc32 import crc32, joined_crc32
from .journal import Checks

_FIRST = '"__metadata__":{"format":"pt"}'
_quoted = json.encoder.encode_basestring_ascii


def header_of(outputs: Iterable[Output]) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds these tensors (8-byte length, JSON), and the byte at which each of them starts in the file.

    Tensors stand in the given order, so that the file grows from its start. Those whose size is no multiple of 8 bytes come last,
    from large dtypes to small ones, so that every tensor is aligned.
    """
    entries, starts, offset = [_FIRST], {}, 0
    told = [(output.name, *_told(output.dtype, output.shape)) for output in outputs]
    for name, _, nbytes, said in sorted(told, key=itemgetter(1)):
        end = offset + nbytes
        entries.append(f"{_quoted(name)}:{{{said}:[{offset},{end}]}}")
        starts[name], offset = offset, end
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: start + 8 + len(text) for name, start in starts.items()}


def file_bytes(outputs: Sequence[Output]) -> int:
    """Bytes of that file, with its header, of which only the length is found out: a large model has 200,000 tensors."""
    names = sum(len(_quoted(output.name)) for output in outputs)
    told = sorted((_told(output.dtype, output.shape) for output in outputs), key=itemgetter(0))
    places = list(accumulate((nbytes for _, nbytes, _ in told), initial=0))
    digits = list(map(len, map(str, places)))
    said = sum(len(one) + len(",:{:[,]}") for _, _, one in told) + sum(digits[:-1]) + sum(digits[1:])
    length = len(_FIRST) + len("{}") + names + said
    return 8 + -(-length // 8) * 8 + places[-1]


@cache
def _told(dtype: str, shape: tuple[int, ...]) -> tuple[int, int, str]:
    """Of a tensor, its turn in the file, its bytes, and what a header says of it up to its place."""
    nbytes = SIZES[dtype] * prod(shape)
    said = json.dumps({"dtype": dtype, "shape": shape}, separators=(",", ":"))
    return nbytes % 8 and 8 - SIZES[dtype], nbytes, f'{said[1:-1]},"data_offsets"'


class SafetensorsFile:
    """A file while it is written: what of it is there, with which checksums. Several threads write it, and others read it."""

    def __init__(
        self,
        name: str,
        sheet_of: Callable[[int], Sheet],
        outputs: tuple[Output, ...],
        slices: dict[str, int],
        checked: bool,
    ) -> None:
        self.name = name
        self.outputs = {output.name: output for output in outputs}
        self.slices = slices
        self.checked = checked
        header, self.starts = header_of(outputs)
        self.left = sum(output.nbytes for output in outputs)
        self.sheet = sheet_of(len(header) + self.left)
        self.sheet.write(header, 0)
        self.changed = threading.Condition()
        self.frontier = len(header)  # all before it is written
        self.awaited = 0  # what the one reader of the file waits for
        self.ahead: dict[int, int] = {}  # what is written after it: start -> end
        self.crcs: dict[tuple[str, int], dict[int, tuple[int, int]]] = defaultdict(dict)  # by chunk: crc32, length
        self.abandoned = False

    def write(self, output: Output, start: int, data: memoryview) -> bool:
        """Write a chunk of a tensor, or of a slice or strip of one, that starts at its byte `start`; returns whether that was the
        last.
        """
        assert output.whole == self.outputs[output.name], f"{output.name} is not the tensor that the header has"
        start += output.first
        first = self.starts[output.name] + output.index * output.nbytes + start
        offset = first + len(data)
        self.sheet.write(data, first)
        crc = crc32(data) if self.checked else 0
        with self.changed:
            chunks = self.crcs[output.name, output.index]
            assert start not in chunks, f"byte {start} of {output.name} was written twice"
            chunks[start] = (crc, len(data))
            self.left -= len(data)
            self.ahead[first] = offset
            while self.frontier in self.ahead:
                self.frontier = self.ahead.pop(self.frontier)
            if self.frontier >= self.awaited:
                self.changed.notify_all()
            return self.left == 0

    def ready(self, end: int) -> bool:
        """Wait until all bytes before `end` are written; whether they are, or will never be. For one reader."""
        with self.changed:
            self.awaited = end
            self.changed.wait_for(lambda: self.frontier >= end or self.abandoned)
            return self.frontier >= end

    def abandon(self) -> None:
        """Nobody writes it any more."""
        with self.changed:
            self.abandoned = True
            self.changed.notify_all()

    def checks(self) -> Checks:
        """The checksums of what was written, by tensor; none of a file that is not checked."""
        if not self.checked:
            return {}
        return {
            name: [
                joined_crc32(chunk for _, chunk in sorted(self.crcs[name, index].items()))
                for index in range(self.slices[name])
            ]
            for name in self.outputs
        }

    def lacking(self) -> list[str]:
        """The tensors of which something was not written."""
        written: dict[str, int] = defaultdict(int)
        for (name, _), chunks in self.crcs.items():
            written[name] += sum(length for _, length in chunks.values())
        return [name for name, output in self.outputs.items() if written[name] < output.nbytes]
