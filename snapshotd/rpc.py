"""What both ends of the control plane share: channel options, credentials, the check of who is calling."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from urllib.parse import unquote

import grpc

from snapshotd.errors import AccessDenied, UsageError
from snapshotd.security import TlsFiles, is_loopback, loopback_uid_of, require_secure

__all__ = [
    "CHANNEL_OPTIONS",
    "MAX_MESSAGE_BYTES",
    "check_peer",
    "open_aio_channel",
    "open_channel",
    "parse_address",
    "same_user_guard",
    "server_credentials",
]

MAX_MESSAGE_BYTES = 64 << 20

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)

_GUARD_KEEPS = 4096
_GUARD_KEEPS_S = 1.0


def check_peer(peer: str, guard: Callable[[str], bool] | None) -> None:
    """
    Raise AccessDenied unless the guard lets this gRPC peer in.

    peer: as gRPC spells it, "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711".
    """
    if guard is not None and not guard(peer):
        raise AccessDenied(
            f"{peer} is not a process of this user; without TLS only the user's own processes on this machine are "
            "served (use TLS, or --insecure)"
        )


def same_user_guard(port: int) -> Callable[[str], bool]:
    """
    A guard for a plain listener on `port`: loopback peers of this process's user, or root, and nobody else.

    The kernel's socket table says whose a connection is; what was found is kept for a moment: a channel asks often.
    """
    allowed = {0, os.geteuid()}
    known: OrderedDict[str, tuple[float, bool]] = OrderedDict()

    def guard(peer: str) -> bool:
        now = time.monotonic()
        found = known.get(peer)
        if found is not None and now < found[0]:
            return found[1]
        _, _, address = unquote(peer).partition(":")
        try:
            host, peer_port = parse_address(address)
        except UsageError:
            return False
        verdict = is_loopback(host) and loopback_uid_of(host, peer_port, to_port=port) in allowed
        known[peer] = (now + _GUARD_KEEPS_S, verdict)
        while len(known) > _GUARD_KEEPS:
            known.popitem(last=False)
        return verdict

    return guard


def parse_address(text: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port"; raises UsageError that says what is wrong."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65_535:
        raise UsageError(f"{text!r} is not an address; write HOST:PORT, for example 127.0.0.1:7070")
    return host, int(port)


def open_channel(
    address: str,
    *,
    tls: TlsFiles | None,
    insecure: bool,
    options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS,
) -> grpc.Channel:
    """
    A blocking channel to the coordinator.

    Raises UsageError when the address is on another host and there is neither TLS nor `insecure`.
    """
    host, _ = parse_address(address)
    require_secure(host, tls, insecure)
    if tls is None:
        return grpc.insecure_channel(address, options=list(options))
    return grpc.secure_channel(address, _channel_credentials(tls), options=list(options))


def open_aio_channel(
    address: str,
    *,
    tls: TlsFiles | None,
    insecure: bool,
    options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS,
) -> grpc.aio.Channel:
    """The same for asyncio."""
    host, _ = parse_address(address)
    require_secure(host, tls, insecure)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=list(options))
    return grpc.aio.secure_channel(address, _channel_credentials(tls), options=list(options))


def server_credentials(tls: TlsFiles | None) -> grpc.ServerCredentials | None:
    """Credentials that want a client certificate, or None without TLS."""
    if tls is None:
        return None
    key, chain, ca = tls.pems()
    return grpc.ssl_server_credentials([(key, chain)], root_certificates=ca, require_client_auth=True)


def _channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    key, chain, ca = tls.pems()
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=chain)
