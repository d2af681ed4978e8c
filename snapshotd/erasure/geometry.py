"""
The stripe geometry of a parity group: which bytes make up which stripe, and who holds its parity.

A group has n members at positions 0..n-1 and m parity rows per stripe; k = n - m. Each member has one string of bytes
(its slot file), of any length. All of it follows from the lengths and m alone, so that each member, and a reader years
later, computes the same.

Rule 1: there are n stripes. In stripe s, parity row t is held by position (s + t) mod n; the other k positions are the
stripe's contributors, and in increasing order of position they are index 0..k-1 of the code. Row t is index k + t.
Rule 2: a position contributes to k stripes. Its units 0..k-1 go to these stripes in increasing order: unit u is bytes
``[u * unit_bytes, min((u + 1) * unit_bytes, length))``. So the units tile the member's bytes exactly. A unit is no
shorter than a digest chunk, unless the slots are: what is verified as a whole is not cut into more messages.
Rule 3: units are padded with zeros in thought only. A unit without any bytes is known to everybody, so never missing.
Rule 4: parity rows are as long as the longest unit of their stripe, and lie behind each other in one parity file per
position, in order of stripe, each at a multiple of ``granule``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from snapshotd.errors import LayoutError, Unrecoverable
from snapshotd.layout.digest import CHUNK_BYTES

__all__ = [
    "CHUNKED_FROM_CHUNKS",
    "MAX_MEMBERS",
    "SMALL_GRANULE_BYTES",
    "ParityRow",
    "Part",
    "StripeGeometry",
    "decode_plan",
    "recoverable",
    "reencode_plan",
]

MAX_MEMBERS: Final = 256
"""k + m of a code over GF(2^8)."""

SMALL_GRANULE_BYTES: Final = 64
"""Units of small states are rounded up to this: a cache line, and a vector register of the codec."""

CHUNKED_FROM_CHUNKS: Final = 16
"""
Units are whole digest chunks once they are longer than this many: then rounding costs at most 1/16 of the memory, and
each unit is verified by its own chunks. In smaller groups, whole chunks that cover the unit are verified.
"""

_MAX_LENGTH: Final = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """Parity row ``row`` of ``stripe``: bytes ``[offset, offset + length)`` of its holder's parity file."""

    stripe: int
    row: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """
    One of the k inputs of a decoding: ``index`` in the code (0..k+m-1), and where its bytes are.

    Bytes ``[begin, end)`` of the parity file (``is_parity``, then ``row`` is its row) or else of the slot file of
    ``position``. If ``begin == end`` the part is all zeros: nothing needs to be fetched, whoever is alive.
    """

    position: int
    is_parity: bool
    row: int | None
    index: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class StripeGeometry:
    """
    The stripes of a group whose member p has ``lengths[p]`` bytes, with ``m`` parity rows per stripe.

    LayoutError, with the numbers, if m is not below the number of members or anything is out of range.
    """

    lengths: tuple[int, ...]
    m: int
    n: int = field(init=False)
    k: int = field(init=False)
    granule: int = field(init=False)
    unit_bytes: int = field(init=False)
    _parity_lengths: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __init__(self, lengths: Sequence[int], m: int) -> None:
        n = len(lengths)
        if not 1 <= n <= MAX_MEMBERS:
            raise LayoutError(f"a parity group has 1 to {MAX_MEMBERS} members, not {n}")
        if type(m) is not int or not 0 <= m < n:
            raise LayoutError(
                f"{m} parity rows need more than {m} members, but the group has {n}: lower m to at most {n - 1} "
                "or enlarge the group"
            )
        for position, length in enumerate(lengths):
            if type(length) is not int or not 0 <= length <= _MAX_LENGTH:
                raise LayoutError(f"position {position} cannot have {length!r} bytes; possible are 0 to {_MAX_LENGTH}")
        k, longest = n - m, max(lengths)
        least = min(_round_up(longest, SMALL_GRANULE_BYTES), CHUNK_BYTES)
        granule = CHUNK_BYTES if longest > k * CHUNK_BYTES * CHUNKED_FROM_CHUNKS else SMALL_GRANULE_BYTES
        put = object.__setattr__  # frozen
        put(self, "lengths", tuple(lengths))
        put(self, "m", m)
        put(self, "n", n)
        put(self, "k", k)
        put(self, "granule", granule)
        put(self, "unit_bytes", max(_round_up(-(-longest // k), granule), least, granule))
        put(self, "_parity_lengths", tuple(self._longest_unit(stripe) for stripe in range(n)))

    def holders(self, stripe: int) -> tuple[int, ...]:
        """Return the positions that hold parity row 0, 1, ... of ``stripe``: m of them."""
        self._check("stripe", stripe, self.n)
        return tuple((stripe + row) % self.n for row in range(self.m))

    def contributors(self, stripe: int) -> tuple[int, ...]:
        """Return the positions whose units are index 0, 1, ... of ``stripe``: k of them, increasing."""
        self._check("stripe", stripe, self.n)
        wrapped = stripe + self.m - self.n  # how many holders are at 0, 1, ... again
        if wrapped > 0:
            return tuple(range(wrapped, stripe))
        return (*range(stripe), *range(stripe + self.m, self.n))

    def code_index(self, position: int, stripe: int) -> int:
        """Return what ``position`` has of ``stripe``: index 0..k-1 for a data unit, k + row for a parity row."""
        self._check("position", position, self.n)
        self._check("stripe", stripe, self.n)
        row = (position - stripe) % self.n
        if row < self.m:
            return self.k + row
        wrapped = stripe + self.m - self.n
        if wrapped > 0:
            return position - wrapped
        return position if position < stripe else position - self.m

    def unit_index(self, position: int, stripe: int) -> int:
        """Return which unit of ``position`` is in ``stripe``; LayoutError if it holds parity there instead."""
        self._check("position", position, self.n)
        self._check("stripe", stripe, self.n)
        if (position - stripe) % self.n < self.m:
            raise LayoutError(f"position {position} holds parity of stripe {stripe} and has no unit in it")
        # The position holds parity of the m stripes first, first + 1, ... position, counted around.
        first = position - self.m + 1
        if first < 0:
            return stripe - (position + 1)
        return stripe if stripe < first else stripe - self.m

    def stripe_of(self, position: int, unit_index: int) -> int:
        """Return the stripe that unit ``unit_index`` (0..k-1) of ``position`` is in."""
        self._check("position", position, self.n)
        self._check("unit", unit_index, self.k)
        first = position - self.m + 1
        if first < 0:
            return unit_index + position + 1
        return unit_index if unit_index < first else unit_index + self.m

    def unit_range(self, position: int, stripe: int) -> tuple[int, int]:
        """Return [begin, end) in the slot file of ``position`` of its unit in ``stripe``; empty where it has none."""
        begin = self.unit_index(position, stripe) * self.unit_bytes
        length = self.lengths[position]
        return min(begin, length), min(begin + self.unit_bytes, length)

    def units_of_range(self, position: int, begin: int, end: int) -> range:
        """Return the indexes of the units of ``position`` that share bytes with ``[begin, end)`` of its slot file."""
        self._check("position", position, self.n)
        if not 0 <= begin <= end <= self.lengths[position]:
            raise LayoutError(f"[{begin}, {end}) is not inside the {self.lengths[position]} bytes of {position}")
        if begin == end:
            return range(0)
        return range(begin // self.unit_bytes, -(-end // self.unit_bytes))

    def parity_length(self, stripe: int) -> int:
        """Return the bytes of each parity row of ``stripe``: as many as its longest unit has, maybe 0."""
        self._check("stripe", stripe, self.n)
        return self._parity_lengths[stripe]

    def parity_rows(self, position: int) -> list[ParityRow]:
        """Return the m parity rows that ``position`` holds, in order of stripe, which is their order in its file."""
        self._check("position", position, self.n)
        rows: list[ParityRow] = []
        end = 0
        for stripe, row in sorted(((position - row) % self.n, row) for row in range(self.m)):
            offset = _round_up(end, self.granule)
            length = self._parity_lengths[stripe]
            rows.append(ParityRow(stripe=stripe, row=row, offset=offset, length=length))
            # A row without bytes takes no room, so that it cannot push the file's end to the next multiple.
            end = offset + length if length else end
        return rows

    def parity_row(self, stripe: int, row: int) -> tuple[int, ParityRow]:
        """Return the position that holds ``row`` of ``stripe``, and where in its parity file."""
        self._check("stripe", stripe, self.n)
        self._check("row", row, self.m)
        position = (stripe + row) % self.n
        return position, next(parity for parity in self.parity_rows(position) if parity.stripe == stripe)

    def parity_bytes(self, position: int) -> int:
        """Return the size of the parity file of ``position``."""
        return max((row.offset + row.length for row in self.parity_rows(position) if row.length), default=0)

    def _longest_unit(self, stripe: int) -> int:
        return max(end - begin for begin, end in (self.unit_range(p, stripe) for p in self.contributors(stripe)))

    @staticmethod
    def _check(what: str, value: int, limit: int) -> None:
        if not 0 <= value < limit:
            raise LayoutError(f"{what} {value} does not exist; there are {limit}")


def recoverable(
    geometry: StripeGeometry, data_missing: Set[int], parity_missing: Set[int] = frozenset()
) -> tuple[bool, str]:
    """
    Return whether all missing slot files can be rebuilt, and the reason in words.

    ``data_missing``: positions whose slot file is lost. ``parity_missing``: positions whose parity file is lost (the
    same positions where whole nodes died).
    """
    _check_positions(geometry, data_missing | parity_missing)
    worst = 0
    for stripe in range(geometry.n):
        data = [p for p in geometry.contributors(stripe) if p in data_missing and _has_unit(geometry, p, stripe)]
        parity = [p for p in geometry.holders(stripe) if p in parity_missing]
        if not data:
            continue
        worst = max(worst, len(data) + len(parity))
        if len(data) + len(parity) > geometry.m:
            return False, (
                f"stripe {stripe} lacks {len(data) + len(parity)} of its {geometry.n} parts "
                f"(data of positions {_listed(data)}; parity of positions {_listed(parity)}), "
                f"but only {geometry.m} can be rebuilt"
            )
    if not worst:
        return True, "no data is missing"
    return True, f"no stripe lacks more than {worst} of its {geometry.n} parts, and {geometry.m} can be rebuilt"


def decode_plan(
    geometry: StripeGeometry,
    stripe: int,
    wanted_position: int,
    data_available: Set[int],
    parity_available: Set[int],
) -> list[Part]:
    """
    Return the k parts from which to decode the unit of ``wanted_position`` in ``stripe``.

    Data goes before parity, and zeros that need no fetching before both; the wanted unit itself is not used. An empty
    list where the wanted unit has no bytes. Unrecoverable, with the numbers, if fewer than k parts are available.
    """
    begin, end = geometry.unit_range(wanted_position, stripe)
    if begin == end:
        return []
    index = geometry.code_index(wanted_position, stripe)
    what = f"the data of position {wanted_position} in stripe {stripe}"
    return _choose(geometry, stripe, index, what, data_available, parity_available)


def reencode_plan(
    geometry: StripeGeometry,
    stripe: int,
    wanted_row: int,
    data_available: Set[int],
    parity_available: Set[int],
) -> list[Part]:
    """
    Return the k parts from which to compute parity ``wanted_row`` of ``stripe`` anew: its data, if that is all there.

    The same choice and errors as ``decode_plan``. The codec's wanted index is ``k + wanted_row``.
    """
    StripeGeometry._check("row", wanted_row, geometry.m)
    if not geometry.parity_length(stripe):
        return []
    what = f"parity row {wanted_row} of stripe {stripe}"
    return _choose(geometry, stripe, geometry.k + wanted_row, what, data_available, parity_available)


def _choose(
    geometry: StripeGeometry, stripe: int, wanted: int, what: str, data_available: Set[int], parity_available: Set[int]
) -> list[Part]:
    _check_positions(geometry, data_available | parity_available)
    zeros: list[Part] = []
    parts: list[Part] = []
    for index, position in enumerate(geometry.contributors(stripe)):
        begin, end = geometry.unit_range(position, stripe)
        part = Part(position=position, is_parity=False, row=None, index=index, begin=begin, end=end)
        if begin == end:
            zeros.append(part)
        elif index != wanted and position in data_available:
            parts.append(part)
    for row, position in enumerate(geometry.holders(stripe)):
        if geometry.k + row != wanted and position in parity_available:
            lies = geometry.parity_row(stripe, row)[1]
            end = lies.offset + lies.length
            parts.append(
                Part(position=position, is_parity=True, row=row, index=geometry.k + row, begin=lies.offset, end=end)
            )
    chosen = zeros + parts
    if len(chosen) < geometry.k:
        have = ", ".join(f"{'parity' if p.is_parity else 'data'} of {p.position}" for p in chosen) or "nothing"
        raise Unrecoverable(f"{what} needs {geometry.k} other parts, but there are {len(chosen)}: {have}")
    return chosen[: geometry.k]


def _has_unit(geometry: StripeGeometry, position: int, stripe: int) -> bool:
    begin, end = geometry.unit_range(position, stripe)
    return begin < end


def _check_positions(geometry: StripeGeometry, positions: Iterable[int]) -> None:
    if strange := sorted(p for p in positions if not 0 <= p < geometry.n):
        raise LayoutError(f"positions {_listed(strange)} do not exist; there are {geometry.n}")


def _listed(positions: Sequence[int]) -> str:
    return ", ".join(map(str, positions)) or "none"


def _round_up(value: int, granule: int) -> int:
    return -(-value // granule) * granule
