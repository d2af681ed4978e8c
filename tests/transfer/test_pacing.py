"""A daemon that takes more of the network than it may slows the training that it is to protect."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapshotd.errors import UsageError
from snapshotd.transfer import BulkClient, BulkServer, Pacer
from snapshotd.v1.bulk_pb2 import ObjectKey, SlotKey

MIB = 1 << 20


class Time:
    """A clock that is only moved by those who sleep, and oversleep by ``late_s``."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now = 100.0
        self.late_s = late_s

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late_s


@pytest.mark.parametrize("late_s", [0.0, 0.001, 0.009])
@pytest.mark.parametrize("rate", [MIB, 100 * MIB, 3000 * MIB])
def test_the_rate_is_kept_by_those_who_wake_up_late_too(rate: int, late_s: float) -> None:
    clock = Time(late_s)
    pacer = Pacer(rate, clock=lambda: clock.now, sleep=clock.sleep)
    pieces = max(100, 4 * rate // MIB)
    for _ in range(pieces):
        pacer(MIB)
    assert pieces * MIB / rate == pytest.approx(clock.now - 100.0, rel=0.05)


def test_a_pause_is_not_caught_up() -> None:
    """Nothing for a second is no leave for a second's worth at once: that is when the training step needs the wire."""
    clock = Time()
    pacer = Pacer(100 * MIB, clock=lambda: clock.now, sleep=clock.sleep)
    pacer(MIB)
    clock.now += 60.0
    began = clock.now
    for _ in range(100):
        pacer(MIB)
    assert clock.now - began > 0.95


def test_threads_share_the_rate() -> None:
    clock = Time()
    lock = threading.Lock()

    def sleep(seconds: float) -> None:
        with lock:
            clock.now = max(clock.now, before[threading.get_ident()] + seconds)

    before: dict[int, float] = {}

    def now() -> float:
        with lock:
            before[threading.get_ident()] = clock.now
            return clock.now

    pacer = Pacer(100 * MIB, clock=now, sleep=sleep)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: pacer(MIB), range(400)))
    assert 4.0 == pytest.approx(clock.now - 100.0, rel=0.05)


def test_no_pace_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="above 0"):
        Pacer(0)


def test_a_transfer_is_as_slow_as_was_asked_for(shelf, make_thing, server: BulkServer, client: BulkClient) -> None:
    key = ObjectKey(job="j", epoch=1, step=1, slot=SlotKey(rank=0))
    thing = shelf.put(key, make_thing(16 * MIB))
    out = bytearray(16 * MIB)
    pacer = Pacer(20 * MIB)
    began = time.monotonic()
    client.read_verified(
        server.address_text, key, [(0, out)], digests=thing.digests, file_bytes=16 * MIB, pace=pacer
    )
    assert time.monotonic() - began > 0.95 * 16 / 20
    assert out == thing.view
