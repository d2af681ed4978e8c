"""
Memory arithmetic: what snapshots need, what there is, and a sentence with all the numbers when it is not enough.

Four things limit an arena: the budget that somebody set, the free space of the tmpfs, the memory limits of the
control groups that this process is in, and the machine's available memory. The last three change under our feet, so
a check is a promise to nobody: it refuses early, in words, what would otherwise end in the OOM killer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotd.errors import BudgetError, UsageError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.sizes import format_bytes

__all__ = [
    "Headroom",
    "Need",
    "cgroup_headroom",
    "check",
    "default_budget",
    "headroom",
    "page_bytes",
]

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_UNLIMITED: Final = 1 << 60  # version 1 control groups say 2**63 - 4096 when they mean no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """
    What one node needs, in bytes: ``generations x (slots + parity) + buffers + held``.

    slot_bytes: file bytes of each slot of one generation (one per rank of this node).
    generations: snapshots kept at once; one committed, one being filled: at least 2.
    k, m: data and parity units of the stripes; the parity of a generation is m/k of its slots, or up to m chunks of
        each slot where that is more: no unit is shorter. m = 0: none.
    buffer_bytes: what restores may need on top.
    held_bytes: slots that nobody wants any more, but readers hold.
    """

    slot_bytes: Sequence[int]
    generations: int = 2
    k: int = 1
    m: int = 0
    buffer_bytes: int = 0
    held_bytes: int = 0

    def __post_init__(self) -> None:
        if (
            self.generations < 1
            or self.k < 1
            or self.m < 0
            or min(self.buffer_bytes, self.held_bytes) < 0
            or min(self.slot_bytes, default=0) < 0
        ):
            raise UsageError(f"no such need: {self!r}")

    @property
    def slots_total(self) -> int:
        """Bytes of the slots of one generation, in whole pages."""
        return sum(map(page_bytes, self.slot_bytes))

    @property
    def parity_total(self) -> int:
        """Bytes of parity of one generation, in whole pages."""
        return sum(
            page_bytes(max(-(-size * self.m // self.k), self.m * min(size, CHUNK_BYTES))) for size in self.slot_bytes
        )

    @property
    def total(self) -> int:
        """All bytes."""
        more = page_bytes(self.buffer_bytes) + page_bytes(self.held_bytes)
        return self.generations * (self.slots_total + self.parity_total) + more

    def words(self) -> str:
        """Return the sum in words, with every number in it."""
        slots = (
            f"{len(self.slot_bytes)} slot{'s' * (len(self.slot_bytes) != 1)} of {format_bytes(self.slots_total)} in all"
        )
        parity = f" + parity of {format_bytes(self.parity_total)} (k = {self.k}, m = {self.m})" if self.m else ""
        buffers = f" + {format_bytes(self.buffer_bytes)} for restores" if self.buffer_bytes else ""
        held = f" + {format_bytes(self.held_bytes)} that readers hold" if self.held_bytes else ""
        return f"{self.generations} generations x ({slots}{parity}){buffers}{held} = {format_bytes(self.total)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """Bytes that can still be taken: of the tmpfs, the control groups, the machine. None: not known or no limit."""

    filesystem: int
    cgroup: int | None
    machine: int | None

    @property
    def least(self) -> int:
        """The number that counts."""
        return min(value for value in (self.filesystem, self.cgroup, self.machine) if value is not None)


def page_bytes(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to whole pages, as tmpfs accounts for them."""
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES


