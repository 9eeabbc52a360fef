"""The crc32 of a whole from the crc32s of its parts, without reading the bytes again."""

from collections.abc import Iterable
from functools import cache


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
        return _squared(_squared(_squared((0xEDB88320, *(1 << bit for bit in range(31))))))
    half = _squared(_zeros(length // 2))
    return _product(_zeros(1), half) if length % 2 else half


def _squared(matrix: _Matrix) -> _Matrix:
    return _product(matrix, matrix)


def _product(one: _Matrix, other: _Matrix) -> _Matrix:
    return tuple(_times(one, column) for column in other)
