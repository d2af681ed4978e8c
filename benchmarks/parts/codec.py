"""Erasure coding: encode and decode, against ISA-L's bare call on the same memory, and zfec's path against zfec."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from snapshotd.erasure import IsalCodec, ZfecCodec
from snapshotd.erasure.galois import decode_row, parity_row

from .. import Row, Run
from ..figures import ratio_of

GOAL = 5
SECONDS = 22

CODES = ((2, 1), (3, 1), (4, 2), (6, 2), (8, 3))
WINDOW_BYTES = 1 << 20


def rows(run: Run) -> Iterator[Row]:
    try:
        isal: IsalCodec | None = IsalCodec()
    except (OSError, AttributeError) as error:
        isal = None
        yield Row.note("encode and decode by ISA-L", f"it does not load here: {error}")
    for k, m in CODES:
        stripes = _Stripes(run, k, m)
        if isal is not None:
            yield from stripes.against_isal(run, isal)
        yield from stripes.against_zfec(run)


class _Stripes:
    """k data and m parity parts in tmpfs, worked off window by window."""

    def __init__(self, run: Run, k: int, m: int) -> None:
        self.k, self.m = k, m
        self.count = max(2, run.size(400e6) // (k * WINDOW_BYTES))
        part = self.count * WINDOW_BYTES
        memory = run.memory((k + 2 * m) * part)
        self.parts = [memory[i * part : (i + 1) * part] for i in range(k + 2 * m)]
        self.data, self.parity, self.spare = self.parts[:k], self.parts[k : k + m], self.parts[k + m :]
        self.nbytes = k * part

    def windows(self, parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
        for begin in range(0, self.count * WINDOW_BYTES, WINDOW_BYTES):
            yield [part[begin : begin + WINDOW_BYTES] for part in parts]

    def against_isal(self, run: Run, isal: IsalCodec) -> Iterator[Row]:
        k, m = self.k, self.m

        def encode() -> None:
            for window in self.windows(self.parts[: k + m]):
                isal.encode_rows(k, m, range(m), window[:k], window[k:])

        known = list(range(m, k + m))  # the first m data parts are lost

        def decode() -> None:
            for window in self.windows(self.parts):
                parts = [(index, window[index]) for index in known]
                for lost in range(m):
                    isal.decode(k, m, parts, lost, window[k + m + lost])

        there = [self.parts[index] for index in known]
        bare_encode = self._bare(isal, self.data, self.parity, [parity_row(k, row) for row in range(m)])
        bare_decode = [
            self._bare(isal, there, [self.spare[lost]], [decode_row(k, m, tuple(known), lost)]) for lost in range(m)
        ]
        ways: dict[str, Callable[[], None]] = {
            "encode": encode,
            "bare encode": bare_encode,
            "decode": decode,
            "bare decode": lambda: [bare() for bare in bare_decode] and None,
        }
        found = run.rounds(ways, rounds=9, within_s=8.0)
        for lost in range(m):
            assert self.spare[lost] == self.data[lost], "decoded bytes are not those that were encoded"
        for what in ("encode", "decode"):
            yield Row.speed(
                f"{what} ({k}, {m})",
                found[what],
                found[f"bare {what}"],
                at_least=0.85,
                against="bare ISA-L, 1 MiB windows",
                nbytes=self.nbytes,
            )

    def _bare(
        self, isal: IsalCodec, sources: Sequence[memoryview], targets: Sequence[memoryview], coefficients: Any
    ) -> Callable[[], None]:
        """ISA-L's own call for each window, everything else made before."""
        tables = isal._make_tables(tuple(coefficients))
        calls = [
            (_pointers(window[: len(sources)]), _pointers(window[len(sources) :]))
            for window in self.windows([*sources, *targets])
        ]
        call, num_sources, num_targets = isal._encode_data, len(sources), len(targets)

        def run_all() -> None:
            for source, target in calls:
                call(WINDOW_BYTES, num_sources, num_targets, tables, source, target)

        return run_all

    def against_zfec(self, run: Run) -> Iterator[Row]:
        """zfec is ten times slower: a tenth of the windows is enough. It gives bytes, which have to go somewhere."""
        import zfec

        k, m = self.k, self.m
        codec, bare = ZfecCodec(), zfec.Encoder(k, k + m)
        windows = list(self.windows(self.parts[: k + m]))[: max(1, self.count // 10)]

        def ours() -> None:
            for window in windows:
                codec.encode_rows(k, m, range(m), window[:k], window[k:])

        def floor() -> None:
            for window in windows:
                for part, block in zip(window[k:], bare.encode(window[:k], list(range(k, k + m))), strict=True):
                    part[:] = block

        found = run.rounds({"ours": ours, "floor": floor, "again": floor}, rounds=31, within_s=5.0)
        itself = ratio_of(found["floor"], found["again"])
        yield Row.speed(
            f"encode ({k}, {m}) by zfec",
            found["ours"],
            found["floor"],
            at_least=1.0,
            against="zfec itself, into the same memory",
            nbytes=len(windows) * k * WINDOW_BYTES,
            noise=max(abs(1 - itself.low), abs(1 - itself.high)),
            text=f"(itself again: {itself.low:.3f} to {itself.high:.3f})",
        )


def _pointers(views: Sequence[memoryview]) -> Any:
    return (ctypes.c_void_p * len(views))(*(np.frombuffer(view, np.uint8).ctypes.data for view in views))
