"""Things to serve, servers that end with the test, and a check that nothing is left behind."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from snapshotd import failpoints
from snapshotd.arena import KeyId, key_id
from snapshotd.layout.digest import chunk_digests, root_digest
from snapshotd.transfer import BulkClient, BulkServer
from snapshotd.v1.bulk_pb2 import ObjectKey


@dataclass
class Thing:
    """Something to serve."""

    view: memoryview
    digests: bytes | None = None
    num_readers: int = 0

    @property
    def file_bytes(self) -> int:
        return self.view.nbytes

    @property
    def root(self) -> str:
        return root_digest(self.digests or b"")


def make_thing(nbytes: int) -> Thing:
    data = bytearray(random.Random(nbytes).randbytes(nbytes))
    return Thing(memoryview(data), chunk_digests(data, nbytes))


@dataclass
class Shelf:
    """A lookup, as an arena has it."""

    things: dict[KeyId, Thing] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, key: ObjectKey, thing: Thing) -> Thing:
        self.things[key_id(key)] = thing
        return thing

    def lookup(self, key: ObjectKey) -> Reading | None:
        thing = self.things.get(key_id(key))
        return None if thing is None else Reading(self, thing)


class Reading:
    """A lease on a thing."""

    def __init__(self, shelf: Shelf, thing: Thing) -> None:
        self.shelf, self.obj = shelf, thing
        with shelf.lock:
            thing.num_readers += 1

    def close(self) -> None:
        with self.shelf.lock:
            self.obj.num_readers -= 1


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No test may leave a thread or a descriptor; daemons run for months."""
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    yield
    failpoints.configure(None)
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
    assert set(threading.enumerate()) - threads == set()
    left = {name: _target(name) for name in set(os.listdir("/proc/self/fd")) - descriptors}
    assert [target for target in left.values() if target.startswith("socket:")] == []


def _target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""


@pytest.fixture(name="make_thing")
def _make_thing() -> Callable[[int], Thing]:
    return make_thing


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def serve(shelf: Shelf) -> Iterator[Callable[..., BulkServer]]:
    with ExitStack() as stack:

        def start(**options: object) -> BulkServer:
            return stack.enter_context(BulkServer(("127.0.0.1", 0), shelf.lookup, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture
def server(serve: Callable[..., BulkServer]) -> BulkServer:
    return serve()


@pytest.fixture
def client() -> Iterator[BulkClient]:
    with BulkClient(timeout_s=10) as client:
        yield client
