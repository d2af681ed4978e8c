"""Exchange: a slot from one process to another, tmpfs to tmpfs, verified, against a plain recv_into loop; pacing."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from snapshotd.layout import CHUNK_BYTES
from snapshotd.transfer import BulkClient, Pacer
from snapshotd.v1.bulk_pb2 import ObjectKey, SlotKey

from .. import Row, Run, Series
from ..owner import PIECE_BYTES, RANGE, certificate
from ..processes import Child, wait_for

GOAL = 6
SECONDS = 32

_PEER = "127.0.0.1"
_KEY = ObjectKey(job="bench", epoch=1, step=1, slot=SlotKey(rank=0))
_PACED = 1 << 28


def rows(run: Run) -> Iterator[Row]:
    size = run.size(600e6)
    run.memory(size)
    target = run.memory(size, fill=False)
    cert, key = run.directory / "cert.pem", run.directory / "key.pem"
    tls = _make_certificate(cert, key)
    owner, found = _start_owner(run, [str(cert), str(key)] if tls else [])
    digests = bytes.fromhex(found["digests"])
    for name in ("plain", "tls"):
        if name == "tls" and not tls:
            yield Row.note("exchange over mutual TLS", "there is no openssl to make a certificate with")
            continue
        context = certificate(str(cert), str(key)).client_context() if name == "tls" else None
        ports = found[f"ours-{name}"], found[f"floor-{name}"]
        for streams in (1, 2):
            series = _measure(run, ports, streams, context, target, digests, owner.pid)
            yield from _judged(run, series, size, streams, tls=name == "tls")
    yield _paced(run, f"{_PEER}:{found['ours-plain']}", target, digests)


def _measure(
    run: Run,
    ports: tuple[int, int],
    streams: int,
    context: ssl.SSLContext | None,
    target: memoryview,
    digests: bytes,
    owner: int,
) -> dict[str, Series]:
    size = target.nbytes
    ends = _ends(size, streams)
    with (
        BulkClient(tls=context, connections_per_peer=streams) as client,
        _Plain(ports[1], streams, context) as plain,
        ThreadPoolExecutor(streams) as pool,
    ):

        def ours(begin: int) -> None:
            pieces = [(begin, target[begin : ends[begin]])]
            client.read_verified(f"{_PEER}:{ports[0]}", _KEY, pieces, digests=digests, file_bytes=size)

        ways: dict[str, Callable[[], None]] = {
            "ours": lambda: _all(pool, ours, list(ends)),
            "floor": lambda: plain.read(pool, target),
        }
        return run.rounds(ways, rounds=7, within_s=10.0, pids=[owner])


def _judged(run: Run, series: dict[str, Series], size: int, streams: int, *, tls: bool) -> Iterator[Row]:
    what = f"exchange{' over mutual TLS' if tls else ''}, verified, {streams} stream{'s'[: streams - 1]}"
    against = f"plain {'TLS' if tls else 'TCP'} sendall and recv_into"
    ours, floor = series["ours"], series["floor"]
    yield Row.speed(what, ours, floor, at_least=0.85, against=against, nbytes=size)
    at_most = None if run.short else 1.2  # CPU time of others is counted in hundredths of a second
    cpu = Series(ours.cpu_s), Series(floor.cpu_s)
    yield Row.cost(f"{what}: CPU of both ends", *cpu, at_most=at_most, against=against)


def _paced(run: Run, address: str, target: memoryview, digests: bytes) -> Row:
    """How long a paced transfer takes, against how long it should."""
    size = min(target.nbytes, _PACED // 2)
    rate = size if run.short else _PACED / 2

    def ours() -> None:
        pace = Pacer(rate)
        with BulkClient() as client:
            client.read_verified(
                address, _KEY, [(0, target[:size])], digests=digests, file_bytes=target.nbytes, pace=pace
            )

    series = run.rounds({"ours": ours}, rounds=5, within_s=12.0, warm=0)["ours"]
    floor = Series((size / rate,))
    off = [abs(seconds / floor.median - 1) for seconds in series.values]
    text = f"at most {max(off):.1%} off in {len(off)} rounds; the goal is 5% either way"
    return Row.cost(
        f"paced to {rate / 1e6:.0f} MB/s", series, floor, at_most=1.05, against="bytes over the pace", text=text
    )


class _Plain:
    """Connections to the plain loop, one per stream."""

    def __init__(self, port: int, streams: int, context: ssl.SSLContext | None) -> None:
        self._streams = streams
        self._socks = [socket.create_connection((_PEER, port)) for _ in range(streams)]
        if context is not None:
            self._socks = [context.wrap_socket(sock, server_hostname=_PEER) for sock in self._socks]

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *error: object) -> None:
        for sock in self._socks:
            sock.close()

    def read(self, pool: ThreadPoolExecutor, target: memoryview) -> None:
        ends = _ends(target.nbytes, self._streams)

        def one(item: tuple[socket.socket, int]) -> None:
            sock, begin = item
            end = ends[begin]
            sock.sendall(RANGE.pack(begin, end))
            at = begin
            while at < end:
                at += sock.recv_into(target[at : min(at + PIECE_BYTES, end)])

        _all(pool, one, list(zip(self._socks, ends, strict=True)))


def _all(pool: ThreadPoolExecutor, work: Callable[[Any], None], items: Sequence[Any]) -> None:
    for future in [pool.submit(work, item) for item in items]:
        future.result()


def _ends(size: int, streams: int) -> dict[int, int]:
    """Where each stream begins and ends: whole chunks."""
    begins = [size * i // streams // CHUNK_BYTES * CHUNK_BYTES for i in range(streams)]
    return dict(zip(begins, [*begins[1:], size], strict=True))


def _start_owner(run: Run, tls: list[str]) -> tuple[Child, dict[str, Any]]:
    file = run.directory / "addresses"
    module = f"{__package__.rpartition('.')[0]}.owner"
    child = run.start("owner", ["-m", module, str(run.directory / "memory-0"), str(file), *tls])
    text = wait_for(lambda: file.read_text(encoding="ascii") if file.exists() else "", "the owner", 60.0, of=[child])
    return child, json.loads(text)


def _make_certificate(cert: Path, key: Path) -> bool:
    """One that is its own authority; both ends show it."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return False
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-subj", "/CN=bench", "-days", "2"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
