"""
CRC-32s of torch.save's archives: what ``verify`` compares.

torch writes one for each record (``data.pkl``, each storage, and some notes of its own), and never reads it. After
``torch.serialization.set_crc32_options(False)`` it writes 0 in its place, and so it does for the storages that
``torch.serialization.skip_data`` leaves to be filled later: 0 means that there is none. One record in 2**32 has a
CRC-32 of 0 by chance, and passes as one without.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from snapshotd.errors import CorruptionError
from snapshotd.universal.sources import Source
from snapshotd.universal.stream import Settings
from snapshotd.universal.torchzip import Archive, ZipRecord, records_of

__all__ = ["Compared", "compare_records"]

_SLAB_BYTES: Final = 2 << 20
_GROUP_BYTES: Final = 8 << 20
_GROUP_RECORDS: Final = 256
_WAITING: Final = 4
"""Groups of records that wait for each thread: checkpoints have millions of records, which are not all listed."""


@dataclass(slots=True)
class Compared:
    """How many records match their CRC-32, how many have none, and one line for each that does not match."""

    matching: int = 0
    without: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Compared) -> None:
        self.matching += other.matching
        self.without += other.without
        self.problems += other.problems


def compare_records(archives: Iterable[Archive], settings: Settings, done: int = 0) -> Compared:
    """
    Read all records of ``archives`` and compare their CRC-32s, with the threads and the memory of ``settings``.

    ``done`` bytes of the work that ``settings.progress`` shows were done before.
    """
    return _Comparison(list(archives), settings, done).run()


class _Comparison:
    """One call of compare_records."""

    def __init__(self, archives: Sequence[Archive], settings: Settings, done: int) -> None:
        self.archives, self.settings = archives, settings
        self.done, self.total = done, done + sum(archive.length for archive in archives)
        self.result = Compared()
        self.lock = threading.Lock()
        self.stopped = False
        self.buffers = threading.local()

    def run(self) -> Compared:
        threads = self.settings.num_threads
        running: deque[Future[Compared]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="crc") as pool:
            try:
                for group in self._groups():
                    running.append(pool.submit(self._compare, group))
                    if len(running) > _WAITING * threads:
                        self.result.add(running.popleft().result())
                while running:
                    self.result.add(running.popleft().result())
            except BaseException:
                self.stopped = True
                pool.shutdown(cancel_futures=True)
                raise
        return self.result

    def _groups(self) -> Iterator[list[tuple[Source, ZipRecord]]]:
        """Iterate over all records that have a CRC-32, small ones together: a task costs as much as some 50 KB."""
        group: list[tuple[Source, ZipRecord]] = []
        nbytes = 0
        for archive in self.archives:
            try:
                records = list(records_of(archive))
            except CorruptionError as error:
                self.result.problems.append(str(error))
                continue
            for record in records:
                if not record.crc:
                    self.result.without += 1
                    self._advance(record.nbytes)
                    continue
                if group and (nbytes + record.nbytes > _GROUP_BYTES or len(group) >= _GROUP_RECORDS):
                    yield group
                    group, nbytes = [], 0
                group.append((archive.source, record))
                nbytes += record.nbytes
        if group:
            yield group

    def _compare(self, group: Sequence[tuple[Source, ZipRecord]]) -> Compared:
        found = Compared()
        for source, record in group:
            try:
                got = self._crc(source, record)
            except CorruptionError as error:
                found.problems.append(str(error))
                continue
            if got == record.crc:
                found.matching += 1
                continue
            found.problems.append(
                f"{source.label}: the record {record.name} at [{record.begin}, {record.begin + record.nbytes}) has the "
                f"CRC-32 {got:08x}, expected {record.crc:08x}: the file has changed, or rotted; copy it again, or take "
                "an older checkpoint"
            )
        return found

    def _crc(self, source: Source, record: ZipRecord) -> int:
        if not hasattr(self.buffers, "slab"):
            self.buffers.slab = memoryview(bytearray(_SLAB_BYTES))
        crc, end = 0, record.begin + record.nbytes
        for begin in range(record.begin, end, _SLAB_BYTES):
            if self.stopped:
                break
            part = self.buffers.slab[: min(_SLAB_BYTES, end - begin)]
            source.read_into(begin, part)
            crc = zlib.crc32(part, crc)
            self._advance(part.nbytes)
        return crc

    def _advance(self, nbytes: int) -> None:
        if self.settings.progress is not None:
            with self.lock:
                self.done += nbytes
                self.settings.progress(self.done, self.total)
