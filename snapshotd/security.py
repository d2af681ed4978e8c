"""
Who may speak to whom: certificates between hosts, user ids on one host, modes of files and sockets.

Rule 1: everything on disk is 0600 in a 0700 directory of our own uid, checked and never repaired silently.
Rule 2: an address that is not loopback needs TLS with certificates on both sides, or the word insecure.
Rule 3: on loopback the kernel says which user connected; only our own uid and root are served.
Rule 4: what cannot be determined is denied.

Digests are no defence against an attacker; these rules are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import ssl
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from snapshotd.errors import AccessDenied, UsageError

__all__ = [
    "PeerGuard",
    "TlsFiles",
    "bind_unix",
    "is_loopback",
    "loopback_peer_uid",
    "loopback_uid_of",
    "peer_uid_of_unix",
    "private_directory",
    "require_secure",
    "tls_files",
]

_UNIX_PATH_BYTES_MAX: Final = 107
_HELD_STATES: Final = ("01", "04", "05", "08")  # established, or closed in one direction


# ------------------------------------------------------------------------------------------------ TLS


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """
    Paths of this process's certificate chain, its private key, and the CA that all peers' certificates come from.

    Both sides show a certificate, TLS 1.2 at least. Nodes are addressed by IP and come and go, so host names are not
    compared; whoever has a certificate of the CA belongs to the cluster. ``allowed_names`` narrows that: one of the
    peer's names (DNS, IP or URI of subjectAltName, or the common name) must be in it, exactly.
    """

    cert: Path
    key: Path
    ca: Path
    allowed_names: frozenset[str] = frozenset()

    def server_context(self) -> ssl.SSLContext:
        """Return the context for listening sockets. UsageError when a file is missing or is not what it should be."""
        return self._load(_PeerContext(ssl.PROTOCOL_TLS_SERVER))

    def client_context(self) -> ssl.SSLContext:
        """Return the context for connecting sockets. UsageError as for server_context()."""
        return self._load(_PeerContext(ssl.PROTOCOL_TLS_CLIENT))

    def pems(self) -> tuple[bytes, bytes, bytes]:
        """
        Return (private key, certificate chain, CA) in PEM, in the order that gRPC's credentials take key and chain.

        UsageError when one cannot be read. gRPC compares host names on its own terms and knows no ``allowed_names``.
        """
        try:
            return self.key.read_bytes(), self.cert.read_bytes(), self.ca.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read a TLS file: {error}") from error

    def _load(self, context: _PeerContext) -> ssl.SSLContext:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.allowed_names = self.allowed_names
        try:
            context.load_verify_locations(cafile=self.ca)
            # The callback keeps a forgotten pass phrase from being asked for on the terminal of a daemon.
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise UsageError(f"cannot use the TLS files {self.cert}, {self.key}, {self.ca}: {error}") from error
        return context


def tls_files(cert: str, key: str, ca: str) -> TlsFiles | None:
    """The three TLS files, or None when none is named; UsageError when only some are."""
    if not (cert or key or ca):
        return None
    if not (cert and key and ca):
        raise UsageError("TLS between hosts is mutual: give all of --tls-cert, --tls-key and --tls-ca")
    return TlsFiles(cert=Path(cert), key=Path(key), ca=Path(ca))


class _PeerSocket(ssl.SSLSocket):
    """A TLS socket whose handshake fails for a peer that is not on its context's list."""

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        allowed = self.context.allowed_names if isinstance(self.context, _PeerContext) else frozenset()
        if not allowed:
            return
        names = _names_of(self)
        if not allowed & names:
            raise AccessDenied(f"the peer's certificate is for {sorted(names)}; allowed are {sorted(allowed)}")


class _PeerContext(ssl.SSLContext):
    allowed_names: frozenset[str] = frozenset()
    sslsocket_class = _PeerSocket


def _names_of(sock: ssl.SSLSocket) -> frozenset[str]:
    certificate = sock.getpeercert() or {}
    names: set[str] = set()
    for entry in certificate.get("subjectAltName", ()):
        kind, value = entry[0], entry[1]
        if kind in ("DNS", "IP Address", "URI"):
            names.add(str(value))
    for relative_name in certificate.get("subject", ()):
        for pair in relative_name:
            if pair[0] == "commonName":
                names.add(str(pair[1]))
    return frozenset(names)


# ------------------------------------------------------------------------------------------------ addresses


def is_loopback(host: str) -> bool:
    """Return whether ``host`` surely means this machine alone: localhost, 127.0.0.0/8, ::1, or a ``unix:`` path."""
    if host.startswith("unix:") or host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return (_unmapped(address)).is_loopback


def require_secure(host: str, tls: object | None, insecure: bool) -> None:
    """
    Raise UsageError when bytes to or from ``host`` could be read or forged on the way, and say what to do.

    ``tls`` is anything but None when TLS will be used. Names other than localhost are taken for other hosts.
    """
    if tls is not None or insecure or is_loopback(host):
        return
    raise UsageError(
        f"{host or 'every interface'} is not loopback: other machines would be served in plain text, without knowing "
        "who they are. Give --tls-cert, --tls-key and --tls-ca, use 127.0.0.1, or say --insecure on a network "
        "that you trust as you trust this machine"
    )


# ------------------------------------------------------------------------------------------------ peers


