"""Who is served, and what others can reach: tested with real sockets, files, and (where we are root) users."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotd.errors import AccessDenied, UsageError
from snapshotd.security import (
    PeerGuard,
    bind_unix,
    is_loopback,
    loopback_peer_uid,
    peer_uid_of_unix,
    private_directory,
    require_secure,
)

OTHER_UID = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@contextmanager
def _pair(
    family: socket.AddressFamily, host: str, connect_to: str | None = None
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection over loopback: (accepted, connecting)."""
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with listener:
        other = socket.AF_INET6 if connect_to and ":" in connect_to else family
        with socket.socket(other, socket.SOCK_STREAM) as connecting:
            connecting.connect((connect_to or host, listener.getsockname()[1]))
            accepted, _ = listener.accept()
            with accepted:
                yield accepted, connecting


@pytest.mark.parametrize(
    ("family", "host", "connect_to"),
    [
        (socket.AF_INET, "127.0.0.1", None),
        (socket.AF_INET6, "::1", None),
        (socket.AF_INET, "127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_the_user_at_the_other_end_of_loopback(family: socket.AddressFamily, host: str, connect_to: str | None) -> None:
    with _pair(family, host, connect_to) as (accepted, connecting):
        assert loopback_peer_uid(accepted) == os.geteuid()
        PeerGuard().check(accepted)
        connecting.shutdown(socket.SHUT_WR)
        PeerGuard().check(accepted)


@needs_root
def test_another_user_is_not_served() -> None:
    """On a shared host, every other user can connect to loopback: none may read a job's state."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reached, go = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                # Nothing is imported from here on: the other user may not be able to read our files.
                os.setresuid(OTHER_UID, OTHER_UID, OTHER_UID)
                with socket.socket() as sock:
                    sock.connect(listener.getsockname())
                    os.read(reached, 1)
            finally:
                os._exit(0)
        listener.settimeout(10)
        accepted, _ = listener.accept()
        with accepted:
            assert loopback_peer_uid(accepted) == OTHER_UID
            with pytest.raises(AccessDenied, match="user 12345 is not served"):
                PeerGuard({os.geteuid()}).check(accepted)
            PeerGuard({OTHER_UID}).check(accepted)
        os.write(go, b"x")
        os.waitpid(child, 0)
        os.close(reached)
        os.close(go)


def test_a_closed_peer_does_not_pass_for_root() -> None:
    """The kernel shows uid 0 for a socket that its owner has closed."""
    with _pair(socket.AF_INET, "127.0.0.1") as (accepted, connecting):
        connecting.close()
        assert loopback_peer_uid(accepted) is None
        with pytest.raises(AccessDenied, match="cannot be determined"):
            PeerGuard().check(accepted)
        PeerGuard(insecure=True).check(accepted)
        PeerGuard().check(accepted, encrypted=True)


@pytest.mark.skipif(sys.byteorder != "little", reason="the table below is a little-endian one")
def test_only_the_exact_connection_counts(tmp_path: Path) -> None:
    with _pair(socket.AF_INET, "127.0.0.1") as (accepted, _):
        theirs, ours = accepted.getpeername()[1], accepted.getsockname()[1]
        head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"

        def row(local: str, remote: str, state: str = "01", uid: int = 7, inode: int = 99) -> str:
            return f"   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000  {uid}  0 {inode} 1 0\n"

        def uid_of(*rows: str, name: str = "tcp") -> int | None:
            for empty in ("tcp", "tcp6"):
                (tmp_path / empty).write_text(head)
            (tmp_path / name).write_text(head + "".join(rows))
            return loopback_peer_uid(accepted, proc=tmp_path)

        a, b = f"0100007F:{theirs:04X}", f"0100007F:{ours:04X}"
        mapped = "0000000000000000FFFF0000"
        assert uid_of(row(a, b)) == 7
        assert uid_of(row(mapped + a, mapped + b), name="tcp6") == 7
        for useless in (row(b, a), row(a, b, state="06"), row(a, b, inode=0), row(a, a), "junk\n", row("x:y", b)):
            assert uid_of(useless) is None
        assert uid_of(row(b, a), row(a, b, inode=0), row(a, b, uid=8)) == 8
        (tmp_path / "tcp").unlink()
        (tmp_path / "tcp6").unlink()
        assert loopback_peer_uid(accepted, proc=tmp_path) is None


class _Remote(socket.socket):
    """A socket that claims to come from another machine."""

    def getpeername(self) -> tuple[str, int]:
        return ("192.0.2.1", 5)


def test_plain_text_from_another_machine() -> None:
    with _Remote(socket.AF_INET, socket.SOCK_STREAM) as sock:
        with pytest.raises(AccessDenied, match=r"192\.0\.2\.1 spoke plain text"):
            PeerGuard().check(sock)
        PeerGuard(insecure=True).check(sock)
        PeerGuard().check(sock, encrypted=True)


def test_users_of_a_unix_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_uid_of_unix(left) == os.geteuid()
        PeerGuard().check(left)
        if os.geteuid():
            with pytest.raises(AccessDenied):
                PeerGuard({OTHER_UID}).check(left)


def test_loopback_or_not() -> None:
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1", "unix:/run/x", "LOCALHOST"):
        assert is_loopback(host), host
        require_secure(host, None, False)
    for host in ("", "0.0.0.0", "::", "10.0.0.1", "node-7", "localhost.example.com", "127.0.0.1.example.com"):
        assert not is_loopback(host), host
        with pytest.raises(UsageError, match=r"--tls-cert.*--insecure"):
            require_secure(host, None, False)
        require_secure(host, object(), False)
        require_secure(host, None, True)


# ---------------------------------------------------------------------------------------------- files


def test_private_directory(tmp_path: Path) -> None:
    path = private_directory(tmp_path / "a/b")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert private_directory(path) == path
    path.chmod(0o750)
    with pytest.raises(UsageError, match="chmod 700"):
        private_directory(path)
    path.chmod(0o700)
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for bad in ("link", "file", "dangling", "file/below"):
        with pytest.raises(UsageError):
            private_directory(tmp_path / bad)


@needs_root
def test_a_directory_of_another_user(tmp_path: Path) -> None:
    path = private_directory(tmp_path / "theirs")
    os.chown(path, OTHER_UID, OTHER_UID)
    with pytest.raises(UsageError, match="belongs to user 12345"):
        private_directory(path)


def test_a_live_socket_is_not_stolen_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    old_mask = os.umask(0)
    try:
        first = bind_unix(path)
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with first:
        with pytest.raises(UsageError, match="another process is listening"):
            bind_unix(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
    with bind_unix(path) as second, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        accepted, _ = second.accept()
        accepted.close()


def test_a_busy_socket_is_live_too(tmp_path: Path) -> None:
    """A daemon whose queue is full is not dead."""
    with bind_unix(tmp_path / "s", backlog=0), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "s"))
        with pytest.raises(UsageError, match="another process is listening"):
            bind_unix(tmp_path / "s")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="not a socket"):
        bind_unix(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UsageError, match="too long"):
        bind_unix(tmp_path / ("x" * 120))
    with pytest.raises(UsageError, match="cannot listen at"):
        bind_unix(tmp_path / "no/folder")
