"""crc32 of bytes by the processor's own instructions (the numbers are zlib's), of files, and of a whole from those of its parts."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from isal.isal_zlib import crc32

_CHUNK = 8 << 20


def spelled(crc: int) -> str:
    """As a manifest has it."""
    return f"{crc:08x}"


def crc32_of_file(path: Path) -> int:
    """The crc32 of the bytes of a file."""
    crc, buffer = 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = crc32(buffer[:count], crc)
    return crc


def joined_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """The crc32 of bytes from those of their parts, in order: pairs of a part's crc32 and its length.

    A crc is linear: as many zero bytes as follow a part multiply it, as a polynomial over GF(2), by a fixed matrix. Source: zlib.
    """
    whole = 0
    for crc, length in parts:
        whole = _times(_zeros(length), whole) ^ crc
    return whole


_Matrix = tuple[int, ...]  # 32 columns of 32 bits


def _times(matrix: _Matrix, vector: int) -> int:
    product = 0
    for column in matrix:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


@cache
def _zeros(length: int) -> _Matrix:
    """What `length` zero bytes do to a crc32."""
    if length == 0:
        return tuple(1 << bit for bit in range(32))
    if length == 1:
        bit = (0xEDB88320, *(1 << bit for bit in range(31)))  # what one zero bit does
        return _squared(_squared(_squared(bit)))
    half = _squared(_zeros(length // 2))
    return tuple(_times(_zeros(1), column) for column in half) if length % 2 else half


def _squared(matrix: _Matrix) -> _Matrix:
    return tuple(_times(matrix, column) for column in matrix)