def check(need: Need | int, *, budget: int, root: Path, held_bytes: int = 0) -> None:
    """
    Raise BudgetError unless ``need`` fits, with a sentence that has all the numbers.

    Args:
        need: bytes in all, or a Need.
        budget: bytes that the arena may use.
        root: the arena's directory (it, or a folder above it, must exist).
        held_bytes: the part of ``need`` that the arena holds already, and that is therefore missing from what is free.
    """
    total, words = (need.total, need.words()) if isinstance(need, Need) else (need, format_bytes(need))
    if total < 0 or held_bytes < 0:
        raise UsageError(f"cannot check a need of {total} bytes, {held_bytes} of them held")
    room = headroom(root)
    rest = max(0, total - held_bytes)
    there = (
        f"there is: budget {format_bytes(budget)}, of which {format_bytes(held_bytes)} are held; {_words(room, root)}"
    )
    less = "keep fewer generations, use a smaller m, or shard the state over more nodes"
    if total > budget:
        raise BudgetError(
            f"{words} is needed, more than the budget of {format_bytes(budget)}; {there}. "
            f"Set --budget to {format_bytes(total)} or more; else {less}"
        )
    if rest > room.filesystem:
        raise BudgetError(
            f"{words} is needed, {format_bytes(rest)} of it new, more than the file system has free; {there}. "
            f"Put --arena on a larger tmpfs (mount -o remount,size=...); else {less}"
        )
    if room.cgroup is not None and rest > room.cgroup:
        raise BudgetError(
            f"{words} is needed, {format_bytes(rest)} of it new, more than the control group's memory limit leaves; "
            f"{there}. Raise the container's memory limit; else {less}"
        )
    if room.machine is not None and rest > room.machine:
        raise BudgetError(
            f"{words} is needed, {format_bytes(rest)} of it new, more than the machine has available; {there}. "
            f"Free memory on this machine; else {less}"
        )


def headroom(root: Path) -> Headroom:
    """Return what can still be taken below ``root`` (or the nearest folder above it that exists)."""
    status = os.statvfs(_existing(root))
    return Headroom(
        filesystem=status.f_bavail * status.f_frsize,
        cgroup=cgroup_headroom(),
        machine=_machine_available(),
    )


def default_budget(root: Path) -> int:
    """Return half of what tmpfs, control groups and machine leave, counting what an arena at ``root`` holds as free."""
    held = 0
    for folder in ("slots", "parity", "buffers"):
        try:
            with os.scandir(root / folder) as entries:
                held += sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
        except OSError:  # no arena yet, or a file vanished: a guess stays a guess
            continue
    return (headroom(root).least + held) // 2


def cgroup_headroom(*, proc: Path = Path("/proc/self"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """
    Return the bytes that the tightest memory limit above this process leaves; None without any limit.

    Best effort, versions 1 and 2: clean page cache counts as free (the kernel gives it up), swap does not.
    """
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[int] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            tops = [mount, mount / "unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            tops = [mount / "memory"]
        else:
            continue
        for top in tops:
            for folder in _upwards(top, path):
                left = _group_leaves(folder, *names)
                if left is not None:
                    found.append(left)
    return min(found, default=None)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """Yield the group's folder and all above it. Inside a container the path may not exist: then just the top."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for length in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:length])


def _group_leaves(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit_text = (folder / limit_name).read_text().strip()
        if limit_text == "max" or int(limit_text) >= _UNLIMITED:
            return None
        used = int((folder / usage_name).read_text())
        cache = _field(folder / "memory.stat", cache_name) or 0
        return max(0, int(limit_text) - max(0, used - cache))
    except (OSError, ValueError):
        return None


def _machine_available() -> int | None:
    kibibytes = _field(Path("/proc/meminfo"), "MemAvailable:")
    return None if kibibytes is None else kibibytes * 1024


def _field(path: Path, name: str) -> int | None:
    """Return the number after ``name`` in a file of ``name number`` lines."""
    try:
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == name:
                return int(words[1])
    except (OSError, ValueError):
        return None
    return None


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _words(room: Headroom, root: Path) -> str:
    parts = [f"{format_bytes(room.filesystem)} free on the file system of {root}"]
    if room.cgroup is not None:
        parts.append(f"{format_bytes(room.cgroup)} left by the control group")
    if room.machine is not None:
        parts.append(f"{format_bytes(room.machine)} available on the machine")
    return ", ".join(parts)
