"""Mutual TLS: whoever has a certificate of the CA is served, nobody else, in neither direction."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from snapshotd.errors import AccessDenied, PeerError, PeerUnreachable, UsageError
from snapshotd.security import TlsFiles
from snapshotd.transfer import BulkClient, BulkServer
from snapshotd.v1.bulk_pb2 import ObjectKey, SlotKey

MIB = 1 << 20
KEY = ObjectKey(job="j", epoch=1, step=1, slot=SlotKey(rank=0))
Serve = Callable[..., BulkServer]


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        self.certificate = self._build(self.name, self.key, is_ca=True)
        (folder / "ca.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _build(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if is_ca:
            usage = dict.fromkeys(
                ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
                + ["encipher_only", "decipher_only"],
                False,
            )
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        else:
            names = [x509.DNSName("node.example"), x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, name: str, allowed: frozenset[str] = frozenset(), ca: Path | None = None) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._build(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, is_ca=False)
        cert_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return TlsFiles(cert=cert_path, key=key_path, ca=ca or self.folder / "ca.pem", allowed_names=allowed)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "others")


def test_round_trip(ours: Authority, shelf, make_thing, serve: Serve) -> None:
    thing = shelf.put(KEY, make_thing(3 * MIB + 5))
    server = serve(tls=ours.issue("a", frozenset({"b"})).server_context())
    allowed = frozenset({"10.0.0.1"})
    with BulkClient(tls=ours.issue("b", allowed).client_context()) as client:
        for _ in range(2):
            info = client.digests(server.address_text, KEY)
            out = bytearray(info.file_bytes)
            client.read_verified(
                server.address_text, KEY, [(0, out)], digests=info.digests, file_bytes=info.file_bytes
            )
            assert out == thing.view
    assert server.counters()["connections"] == 1


def test_a_hold_inside_tls(ours: Authority, shelf, make_thing, serve: Serve) -> None:
    thing = shelf.put(KEY, make_thing(MIB))
    server = serve(tls=ours.issue("a").server_context())
    with BulkClient(tls=ours.issue("b").client_context()) as client:
        with client.hold(server.address_text, [KEY], renew_s=0.01):
            deadline = time.monotonic() + 10
            while server.counters()["requests"] < 5:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert thing.num_readers == 1
        server.close()
        assert thing.num_readers == 0


def _refused(client: BulkClient, server: BulkServer, error: type[Exception]) -> None:
    for _ in range(5):  # who hangs up first is a race; the answer must not be
        with pytest.raises(error):
            client.digests(server.address_text, KEY)
    assert server.counters()["requests"] == 0


def test_a_client_of_another_ca(ours: Authority, others: Authority, shelf, make_thing, serve: Serve) -> None:
    shelf.put(KEY, make_thing(100))
    server = serve(tls=ours.issue("a").server_context())
    stranger = others.issue("stranger", ca=ours.folder / "ca.pem")
    with BulkClient(tls=stranger.client_context()) as client:
        _refused(client, server, AccessDenied)
    server.close()  # its threads count after the alert has left
    assert server.counters()["refused"] == 5


def test_a_server_of_another_ca(ours: Authority, others: Authority, shelf, make_thing, serve: Serve) -> None:
    """Nobody may pretend to be a daemon and feed a job foreign state."""
    shelf.put(KEY, make_thing(100))
    server = serve(tls=others.issue("stranger", ca=ours.folder / "ca.pem").server_context())
    with BulkClient(tls=ours.issue("b").client_context()) as client:
        _refused(client, server, AccessDenied)


def test_names_that_are_not_allowed(ours: Authority, shelf, make_thing, serve: Serve) -> None:
    shelf.put(KEY, make_thing(100))
    server = serve(tls=ours.issue("a").server_context())
    with BulkClient(tls=ours.issue("b", frozenset({"else"})).client_context()) as client:
        _refused(client, server, AccessDenied)
    strict = serve(tls=ours.issue("c", frozenset({"else"})).server_context())
    with BulkClient(tls=ours.issue("b").client_context()) as client:
        _refused(client, strict, PeerError)


def test_plain_text_to_tls_and_tls_to_plain_text(ours: Authority, shelf, make_thing, serve: Serve) -> None:
    shelf.put(KEY, make_thing(100))
    with BulkClient() as client:
        _refused(client, serve(tls=ours.issue("a").server_context()), PeerError)
    with BulkClient(tls=ours.issue("b").client_context()) as client:
        _refused(client, serve(), AccessDenied)


def test_a_handshake_that_never_comes(ours: Authority, serve: Serve) -> None:
    server = serve(tls=ours.issue("a").server_context(), timeout_s=0.2)
    with socket.create_connection(server.address) as sock:
        sock.settimeout(10)
        assert sock.recv(1) == b""


def test_a_server_that_never_shakes_hands(ours: Authority) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        BulkClient(tls=ours.issue("b").client_context(), timeout_s=0.2) as client,
        pytest.raises(PeerUnreachable, match="handshake"),
    ):
        client.digests(f"127.0.0.1:{listener.getsockname()[1]}", KEY)


def test_files_that_are_not_there_or_not_what_they_should_be(
    ours: Authority, others: Authority, tmp_path: Path
) -> None:
    good = ours.issue("a")
    key, cert, ca = good.pems()
    assert (b"PRIVATE KEY" in key, b"CERTIFICATE" in cert, ca) == (True, True, good.ca.read_bytes())
    junk = tmp_path / "junk"
    junk.write_text("junk")
    for bad in (
        TlsFiles(cert=good.cert, key=others.issue("x").key, ca=good.ca),
        TlsFiles(cert=tmp_path / "none", key=good.key, ca=good.ca),
        TlsFiles(cert=good.cert, key=good.key, ca=junk),
        TlsFiles(cert=junk, key=good.key, ca=good.ca),
    ):
        for make in (bad.server_context, bad.client_context):
            with pytest.raises(UsageError, match="cannot use the TLS files"):
                make()
    with pytest.raises(UsageError, match="cannot read"):
        TlsFiles(cert=tmp_path / "none", key=good.key, ca=good.ca).pems()
