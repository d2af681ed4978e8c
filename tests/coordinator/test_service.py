"""The coordinator as a process: who is served, the launchers' key-value space, TLS, clean ends."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Start = Callable[..., "Coordinator"]


class Coordinator:
    """A coordinator process of our own, and its address once it serves."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.flags = flags
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "snapshotd", "coordinator", "--listen", "127.0.0.1:0"]
            + ["--state", str(directory / "state"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("snapshotd coordinator on "):
            raise AssertionError(line + self.process.communicate()[1])
        self.address = line.split()[-1]

    def stop(self) -> int:
        self.process.terminate()
        self.process.communicate(timeout=10)
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Coordinator] = []

    def start(*flags: str, directory: Path = tmp_path) -> Coordinator:
        coordinator = Coordinator(directory, *flags)
        running.append(coordinator)
        return coordinator

    yield start
    for coordinator in running:
        if coordinator.process.poll() is None:
            coordinator.process.kill()
        coordinator.process.communicate()


# gRPC stays out of the tests' own process: others fork in it.
_STUB = (
    "import grpc, sys\n"
    "from snapshotd.v1 import control_pb2 as c, control_pb2_grpc as g\n"
    "stub = g.CoordinatorServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
)


def run(program: str, address: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program, address], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def status(address: str, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snapshotd", "status", "--json", "--coordinator", address, *flags],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environ},
    )


def test_serves_its_user_and_ends_cleanly(start: Start) -> None:
    coordinator = start()
    answer = status(coordinator.address)
    assert (answer.returncode, json.loads(answer.stdout)["nodes"]) == (0, [])
    assert coordinator.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_local_user_is_not_served(start: Start) -> None:
    """On a shared machine anybody could otherwise forget somebody's job."""
    coordinator = start()
    program = (
        "import grpc, os, sys\n"
        "from snapshotd.v1 import control_pb2 as c, control_pb2_grpc as g\n"
        "os.setgid(65534); os.setuid(65534)  # what it needs was imported before: it may not read our files\n"
        "stub = g.CoordinatorServiceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "for call in (lambda: stub.GetStatus(c.GetStatusRequest(), timeout=5),\n"
        "             lambda: next(iter(stub.NodeSession(iter([c.NodeMessage()]), timeout=5)))):\n"
        "    try:\n"
        "        call(); print('served')\n"
        "    except grpc.RpcError as error: print(error.code().name)\n"
    )
    assert run(program, coordinator.address).split() == ["PERMISSION_DENIED", "PERMISSION_DENIED"]


def test_key_values_wait_count_once_and_survive_a_restart(start: Start) -> None:
    """Launchers agree on ranks through it; a coordinator that dies in between must not lose the first's word."""
    coordinator = start()
    program = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(1)\n"
        "get = c.KvGetRequest(job='j', epoch=3, keys=['a', 'b'], timeout_ms=20_000)\n"
        "waiting = pool.submit(stub.KvGet, get)\n"
        "for key in ('a', 'b'):\n"
        "    assert not waiting.done()\n"
        "    stub.KvSet(c.KvSetRequest(job='j', epoch=3, entries={key: key.encode()}))\n"
        "print(*waiting.result(20).values)\n"
        "once = c.KvAddRequest(job='j', epoch=3, key='n', amount=2, request_id='x')\n"
        "print(stub.KvAdd(once).value, stub.KvAdd(once).value)\n"
        "print(stub.KvGet(c.KvGetRequest(job='j', epoch=2, keys=['a'], timeout_ms=1)).found)\n"
        "stub.KvSet(c.KvSetRequest(job='j', epoch=4, entries={'c': b'1'}))\n"
    )
    assert run(_STUB + program, coordinator.address).splitlines() == ["b'a' b'b'", "2 2", "False"]
    coordinator.process.kill()
    coordinator.process.communicate()

    again = start()
    program = "print(*stub.KvGet(c.KvGetRequest(job='j', epoch=4, keys=['c'], timeout_ms=1000)).values)\n"
    assert run(_STUB + program, again.address).strip() == "b'1'"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--listen", "0.0.0.0:0"], "not loopback"),
        (["--listen", "nonsense"], "HOST:PORT"),
        (["--log-level", "LOUD"], "DEBUG, INFO"),
        (["--parity", "-1"], "at least 0"),
    ],
)
def test_bad_usage_ends_with_2_and_says_why(tmp_path: Path, flags: list[str], words: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "snapshotd", "coordinator", "--state", str(tmp_path / "s"), *flags],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nobody_at_the_address_ends_with_3() -> None:
    answer = status("127.0.0.1:1")
    assert answer.returncode == 3
    assert "127.0.0.1:1" in answer.stderr


def test_mutual_tls(start: Start, tmp_path: Path) -> None:
    """Between hosts, whoever has no certificate of the cluster's authority learns nothing and changes nothing."""
    ours = certificates(tmp_path / "ours")
    others = certificates(tmp_path / "others")
    flags = ["--tls-cert", ours["cert"], "--tls-key", ours["key"], "--tls-ca", ours["ca"]]
    coordinator = start(*flags)
    assert status(coordinator.address, *flags).returncode == 0
    assert status(coordinator.address).returncode == 3
    stranger = ["--tls-cert", others["cert"], "--tls-key", others["key"], "--tls-ca", ours["ca"]]
    assert status(coordinator.address, *stranger).returncode == 3


def certificates(directory: Path) -> dict[str, str]:
    """An authority and one certificate for 127.0.0.1, as PEM files."""
    directory.mkdir()
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
    now = datetime.datetime.now(datetime.timezone.utc)

    def build(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    ca = (
        build(ca_name, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    node = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    cert = build(node, key.public_key()).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(ca.public_bytes(pem))
    (directory / "cert.pem").write_bytes(cert.public_bytes(pem))
    (directory / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return {name: str(directory / f"{name}.pem") for name in ("ca", "cert", "key")}
