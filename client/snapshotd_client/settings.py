"""
Everything that the hook takes from the environment or a file, checked once.

Rule 1: a wrong value raises ValueError when the Snapshotter is made, and the message names the variable or the key.
An argument (``settings=``) wins over a variable, the variable over the table [client] of the file SNAPSHOTD_CONFIG.
Rule 2: a plain ``python train.py`` needs none of them: it is rank 0 of 1 of the job "default".
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Settings"]

_MAX_THREADS = 16
_KEYS = ("socket", "job", "copy_threads", "connect_timeout_s", "restore_timeout_s", "debug_copy", "start")
"""Of the table [client]; each has a variable: SNAPSHOTD_ and the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    The hook's surroundings.

    Attributes:
        socket: the daemon's Unix socket (SNAPSHOTD_SOCKET).
        job: SNAPSHOTD_JOB, else torchrun's run id, else "default".
        epoch: membership epoch from the launcher's plug-in (SNAPSHOTD_EPOCH); None when another rendezvous launched us.
        formation: the same on all ranks of one launch; tells launches apart where there is no epoch.
        nonce: random, one per process.
        copy_threads: threads that copy into a slot (SNAPSHOTD_COPY_THREADS); 0: as many as training has, up to 4.
        connect_timeout_s: how long restore() waits for a daemon when nothing says that there is one.
        restore_timeout_s: how long restore() waits for a decision when there is one.
        debug_copy: copy before capture() returns, and compare (SNAPSHOTD_DEBUG_COPY=1).
        start: the universal checkpoint that a job without a snapshot of its own starts from (SNAPSHOTD_START).
    """

    socket: str
    job: str
    epoch: int | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    formation: str = ""
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    copy_threads: int = 0
    connect_timeout_s: float = 5.0
    restore_timeout_s: float = 120.0
    debug_copy: bool = False
    start: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"RANK={self.rank} is not below WORLD_SIZE={self.world_size}")
        if not 0 <= self.local_rank < self.local_world_size:
            raise ValueError(f"LOCAL_RANK={self.local_rank} is not below LOCAL_WORLD_SIZE={self.local_world_size}")
        if not self.job:
            raise ValueError("SNAPSHOTD_JOB must not be empty")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read ``env`` (default: the process's own) and the file that it names. ValueError says what is wrong."""
        env = _with_file(os.environ if env is None else env)
        rank = _integer(env, "RANK", 0)
        world_size = _integer(env, "WORLD_SIZE", 1, least=1)
        local_world_size = _integer(env, "LOCAL_WORLD_SIZE", 1, least=1)
        return cls(
            socket=env.get("SNAPSHOTD_SOCKET") or _default_socket(env),
            job=env.get("SNAPSHOTD_JOB") or env.get("TORCHELASTIC_RUN_ID") or "default",
            epoch=_integer(env, "SNAPSHOTD_EPOCH", 0) if env.get("SNAPSHOTD_EPOCH") else None,
            rank=rank,
            world_size=world_size,
            local_rank=_integer(env, "LOCAL_RANK", 0),
            local_world_size=local_world_size,
            formation=_formation(env, world_size),
            copy_threads=_integer(env, "SNAPSHOTD_COPY_THREADS", 0, most=_MAX_THREADS),
            connect_timeout_s=_seconds(env, "SNAPSHOTD_CONNECT_TIMEOUT_S", 5.0),
            restore_timeout_s=_seconds(env, "SNAPSHOTD_RESTORE_TIMEOUT_S", 120.0),
            debug_copy=env.get("SNAPSHOTD_DEBUG_COPY", "0") not in ("", "0"),
            start=env.get("SNAPSHOTD_START", ""),
        )


def _with_file(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return ``env`` with what the table [client] says of variables that are not set."""
    path = env.get("SNAPSHOTD_CONFIG")
    if not path:
        return env
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("client", {})
    except OSError as error:
        raise ValueError(f"SNAPSHOTD_CONFIG: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"SNAPSHOTD_CONFIG: {path} is not TOML: {error}") from error
    unknown = sorted(set(table) - set(_KEYS)) if isinstance(table, dict) else ["(client must be a table)"]
    if unknown:
        raise ValueError(f"{path}: unknown settings in [client]: {', '.join(unknown)}; known: {', '.join(_KEYS)}")
    said = {key: str(int(value) if isinstance(value, bool) else value) for key, value in table.items()}
    return {**{f"SNAPSHOTD_{key.upper()}": value for key, value in said.items()}, **env}


def _default_socket(env: Mapping[str, str]) -> str:
    runtime = env.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return f"{runtime}/snapshotd/daemon.sock"
    return f"/tmp/snapshotd-{os.getuid()}/daemon.sock"


def _formation(env: Mapping[str, str], world_size: int) -> str:
    """
    The same on all ranks of one launch. Not TORCHELASTIC_RESTART_COUNT: launchers of one job count for themselves, and
    one that took another's place counts from 0. Restarts are told apart by the workers' nonces.
    """
    host, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if not host and world_size == 1:
        # A plain process: each start is a formation of its own.
        host = f"pid-{os.getpid()}-{secrets.token_hex(4)}"
    return f"{host}:{port}"


def _integer(env: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int = 1 << 62) -> int:
    text = env.get(name)
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, not {text!r:.60}") from None
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value}")
    return value


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} must be a number of seconds, not {text!r:.60}") from None
    if not 0 <= value <= 86_400:
        raise ValueError(f"{name} must be from 0 to 86400 seconds, not {value}")
    return value
