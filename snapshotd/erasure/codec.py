"""
Codecs: parity from data and lost parts from what is left, one interface over two libraries.

Rule 1: all codecs compute the same bytes: zfec's code over GF(2^8) (see galois.py). Both libraries are fed with the
same coefficients, which the tests and the golden vectors hold against zfec's own; ISA-L is six to ten times faster.
Rule 2: sources may be shorter than the output, or None: what is not there is zeros. Longer ones are cut.
Rule 3: they read and write the caller's memory by pointer, with the GIL released: nobody may move or change the
buffers meanwhile, and outputs may not overlap sources.
Rule 4: no codec is used before it has passed the self-test in this process (``load_codec``).
"""

from __future__ import annotations

import ctypes
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import xxhash

from snapshotd.erasure.galois import Row, decode_row, parity_row
from snapshotd.errors import UsageError
from snapshotd.isal import isal_paths, load_isal

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Codec", "IsalCodec", "ZfecCodec", "load_codec"]

_MAX_CALL_BYTES: Final = 1 << 30
"""ISA-L counts in C int."""

_FEC_MAGIC: Final = 0xFECC0DEC
_IDENTITY: Final = bytes([1, 0, 0, 1])

_NOTHING: Final = memoryview(b"")


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


class _Sums(ABC):
    """What the libraries have in common: all that they compute are sums of products, rows of bytes by pointer."""

    def __init__(self) -> None:
        self._tables: Callable[[tuple[Row, ...]], Any] = lru_cache(maxsize=128)(self._make_tables)
        self._full_tables: Callable[[tuple[Row, ...]], Any] = lru_cache(maxsize=128)(self._make_full_tables)

    @abstractmethod
    def _make_tables(self, rows: tuple[Row, ...]) -> Any:
        """Return what the library makes of these coefficients, one row for each output."""

    @abstractmethod
    def _add_up(self, size: int, tables: Any, sources: Any, targets: Any) -> None:
        """Write ``size`` bytes of each of ``targets``, out of ``sources``: both are arrays of pointers."""

    def encode_row(self, k: int, m: int, row: int, sources: Sequence[Buffer | None], out: Buffer) -> None:
        self.encode_rows(k, m, (row,), sources, (out,))

    def encode_rows(
        self, k: int, m: int, rows: Sequence[int], sources: Sequence[Buffer | None], outs: Sequence[Buffer]
    ) -> None:
        views, targets = _check_encode(k, m, rows, sources, outs)
        self._combine([parity_row(k, row) for row in rows], views, targets)

    def decode(
        self, k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
    ) -> None:
        indexes, views, target = _check_decode(k, m, known, wanted_index, out)
        self._combine([decode_row(k, m, indexes, wanted_index)], views, [target])

    def _combine(self, rows: Sequence[Row], views: Sequence[memoryview], targets: Sequence[memoryview]) -> None:
        """Write the sum of ``row[i] * views[i]`` for each row: a column that is zero, or at its end, is left out."""
        if not targets or not targets[0]:
            return
        size = len(targets[0])
        if size <= _MAX_CALL_BYTES and all(len(view) >= size for view in views):
            tables = self._full_tables(tuple(rows))
            if tables is not None:
                self._add_up(size, tables, _pointers(map(_address, views)), _pointers(map(_address, targets)))
                return
        columns = {i: (view, min(len(view), size)) for i, view in enumerate(views) if any(row[i] for row in rows)}
        begin = 0
        for end in sorted({length for _, length in columns.values()}):
            active = [(i, view) for i, (view, length) in columns.items() if length > begin]
            tables = self._tables(tuple(tuple(row[i] for i, _ in active) for row in rows))
            addresses = [_address(view) for _, view in active]
            while begin < end:
                length = min(end - begin, _MAX_CALL_BYTES)
                self._add_up(
                    length,
                    tables,
                    _pointers(address + begin for address in addresses),
                    _pointers(_address(target) + begin for target in targets),
                )
                begin += length
        for target in targets:
            np.frombuffer(target, np.uint8)[begin:] = 0

    def _make_full_tables(self, rows: tuple[Row, ...]) -> Any:
        """None where a column is zero in all rows: it need not be read."""
        return self._make_tables(rows) if all(map(any, zip(*rows, strict=True))) else None


class ZfecCodec(_Sums):
    """
    zfec by ctypes: its own interface for Python makes new bytes, which have to be copied to where they belong.

    ImportError where zfec is not installed, AttributeError where its library hides its functions or has other ones.
    """

    name = "zfec"

    def __init__(self) -> None:
        super().__init__()
        path = importlib.import_module("zfec._fec").__file__  # fills its tables
        library = ctypes.CDLL(path or "")
        self._encode: Any = library.fec_encode
        self._encode.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_size_t,) * 2
        self._encode.restype = None
        if not _is_fec_t(library):
            raise AttributeError(f"{path} describes a code in another way than zfec 1.6 does")

    def _make_tables(self, rows: tuple[Row, ...]) -> Any:
        k = len(rows[0])
        upper = bytes(k * k)  # fec_encode does not read it
        matrix = ctypes.create_string_buffer(upper + b"".join(map(bytes, rows)))
        code = _FecT(k=k, n=k + len(rows), enc_matrix=ctypes.cast(matrix, ctypes.c_void_p))
        return code, (ctypes.c_uint * len(rows))(*range(k, k + len(rows))), matrix

    def _add_up(self, size: int, tables: Any, sources: Any, targets: Any) -> None:
        code, numbers, _ = tables
        self._encode(ctypes.byref(code), sources, targets, numbers, len(targets), size)


