"""
Words of memory at many addresses, read at once.

Objects that are asked one after the other are waited for one after the other, each a few misses of the cache. NumPy
gathers words from an array that lies over all addresses, and the processor waits for many of them at a time.

Rule: who gives an address holds what lies there as long as it is read. Nothing is looked up, nothing is checked here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from snapshotd_client.arrays import Array

__all__ = ["Trail", "Words", "block", "offset_of", "peek"]

_WORD: Final = 8
_END: Final = 1 << 57
"""No address of a process is as large, unless its upper bits mean something else."""

_AT_ONCE: Final = 500
"""For more than these NumPy lets go of the interpreter's lock, which may take 5 ms to be had again."""


class _Everything:
    """All addresses but the first eight, which is where no object lies."""

    __array_interface__: Final[dict[str, Any]] = {
        "data": (_WORD, True),
        "shape": (_END // _WORD - 1,),
        "typestr": np.dtype(np.int64).str,
        "version": 3,
    }


_memory: Final[Array] = np.asarray(_Everything())


class Words:
    """The words of 8 bytes at ``addresses``. ValueError for what is no multiple of 8, or can be no address."""

    __slots__ = ("_parts",)

    def __init__(self, addresses: Iterable[int] | Array) -> None:
        given = addresses if isinstance(addresses, np.ndarray) else np.array(list(addresses), np.int64)
        if ((given % _WORD != 0) | (given < _WORD) | (given >= _END)).any():
            raise ValueError("an address that is no multiple of 8, or none at all")
        indices = given // _WORD - 1
        self._parts = [indices[begin : begin + _AT_ONCE] for begin in range(0, len(indices), _AT_ONCE)]

    def read(self) -> bytes:
        """Return them, one after the other."""
        parts = [_memory[part].tobytes() for part in self._parts]
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Trail:
    """
    Words that lead to other words, and what they were: whether all of them still are that is told from the first to the
    last, so that no address is followed that was not just read again from the object that owns what lies there.
    """

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[Words, bytes]] = []

    def follow(self, addresses: Sequence[int] | Array) -> Array:
        """Read the words there, remember them, and return them."""
        words = Words(addresses)
        found = words.read()
        self._steps.append((words, found))
        return np.frombuffer(found, np.int64)

    def holds(self) -> bool:
        """Whether all words are what they were."""
        return all(words.read() == found for words, found in self._steps)


def block(begin: int, nbytes: int) -> list[int]:
    """Return the words of ``nbytes`` from ``begin`` on, which whoever asks for them has a hold on."""
    first = begin // _WORD - 1
    words: list[int] = _memory[first : first + nbytes // _WORD].tolist()
    return words


def offset_of(*known: tuple[int, int], within: int) -> int:
    """
    Find out how many bytes from its beginning an object has a word, from a few objects that are alike.

    Args:
        known: where each of them begins, and what the word is there.
        within: how many bytes of them are looked through.

    Raises:
        ValueError: There is no such place, or more than one.
        OSError: Memory is not to be looked at.
    """
    looks = [peek(begin, within) for begin, _ in known]
    wanted = tuple(word for _, word in known)
    places = [number * _WORD for number, words in enumerate(zip(*looks, strict=True)) if words == wanted]
    if len(places) != 1:
        raise ValueError(f"{len(places)} places where the words could be")
    return places[0]


def peek(begin: int, nbytes: int) -> list[int]:
    """Return the words of ``nbytes`` from an address on that may be none: then there is an OSError, and no more."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        found = os.pread(memory.fileno(), nbytes, begin)
    words: list[int] = np.frombuffer(found, np.int64).tolist()
    return words
