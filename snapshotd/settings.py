"""
Every setting of coordinator and daemon: one table, from which flags, environment, TOML and docs come.

Order: flag, environment, TOML file (`--config`, table of the command), default. The variable is SNAPSHOTD_<NAME>;
that of the coordinator's own settings SNAPSHOTD_COORDINATOR_<NAME>, so that one environment serves both.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from snapshotd.errors import UsageError
from snapshotd.sizes import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

if TYPE_CHECKING:
    from snapshotd.security import TlsFiles

__all__ = [
    "CoordinatorSettings",
    "DaemonSettings",
    "Setting",
    "ToolSettings",
    "add_flags",
    "defaults",
    "from_environment",
    "load",
    "table",
    "variable",
]


_BANDWIDTH_LEAST = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting: how its text becomes a value, what it is when nobody says, and a sentence for people."""

    parse: Callable[[str], Any]
    default: Any
    doc: str
    metavar: str = "VALUE"


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("write true or false")


def _at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if value < least:
            raise ValueError(f"must be at least {least}")
        return value

    return parse


def _bandwidth(text: str) -> int:
    value = parse_bytes(text)
    if value and value < _BANDWIDTH_LEAST:
        raise ValueError(f"must be 0 or at least {_BANDWIDTH_LEAST}: a slower peer looks like a dead one")
    return value


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


_INSECURE = Setting(
    parse=_flag, default=False, doc="allow plaintext between hosts, and any local user on loopback", metavar="BOOL"
)
_TLS_CERT = Setting(parse=str, default="", doc="PEM certificate of this process, for mutual TLS", metavar="FILE")
_TLS_KEY = Setting(parse=str, default="", doc="PEM key of the certificate", metavar="FILE")
_TLS_CA = Setting(parse=str, default="", doc="PEM certificate of the authority that signs all nodes", metavar="FILE")
_LOG_LEVEL = Setting(parse=str.upper, default="INFO", doc="DEBUG, INFO, WARNING or ERROR", metavar="LEVEL")
_COORDINATOR = Setting(
    parse=str,
    default="",
    doc="the coordinator's address; none: that of this node's daemon, else 127.0.0.1:7070",
    metavar="HOST:PORT",
)

_COORDINATOR_TABLE: dict[str, Setting] = {
    "listen": Setting(parse=str, default="127.0.0.1:7070", doc="address to serve on", metavar="HOST:PORT"),
    "state": Setting(
        parse=_path,
        default=Path.home() / ".local" / "state" / "snapshotd",
        doc="directory of the coordinator's store",
        metavar="DIR",
    ),
    "parity": Setting(
        parse=_at_least(0),
        default=1,
        doc="m: how many nodes of a parity group may be lost at once; at most group nodes - 1 takes effect",
        metavar="M",
    ),
    "group_size": Setting(parse=_at_least(1), default=16, doc="most nodes in one parity group", metavar="N"),
    "node_lease": Setting(
        parse=_at_least(0.1, float), default=5.0, doc="seconds after which a silent daemon is lost", metavar="S"
    ),
    "agent_lease": Setting(
        parse=_at_least(0.1, float), default=3.0, doc="seconds after which a silent launcher is lost", metavar="S"
    ),
    "last_call": Setting(
        parse=_at_least(0, float),
        default=10.0,
        doc="seconds to wait for more nodes than the minimum when a job first starts",
        metavar="S",
    ),
    "protect_timeout": Setting(
        parse=_at_least(1, float), default=60.0, doc="seconds after which a step's parity is given up", metavar="S"
    ),
    "restore_wait": Setting(
        parse=_at_least(1, float), default=30.0, doc="seconds to wait for nodes before a restore decision", metavar="S"
    ),
    "startup_grace": Setting(
        parse=_at_least(0, float), default=5.0, doc="seconds that nodes have to return after a restart", metavar="S"
    ),
    "hang_factor": Setting(
        parse=_at_least(0, float),
        default=30.0,
        doc="a job that ends no step for so many times its median step counts as hung; 0: never",
        metavar="X",
    ),
    "hang_least": Setting(parse=_at_least(0, float), default=60.0, doc="but not before so many seconds", metavar="S"),
    "hang_restart": Setting(
        parse=_flag, default=False, doc="restart the workers of a job that counts as hung", metavar="BOOL"
    ),
    "address_file": Setting(parse=str, default="", doc="write the address served on into this file", metavar="FILE"),
    "tls_cert": _TLS_CERT,
    "tls_key": _TLS_KEY,
    "tls_ca": _TLS_CA,
    "insecure": _INSECURE,
    "log_level": _LOG_LEVEL,
}