class _FecT(ctypes.Structure):
    """A code as fec_encode takes it (zfec/fec.h, fec_t)."""

    _fields_ = (
        ("magic", ctypes.c_ulong),
        ("k", ctypes.c_ushort),
        ("n", ctypes.c_ushort),
        ("enc_matrix", ctypes.c_void_p),
    )

    def is_sound(self) -> bool:
        """Whether fec_new made this, going by the number that it puts there."""
        return bool(self.magic == _FEC_MAGIC ^ self.k ^ self.n ^ (self.enc_matrix or 0))


def _is_fec_t(library: ctypes.CDLL) -> bool:
    """Whether the library's own codes are an _FecT each."""
    library.fec_new.argtypes = (ctypes.c_ushort, ctypes.c_ushort)
    library.fec_new.restype = ctypes.POINTER(_FecT)
    library.fec_free.argtypes = (ctypes.POINTER(_FecT),)
    library.fec_free.restype = None
    made = library.fec_new(2, 3)
    if not made:
        return False
    try:
        code = made.contents
        return (code.k, code.n) == (2, 3) and code.is_sound() and ctypes.string_at(code.enc_matrix, 4) == _IDENTITY
    finally:
        library.fec_free(made)


class IsalCodec(_Sums):
    """
    ISA-L by ctypes, at memory speed.

    ``path``: of the library; by default the system's, else the one inside the installed pyeclib. OSError where there
    is none, AttributeError where it lacks the functions.
    """

    name = "isal"

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path, library = load_isal([path] if path is not None else isal_paths())
        self._init_tables: Any = library.ec_init_tables
        self._init_tables.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._init_tables.restype = None
        self._encode_data: Any = library.ec_encode_data
        self._encode_data.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int) + (ctypes.c_void_p,) * 3
        self._encode_data.restype = None

    def _make_tables(self, rows: tuple[Row, ...]) -> Any:
        tables = ctypes.create_string_buffer(32 * len(rows[0]) * len(rows))
        self._init_tables(len(rows[0]), len(rows), b"".join(map(bytes, rows)), tables)
        return tables

    def _add_up(self, size: int, tables: Any, sources: Any, targets: Any) -> None:
        self._encode_data(size, len(sources), len(targets), tables, sources, targets)


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
) -> tuple[list[memoryview], list[memoryview]]:
    if not (k >= 1 and m >= 0 and k + m <= 256):
        raise UsageError(f"there is no code with k = {k} data and m = {m} parity parts: k + m <= 256")
    if len(sources) != k:
        raise UsageError(f"encoding needs {k} sources (None where there is nothing), not {len(sources)}")
    fits = len(rows) == len(outs)
    for row in rows:
        fits = fits and 0 <= row < m
    if not fits:
        raise UsageError(f"rows {list(rows)} of 0..{m - 1} do not fit {len(outs)} outputs")
    targets = _views(outs, writable=True)
    if len(targets) > 1 and len({*map(len, targets)}) > 1:
        raise UsageError(f"the outputs must have one size, not {[*map(len, targets)]}")
    return _views(sources), targets


def _check_decode(
    k: int, m: int, known: Sequence[tuple[int, Buffer | None]], wanted_index: int, out: Buffer
) -> tuple[tuple[int, ...], list[memoryview], memoryview]:
    indexes = tuple(index for index, _ in known)
    decode_row(k, m, indexes, wanted_index)  # checks all of them, and the ISA-L codec finds the result in its cache
    return indexes, _views([source for _, source in known]), _views([out], writable=True)[0]


def _views(buffers: Sequence[Buffer | None], *, writable: bool = False) -> list[memoryview]:
    """
    Each buffer as a row of bytes, None as an empty one.

    One plain loop, and nothing done twice: between two calls of a codec megabytes pass through the processor's caches,
    so that what is run here takes ten times what it takes in a loop by itself.
    """
    views = []
    for buffer in buffers:
        view = _NOTHING if buffer is None else memoryview(buffer)
        if not view.c_contiguous or (writable and view.readonly):
            raise UsageError(
                "the output buffer is read-only or not contiguous" if writable else "a source buffer is not contiguous"
            )
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B") if view.nbytes else _NOTHING
        views.append(view)
    return views


def _address(view: memoryview) -> int:
    # A third of the time that ndarray.ctypes.data takes.
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _pointers(addresses: Iterator[int]) -> Any:
    values = list(addresses)
    return (ctypes.c_void_p * len(values))(*values)
