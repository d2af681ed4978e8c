"""
Codecs: parity from data and lost parts from what is left, one interface over two libraries.

Rule 1: all codecs compute the same bytes: zfec's code over GF(2^8) (see galois.py). zfec is the reference; ISA-L, fed
with the same coefficients, is ten times faster.
Rule 2: sources may be shorter than the output, or None: what is not there is zeros. Longer ones are cut.
Rule 3: ISA-L reads and writes the caller's memory by pointer, with the GIL released: nobody may move or change the
buffers meanwhile, and outputs may not overlap sources.
Rule 4: no codec is used before it has passed the self-test in this process (``load_codec``).
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from snapshotd.erasure.galois import Row, decode_row, parity_row
from snapshotd.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Codec", "IsalCodec", "ZfecCodec", "load_codec"]

Bytes = npt.NDArray[np.uint8]
Block = Bytes | bytes

_MAX_CALL_BYTES: Final = 1 << 30
"""ISA-L counts in C int."""

_ZFEC_WINDOW_BYTES: Final = 1 << 20
"""zfec makes bytes objects: large enough that the calls vanish, and the C library finds memory of this size again."""


class Codec(Protocol):
    """
    One code for any k data and m parity parts, ``k >= 1, k + m <= 256``; UsageError for anything else.

    A seam, because the fast library is not there on every machine. Implementations keep no state between calls but
    tables, and may be called from several threads at once.
    """

    @property
    def name(self) -> str:
        """What to show to people."""
        ...

    def encode_row(self, k: int, m: int, row: int, sources: Sequence[Buffer | None], out: Buffer) -> None:
        """Write parity ``row`` (0..m-1) of the k ``sources``, in order of code index, over all of ``out``."""
        ...

    def encode_rows(
        self, k: int, m: int, rows: Sequence[int], sources: Sequence[Buffer | None], outs: Sequence[Buffer]
    ) -> None:
        """Write several parity rows, each over its own one of ``outs`` (of equal size), in one pass over the data."""
        ...

    def decode(
        self, k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
    ) -> None:
        """
        Write part ``wanted_index`` over all of ``out``, from k ``known`` parts, each with its code index.

        Indexes 0..k-1 are data, k..k+m-1 parity; any k different ones will do, in any order, for any wanted one.
        """
        ...


class ZfecCodec:
    """The reference: zfec. Slow, and it makes new bytes. ImportError where zfec is not installed."""

    name = "zfec"

    def __init__(self) -> None:
        zfec: Any = importlib.import_module("zfec")
        self._encoder: Callable[[int, int], Any] = lru_cache(maxsize=64)(zfec.Encoder)
        self._decoder: Callable[[int, int], Any] = lru_cache(maxsize=64)(zfec.Decoder)

    def encode_row(self, k: int, m: int, row: int, sources: Sequence[Buffer | None], out: Buffer) -> None:
        self.encode_rows(k, m, (row,), sources, (out,))

    def encode_rows(
        self, k: int, m: int, rows: Sequence[int], sources: Sequence[Buffer | None], outs: Sequence[Buffer]
    ) -> None:
        arrays, targets = _check_encode(k, m, rows, sources, outs)
        for begin, end in _windows(targets):
            blocks = [_block(array, begin, end) for array in arrays]
            for target, block in zip(targets, self._encode(k, m, blocks, rows), strict=True):
                target[begin:end] = np.frombuffer(block, np.uint8)

    def decode(
        self, k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
    ) -> None:
        indexes, arrays, target = _check_decode(k, m, known, wanted_index, out)
        for begin, end in _windows([target]):
            blocks = [_block(array, begin, end) for array in arrays]
            if wanted_index in indexes:
                block = blocks[indexes.index(wanted_index)]
            else:
                # Data parts come back in order of index, whatever the order and kind of those that went in.
                data = blocks if k == 1 else self._decoder(k, k + m).decode(blocks, list(indexes))
                block = data[wanted_index] if wanted_index < k else self._encode(k, m, data, [wanted_index - k])[0]
            target[begin:end] = np.frombuffer(block, np.uint8)

    def _encode(self, k: int, m: int, blocks: Sequence[Block], rows: Sequence[int]) -> Sequence[Block]:
        if k == 1:
            return [blocks[0]] * len(rows)  # a mirror
        encoded: Sequence[Block] = self._encoder(k, k + m).encode(blocks, [k + row for row in rows])
        return encoded


class IsalCodec:
    """
    ISA-L by ctypes, at memory speed.

    ``path``: of the library; by default the system's, else the one inside the installed pyeclib. OSError where there
    is none, AttributeError where it lacks the functions.
    """

    name = "isal"

    def __init__(self, path: str | None = None) -> None:
        self.path, library = _load_isal([path] if path is not None else _isal_paths())
        self._init_tables: Any = library.ec_init_tables
        self._init_tables.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._init_tables.restype = None
        self._encode_data: Any = library.ec_encode_data
        self._encode_data.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int) + (ctypes.c_void_p,) * 3
        self._encode_data.restype = None
        self._tables: Callable[[tuple[Row, ...]], Any] = lru_cache(maxsize=128)(self._make_tables)
        self._full_tables: Callable[[tuple[Row, ...]], Any] = lru_cache(maxsize=128)(self._make_full_tables)

    def encode_row(self, k: int, m: int, row: int, sources: Sequence[Buffer | None], out: Buffer) -> None:
        self.encode_rows(k, m, (row,), sources, (out,))

    def encode_rows(
        self, k: int, m: int, rows: Sequence[int], sources: Sequence[Buffer | None], outs: Sequence[Buffer]
    ) -> None:
        arrays, targets = _check_encode(k, m, rows, sources, outs)
        self._combine([parity_row(k, row) for row in rows], arrays, targets)

    def decode(
        self, k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
    ) -> None:
        indexes, arrays, target = _check_decode(k, m, known, wanted_index, out)
        self._combine([decode_row(k, m, indexes, wanted_index)], arrays, [target])

    def _combine(self, rows: Sequence[Row], arrays: Sequence[Bytes | None], targets: Sequence[Bytes]) -> None:
        """Write the sum of ``row[i] * arrays[i]`` for each row: a column that is zero, or at its end, is left out."""
        if not targets:
            return
        size = targets[0].size
        if size <= _MAX_CALL_BYTES and all(array is not None and array.size >= size for array in arrays):
            tables = self._full_tables(tuple(rows))
            if tables is not None:
                sources = _pointers(_address(array) for array in arrays if array is not None)
                self._encode_data(size, len(arrays), len(rows), tables, sources, _pointers(map(_address, targets)))
                return
        columns = {
            i: (array, min(array.size, size))
            for i, array in enumerate(arrays)
            if array is not None and any(row[i] for row in rows)
        }
        begin = 0
        for end in sorted({length for _, length in columns.values()}):
            active = [(i, array) for i, (array, length) in columns.items() if length > begin]
            tables = self._tables(tuple(tuple(row[i] for i, _ in active) for row in rows))
            addresses = [_address(array) for _, array in active]
            while begin < end:
                length = min(end - begin, _MAX_CALL_BYTES)
                self._encode_data(
                    length,
                    len(active),
                    len(rows),
                    tables,
                    _pointers(address + begin for address in addresses),
                    _pointers(_address(target) + begin for target in targets),
                )
                begin += length
        for target in targets:
            target[begin:] = 0

    def _make_full_tables(self, rows: tuple[Row, ...]) -> Any:
        """None where a column is zero in all rows: it need not be read."""
        return self._make_tables(rows) if all(map(any, zip(*rows, strict=True))) else None

    def _make_tables(self, rows: tuple[Row, ...]) -> Any:
        tables = ctypes.create_string_buffer(32 * len(rows[0]) * len(rows))
        self._init_tables(len(rows[0]), len(rows), b"".join(map(bytes, rows)), tables)
        return tables


def load_codec(prefer: Literal["auto", "isal", "zfec"] = "auto") -> tuple[Codec, str]:
    """
    Return the best codec that passes the self-test, and why it was taken, in words.

    "auto" and "isal" try ISA-L and then zfec, "zfec" the other way round. UsageError if none works.
    """
    if prefer not in ("auto", "isal", "zfec"):
        raise UsageError(f"the codec can be 'auto', 'isal' or 'zfec', not {prefer!r}")
    makers: list[tuple[str, Callable[[], Codec]]] = [("isal", IsalCodec), ("zfec", ZfecCodec)]
    if prefer == "zfec":
        makers.reverse()
    failures: list[str] = []
    for name, make in makers:
        try:
            codec = make()
        except (ImportError, OSError, AttributeError) as error:
            failures.append(f"{name} does not load ({error!s:.200})")
            continue
        failure = self_test(codec)
        if not failure:
            return codec, "; ".join([*failures, f"{name} loads and passes the self-test"])
        failures.append(f"{name} fails the self-test ({failure})")
    raise UsageError(f"no erasure codec works: {'; '.join(failures)}. Install pyeclib (brings ISA-L) or zfec")


_GOLDEN: Final = {
    (1, 1): "0e24eb1e692a281b",
    (2, 1): "a12dec578d037d52",
    (4, 2): "8e73ad254b675ace",
    (6, 2): "05c9955b816e2c4f",
    (8, 3): "8dece6b417ccffde",
}
"""xxh3_64 of the parity rows, one behind the other, that zfec makes of ``_test_sources(k)``."""

_TEST_BYTES: Final = 1500


def self_test(codec: Codec) -> str:
    """Return what ``codec`` computes wrongly, in words: empty if nothing. Takes about a millisecond."""
    for (k, m), golden in _GOLDEN.items():
        sources = _test_sources(k)
        outs = [bytearray(b"\xff" * _TEST_BYTES) for _ in range(m)]
        codec.encode_rows(k, m, range(m), sources, outs)
        if xxhash.xxh3_64_hexdigest(b"".join(outs)) != golden:
            return f"wrong parity for k = {k}, m = {m}"
        # The first data parts are lost, and the known ones come in descending order of index.
        parts: list[bytes | bytearray] = [*sources, *outs]
        known = [(index, parts[index]) for index in range(k + m - 1, m - 1, -1)]
        for wanted in range(min(m, k)):
            out = bytearray(b"\xff" * _TEST_BYTES)
            codec.decode(k, m, known, wanted, out)
            if out != sources[wanted].ljust(_TEST_BYTES, b"\0"):
                return f"wrong data part {wanted} for k = {k}, m = {m}"
    return ""


def _test_sources(k: int) -> list[bytes]:
    # Unequal lengths, so that the ends of columns are tested too; bytes from a small generator that will never change.
    return [bytes((7 + 31 * i + 17 * j * (j + i)) % 251 for j in range(_TEST_BYTES - 97 * (i % 4))) for i in range(k)]


def _check_encode(
    k: int, m: int, rows: Sequence[int], sources: Sequence[Buffer | None], outs: Sequence[Buffer]
) -> tuple[list[Bytes | None], list[Bytes]]:
    if not (k >= 1 and m >= 0 and k + m <= 256):
        raise UsageError(f"there is no code with k = {k} data and m = {m} parity parts: k + m <= 256")
    if len(sources) != k:
        raise UsageError(f"encoding needs {k} sources (None where there is nothing), not {len(sources)}")
    if len(rows) != len(outs) or not all(0 <= row < m for row in rows):
        raise UsageError(f"rows {list(rows)} of 0..{m - 1} do not fit {len(outs)} outputs")
    targets = [_target(out) for out in outs]
    if len({target.size for target in targets}) > 1:
        raise UsageError(f"the outputs must have one size, not {[target.size for target in targets]}")
    return [_array(source) for source in sources], targets


def _check_decode(
    k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
) -> tuple[tuple[int, ...], list[Bytes | None], Bytes]:
    indexes = tuple(index for index, _ in known)
    decode_row(k, m, indexes, wanted_index)  # checks all of them, and the ISA-L codec finds the result in its cache
    return indexes, [_array(source) for _, source in known], _target(out)


def _array(source: Buffer | None) -> Bytes | None:
    if source is None:
        return None
    view = memoryview(source)
    if not view.c_contiguous:
        raise UsageError("a source buffer is not contiguous")
    return np.frombuffer(view, np.uint8) if view.nbytes else None


def _target(out: Buffer) -> Bytes:
    view = memoryview(out)
    if view.readonly or not view.c_contiguous:
        raise UsageError("the output buffer is read-only or not contiguous")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _windows(targets: Sequence[Bytes]) -> Iterator[tuple[int, int]]:
    size = targets[0].size if targets else 0
    for begin in range(0, size, _ZFEC_WINDOW_BYTES):
        yield begin, min(begin + _ZFEC_WINDOW_BYTES, size)


def _block(array: Bytes | None, begin: int, end: int) -> Block:
    """The bytes where they are; only what is short is copied, with zeros behind it."""
    if array is not None and array.size >= end:
        return array[begin:end]
    return (b"" if array is None else array[begin:end].tobytes()).ljust(end - begin, b"\0")


def _address(array: Bytes) -> int:
    address: int = array.__array_interface__["data"][0]  # a third of the time that array.ctypes.data takes
    return address


def _pointers(addresses: Iterator[int]) -> Any:
    values = list(addresses)
    return (ctypes.c_void_p * len(values))(*values)


def _isal_paths() -> list[str]:
    paths = ["libisal.so.2", "libisal.2.dylib"]
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent.parent / "pyeclib.libs"
        paths += sorted(str(path) for path in beside.glob("libisal*.so*"))
    return paths


def _load_isal(paths: Sequence[str]) -> tuple[str, ctypes.CDLL]:
    failures: list[str] = []
    for path in paths:
        try:
            return path, ctypes.CDLL(path)  # CDLL, not PyDLL: it releases the GIL
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures) or "no libisal was found")