_DAEMON_TABLE: dict[str, Setting] = {
    "coordinator": Setting(
        parse=str,
        default="",
        doc="the coordinator's address; none: this daemon runs one of its own, for one node",
        metavar="HOST:PORT",
    ),
    "node_id": Setting(
        parse=str, default=socket.gethostname(), doc="this node's name, unique in the cluster", metavar="NAME"
    ),
    "listen": Setting(
        parse=str,
        default="127.0.0.1:0",
        doc="address of the bulk listener that other daemons reach",
        metavar="HOST:PORT",
    ),
    "advertise": Setting(
        parse=str,
        default="",
        doc="address that others reach the bulk listener at; none: that of --listen, or if that is every interface, "
        "the one that the route to the coordinator begins at",
        metavar="HOST",
    ),
    "peer_bandwidth": Setting(
        parse=_bandwidth,
        default=0,
        doc="bytes per second that this daemon takes from its peers to protect snapshots (they take as much from it); "
        "a restore takes all there is; 0: no limit",
        metavar="BYTES",
    ),
    "socket": Setting(parse=_path, default=None, doc="Unix socket for this node's workers", metavar="PATH"),
    "arena": Setting(parse=_path, default=None, doc="directory in tmpfs for slots and parity", metavar="DIR"),
    "budget": Setting(
        parse=parse_bytes, default=0, doc="most memory for slots and parity; 0: half of what is free", metavar="BYTES"
    ),
    "generations": Setting(
        parse=_at_least(0),
        default=0,
        doc="slots per local rank; 0: two, and one more when snapshots are persisted",
        metavar="N",
    ),
    "capture_every": Setting(parse=_at_least(1), default=1, doc="capture every n-th step", metavar="N"),
    "domain": Setting(
        parse=str, default="", doc="failure domain (rack, zone); groups spread over them", metavar="NAME"
    ),
    "persist": Setting(
        parse=str, default="", doc="directory for durable snapshots, the same for all nodes", metavar="DIR"
    ),
    "persist_every": Setting(parse=_at_least(0), default=0, doc="persist every n-th step; 0: never", metavar="STEPS"),
    "persist_minutes": Setting(
        parse=_at_least(0, float),
        default=0.0,
        doc="persist when that many minutes have passed; 0: never",
        metavar="MIN",
    ),
    "persist_keep": Setting(parse=_at_least(1), default=2, doc="durable snapshots to keep", metavar="K"),
    "codec": Setting(parse=str, default="auto", doc="auto, isal or zfec", metavar="NAME"),
    "scrub_rate": Setting(
        parse=parse_bytes,
        default=64 << 20,
        doc="bytes per second to re-verify in the background; 0: off",
        metavar="BYTES",
    ),
    "tls_cert": _TLS_CERT,
    "tls_key": _TLS_KEY,
    "tls_ca": _TLS_CA,
    "insecure": _INSECURE,
    "log_level": _LOG_LEVEL,
}

