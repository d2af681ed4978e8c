"""
Arithmetic in GF(2^8), polynomial 0x11d, and the generator matrix that zfec uses.

Only small matrices pass through here; bulk bytes go through a codec. zfec's matrix is systematic: the identity above m
parity rows, made from a Vandermonde matrix by making its top square the identity. It is computed here from that
definition, so that reading parity needs no zfec; the tests hold it against zfec itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from snapshotd.errors import UsageError

__all__ = ["decode_row", "invert", "multiply", "parity_row"]

Row = tuple[int, ...]
Matrix = list[list[int]]

_POLYNOMIAL: Final = 0x11D


def _tables() -> tuple[list[int], list[int]]:
    exponents, logarithms = [0] * 512, [0] * 256
    value = 1
    for power in range(255):
        exponents[power] = exponents[power + 255] = value
        logarithms[value] = power
        value <<= 1
        if value & 0x100:
            value ^= _POLYNOMIAL
    return exponents, logarithms


_EXP, _LOG = _tables()

PRODUCTS: Final = [bytes(_EXP[_LOG[a] + _LOG[b]] if a and b else 0 for b in range(256)) for a in range(256)]
"""``PRODUCTS[a][b]`` is a times b; ``row.translate(PRODUCTS[a])`` multiplies a whole row of bytes."""


def multiply(a: int, b: int) -> int:
    """Return the product of two elements of the field."""
    return PRODUCTS[a][b]


def invert(matrix: Sequence[Sequence[int]]) -> list[Row]:
    """Return the inverse of a square matrix over the field; UsageError if it has none."""
    size = len(matrix)
    # Each row is one bytes object [left | right]; Gauss-Jordan by translate and big-integer XOR.
    rows = [bytes(row) + bytes(int(i == j) for j in range(size)) for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next((r for r in range(column, size) if rows[r][column]), None)
        if pivot is None:
            raise UsageError("a singular matrix has no inverse")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        inverse = _EXP[255 - _LOG[rows[column][column]]]
        lead = rows[column] = rows[column].translate(PRODUCTS[inverse])
        for r in range(size):
            factor = rows[r][column]
            if r != column and factor:
                rows[r] = _xor(rows[r], lead.translate(PRODUCTS[factor]))
    return [tuple(row[size:]) for row in rows]


@lru_cache(maxsize=1024)
def parity_row(k: int, row: int) -> Row:
    """Return the k coefficients of parity ``row`` (0 is the first): zfec's, whatever the number of rows."""
    _check_code(k, row + 1)
    if k == 1:
        return (1,)  # a mirror
    # Row k + row of the Vandermonde matrix, whose row i >= 1 is the powers of alpha^(i-1).
    point = k + row - 1
    return _times([_EXP[point * j % 255] for j in range(k)], _vandermonde_inverse(k))


@lru_cache(maxsize=4096)
def decode_row(k: int, m: int, known: tuple[int, ...], wanted: int) -> Row:
    """
    Return coefficients c so that part ``wanted`` is the sum of ``c[i]`` times part ``known[i]``.

    Indexes are those of the code: 0..k-1 data, k..k+m-1 parity. UsageError unless ``known`` are k different ones.
    """
    _check_code(k, m)
    if len(known) != k or len(set(known)) != k:
        raise UsageError(f"decoding needs {k} different known parts, but got {known}")
    if not all(0 <= index < k + m for index in (*known, wanted)):
        raise UsageError(f"the parts {known} and {wanted} are not all in 0..{k + m - 1}")
    if wanted in known:
        return tuple(int(index == wanted) for index in known)
    return _times(_generator_row(k, wanted), _known_inverse(k, known))


@lru_cache(maxsize=64)
def _known_inverse(k: int, known: tuple[int, ...]) -> tuple[Row, ...]:
    return tuple(invert([_generator_row(k, index) for index in known]))


@lru_cache(maxsize=64)
def _vandermonde_inverse(k: int) -> tuple[Row, ...]:
    top = [[int(j == 0) for j in range(k)]]
    top += [[_EXP[(i - 1) * j % 255] for j in range(k)] for i in range(1, k)]
    return tuple(invert(top))


def _generator_row(k: int, index: int) -> Row:
    if index < k:
        return tuple(int(j == index) for j in range(k))
    return parity_row(k, index - k)


def _times(row: Sequence[int], matrix: Sequence[Row]) -> Row:
    total = bytes(len(matrix[0]))
    for factor, other in zip(row, matrix, strict=True):
        if factor:
            total = _xor(total, bytes(other).translate(PRODUCTS[factor]))
    return tuple(total)


def _xor(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


def _check_code(k: int, m: int) -> None:
    if k < 1 or m < 0 or k + m > 256:
        raise UsageError(f"there is no code with k = {k} data and m = {m} parity parts: k >= 1, m >= 0, k + m <= 256")