class PeerGuard:
    """
    Decides whether the other end of an accepted connection is served.

    Unix sockets and loopback TCP: the connecting user must be in ``allowed_uids`` (default: our own effective uid and
    root; root is always allowed). TLS has checked a certificate instead. Other plain TCP is served only when
    ``insecure``, which also serves loopback peers whose user cannot be determined (another network namespace).
    """

    def __init__(self, allowed_uids: Iterable[int] | None = None, *, insecure: bool = False) -> None:
        uids = {os.geteuid()} if allowed_uids is None else set(allowed_uids)
        self.allowed_uids = frozenset(uids | {0})
        self.insecure = insecure

    def check(self, sock: socket.socket, *, encrypted: bool = False) -> None:
        """Return for a peer that may be served; raise AccessDenied with the reason for any other."""
        if sock.family == socket.AF_UNIX:
            self._check_uid(peer_uid_of_unix(sock))
            return
        if encrypted or self.insecure:
            return
        try:
            host = sock.getpeername()[0]
        except OSError as error:
            raise AccessDenied(f"the peer is gone: {error}") from error
        if not is_loopback(str(host)):
            raise AccessDenied(f"{host} spoke plain text from another machine; use TLS on both sides")
        uid = loopback_peer_uid(sock)
        if uid is None:
            raise AccessDenied("which local user connected cannot be determined (another network namespace?)")
        self._check_uid(uid)

    def _check_uid(self, uid: int) -> None:
        if uid not in self.allowed_uids:
            raise AccessDenied(f"user {uid} is not served here, only {sorted(self.allowed_uids)}")


def peer_uid_of_unix(sock: socket.socket) -> int:
    """Return the effective uid that the other end of a Unix socket had when it connected."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def loopback_peer_uid(sock: socket.socket, *, proc: Path = Path("/proc/self/net")) -> int | None:
    """
    Return the uid of the local socket at the other end of the loopback TCP connection ``sock``; None if unknown.

    The kernel's socket table is searched for the connection seen from the other side. Only a socket that
    somebody holds counts: the kernel shows uid 0 for one whose owner has closed it, which must not pass for root.
    """
    try:
        theirs, ours = _endpoint(sock.getpeername()), _endpoint(sock.getsockname())
    except (OSError, ValueError):
        return None
    return _uid_of(theirs, lambda address: address == ours, proc)


def loopback_uid_of(host: str, port: int, *, to_port: int, proc: Path = Path("/proc/self/net")) -> int | None:
    """The same for a connection from ``host``:``port`` to our ``to_port``, where the socket itself is out of reach."""
    try:
        theirs = _endpoint((host, port))
    except ValueError:
        return None
    return _uid_of(theirs, lambda address: address is not None and address[1] == to_port, proc)


def _uid_of(
    theirs: tuple[_Address, int], is_ours: Callable[[tuple[_Address, int] | None], bool], proc: Path
) -> int | None:
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), (proc / name).open(encoding="ascii", errors="replace") as table:
            next(table, None)
            for line in table:
                fields = line.split()
                if len(fields) < 10 or fields[3] not in _HELD_STATES or fields[9] == "0":
                    continue
                if _table_endpoint(fields[1]) == theirs and is_ours(_table_endpoint(fields[2])):
                    return int(fields[7])
    return None


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _unmapped(address: _Address) -> _Address:
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped if isinstance(mapped, ipaddress.IPv4Address) else address


def _endpoint(name: tuple[object, ...]) -> tuple[_Address, int]:
    host, _, _ = str(name[0]).partition("%")
    return _unmapped(ipaddress.ip_address(host)), int(str(name[1]))


def _table_endpoint(text: str) -> tuple[_Address, int] | None:
    """Decode ``0100007F:1F90``: 32-bit words in the machine's own byte order, then the port."""
    try:
        host, _, port = text.partition(":")
        raw = bytes.fromhex(host)
        if sys.byteorder == "little":
            raw = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
        return _unmapped(ipaddress.ip_address(raw)), int(port, 16)
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------ files


def private_directory(path: Path) -> Path:
    """
    Create ``path`` (0700, with its parents) or check the one that is there; return it as an absolute path.

    UsageError for anything that others could reach into: a symbolic link, another owner, group or other access.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise UsageError(f"cannot use {path} as a directory: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is not a directory (symbolic links are not followed)")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to user {status.st_uid}, this process is user {os.geteuid()}; choose another")
    if status.st_mode & 0o077:
        raise UsageError(
            f"{path} has mode {status.st_mode & 0o777:04o}, so that other users can reach in: chmod 700 it"
        )
    return path


def bind_unix(path: Path, *, backlog: int = 128) -> socket.socket:
    """
    Return a listening Unix stream socket at ``path``, mode 0600 before anybody can connect.

    A socket that nobody listens on any more is replaced; one that answers is never stolen, nor is another kind of file
    touched: UsageError. ``path.lock`` beside it keeps two starting daemons apart. The caller closes and unlinks.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
        raise UsageError(f"{path} is too long for a socket's name ({_UNIX_PATH_BYTES_MAX} bytes); choose a shorter one")
    sock: socket.socket | None = None
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _remove_stale_socket(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(os.fspath(path))
            os.chmod(path, 0o600)
            sock.listen(backlog)
            return sock
        finally:
            os.close(lock)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if isinstance(error, OSError):
            raise UsageError(f"cannot listen at {path}: {error}") from error
        raise


def _remove_stale_socket(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise UsageError(f"{path} exists and is not a socket; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise UsageError(f"another process is listening at {path}; stop it or choose another --socket")
    if code != errno.ECONNREFUSED:
        raise UsageError(f"cannot tell whether anybody listens at {path}: {os.strerror(code)}")
    path.unlink()