_TOOL_TABLE: dict[str, Setting] = {
    "coordinator": _COORDINATOR,
    "tls_cert": _TLS_CERT,
    "tls_key": _TLS_KEY,
    "tls_ca": _TLS_CA,
    "insecure": _INSECURE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Secured:
    tls_cert: str
    tls_key: str
    tls_ca: str
    insecure: bool

    @property
    def tls(self) -> TlsFiles | None:
        from snapshotd.security import tls_files  # with ssl, which a conversion of files does not need

        return tls_files(self.tls_cert, self.tls_key, self.tls_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings(_Secured):
    """See the table for each field."""

    listen: str
    state: Path
    parity: int
    group_size: int
    node_lease: float
    agent_lease: float
    last_call: float
    protect_timeout: float
    restore_wait: float
    startup_grace: float
    hang_factor: float
    hang_least: float
    hang_restart: bool
    address_file: str
    log_level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings(_Secured):
    """See the table for each field."""

    coordinator: str
    node_id: str
    listen: str
    advertise: str
    peer_bandwidth: int
    socket: Path | None
    arena: Path | None
    budget: int
    generations: int
    capture_every: int
    domain: str
    persist: str
    persist_every: int
    persist_minutes: float
    persist_keep: int
    codec: str
    scrub_rate: int
    log_level: str

    @property
    def socket_path(self) -> Path:
        from snapshotd.workersocket import default_socket_path  # with asyncio, which it does not need either

        return self.socket or default_socket_path()

    @property
    def arena_path(self) -> Path:
        return self.arena or Path("/dev/shm") / f"snapshotd-{os.getuid()}" / self.node_id

    @property
    def slot_generations(self) -> int:
        persists = self.persist and (self.persist_every or self.persist_minutes)
        return self.generations or (3 if persists else 2)

    def __post_init__(self) -> None:
        if self.generations == 1:
            raise UsageError("--generations 1 cannot be: one slot is committed while another is filled; use 2 or more")
        if (self.persist_every or self.persist_minutes) and not self.persist:
            raise UsageError("--persist-every and --persist-minutes need --persist DIR")
        if self.codec not in ("auto", "isal", "zfec"):
            raise UsageError(f"--codec {self.codec!r} is not known; use auto, isal or zfec")
        if not self.node_id or "/" in self.node_id or len(self.node_id) > 200:
            raise UsageError(f"--node-id {self.node_id!r} must be a short name without '/'")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSettings(_Secured):
    """How the other commands reach the coordinator."""

    coordinator: str


S = TypeVar("S", CoordinatorSettings, DaemonSettings, ToolSettings)


def table(kind: type[S]) -> Mapping[str, Setting]:
    """The settings of a command, by name."""
    tables: dict[Any, dict[str, Setting]] = {
        CoordinatorSettings: _COORDINATOR_TABLE,
        DaemonSettings: _DAEMON_TABLE,
        ToolSettings: _TOOL_TABLE,
    }
    return tables[kind]


def variable(kind: type[S], name: str) -> str:
    """The environment variable of a setting."""
    own = kind is CoordinatorSettings and name not in _TOOL_TABLE and name != "log_level"
    return ("SNAPSHOTD_COORDINATOR_" if own else "SNAPSHOTD_") + name.upper()


def add_flags(parser: argparse.ArgumentParser, kind: type[S]) -> None:
    """A flag for each setting; unset flags stay None, so that `load` can look further."""
    for name, setting in table(kind).items():
        option = "--" + name.replace("_", "-")
        shown = "" if setting.default in (None, "") else f" (default: {setting.default})"
        if setting.parse is _flag:
            parser.add_argument(option, action="store_const", const="true", default=None, help=setting.doc)
        else:
            parser.add_argument(
                option, default=None, metavar=setting.metavar, help=(setting.doc + shown).replace("%", "%%")
            )
    parser.add_argument("--config", default=None, metavar="FILE", help="TOML file with settings")


def load(kind: type[S], flags: argparse.Namespace, section: str, environ: Mapping[str, str] = os.environ) -> S:
    """
    The settings of a command.

    Raises UsageError that names the source (flag, variable or file) of a value that cannot be.
    """
    path = flags.config or environ.get("SNAPSHOTD_CONFIG")
    from_file = _read_toml(Path(path), section, table(kind)) if path else {}
    values: dict[str, Any] = {}
    for name, setting in table(kind).items():
        environment = variable(kind, name)
        flag = getattr(flags, name)
        if flag is not None:
            values[name] = _parsed(setting, flag, "--" + name.replace("_", "-"))
        elif environment in environ:
            values[name] = _parsed(setting, environ[environment], environment)
        elif name in from_file:
            values[name] = _parsed(setting, from_file[name], f"{path}: {section}.{name}")
        else:
            values[name] = setting.default
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def from_environment(kind: type[S], section: str) -> S:
    """The settings of a command that is given no flags."""
    return load(kind, argparse.Namespace(config=None, **dict.fromkeys(table(kind))), section)


def defaults(kind: type[S], **values: Any) -> S:
    """The settings of a command when nobody says anything but `values`."""
    return kind(**{name: values.get(name, setting.default) for name, setting in table(kind).items()})


def _parsed(setting: Setting, text: str, source: str) -> Any:
    try:
        return setting.parse(text)
    except (ValueError, UsageError) as error:
        raise UsageError(f"{source}: {text!r} cannot be used: {error}") from error


def _read_toml(path: Path, section: str, known: Mapping[str, Setting]) -> dict[str, str]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    values = content.get(section, {})
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {section} must be a table")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{path}: unknown settings in [{section}]: {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: str(value) for name, value in values.items()}
