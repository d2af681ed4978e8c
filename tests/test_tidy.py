"""The house rules that a machine can check: sizes, imports between rooms, what may be imported where, docs in step."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES_MAX = 500
# One idea each that is longer than most; the reason stands beside it.
LONGER = {
    "snapshotd/arena/arena.py": "all bookkeeping of the arena under one lock",
    "snapshotd/coordinator/core.py": "the event table of the coordinator and its dispatch",
}

PURE = ("snapshotd/layout/", "snapshotd/erasure/", "snapshotd/reshard/")
PURE_BANNED = {"asyncio", "threading", "socket", "time", "random", "logging", "subprocess", "grpc", "torch", "mmap"}
CORE_BANNED = {"asyncio", "threading", "socket", "time", "random", "logging", "os", "grpc", "torch", "subprocess"}
NOT_CORE = {"service.py", "store.py", "rendezvous.py", "node.py"}

# Rooms, lowest first: a room may import those before it, and not those behind it.
ORDER = ["v1", "native", "layout", "erasure", "reshard", "arena", "transfer", "durable"]
ORDER += ["coordinator", "daemon", "universal", "cli"]


def modules() -> Iterator[Path]:
    for top in ("snapshotd", "client", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if "_pb2" not in path.name:
                yield path


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a module imports, also inside functions, but not under TYPE_CHECKING."""
    found: set[str] = set()
    tree = tree_of(path)
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def uses(path: Path, banned: set[str]) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} & banned


def test_a_module_holds_one_idea() -> None:
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {} == {name: count for name, count in lines.items() if count > MODULE_LINES_MAX and name not in LONGER}


def test_no_pickle_anywhere() -> None:
    """A snapshot from a stranger must not be able to run code."""
    assert [] == [name_of(path) for path in modules() if uses(path, {"pickle", "marshal", "shelve", "dill"})]


def test_what_restores_a_job_knows_no_foreign_format() -> None:
    """
    Foreign formats are pickles, however closed the list of names: no daemon and no worker reads any.

    The hook's start.py begins a job from a universal checkpoint, which is safetensors and JSON, by its reader alone.
    """
    rooms = tuple(f"snapshotd/{room}/" for room in ("arena", "coordinator", "daemon", "durable", "transfer"))
    start = "client/snapshotd_client/start.py"
    wrong = {
        name_of(path): found
        for path in modules()
        for known in [{"snapshotd.universal.readers.universal"} if name_of(path) == start else set()]
        if name_of(path).startswith((*rooms, "client/"))
        and (found := {name for name in imports(path) if name.startswith("snapshotd.universal")} - known)
    }
    assert {} == wrong


def test_nobody_calls_torch_load() -> None:
    """It unpickles; what torch.save wrote is read by universal/unpickle.py, which knows a closed list of names."""
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [] == calls


def test_pure_rooms_are_pure() -> None:
    wrong = {
        name_of(path): uses(path, PURE_BANNED)
        for path in modules()
        if name_of(path).startswith(PURE) and uses(path, PURE_BANNED)
    }
    assert {} == wrong


def test_the_cores_have_no_clock_and_no_io() -> None:
    """A core that reads a clock cannot be replayed from a seed."""
    cores = [path for path in modules() if path.parent.name == "coordinator" and path.name not in NOT_CORE]
    cores += [path for path in modules() if path.parent.name == "daemon" and path.name.startswith("core")]
    assert len(cores) > 5
    assert {} == {name_of(path): uses(path, CORE_BANNED) for path in cores if uses(path, CORE_BANNED)}


def test_imports_point_downwards() -> None:
    wrong = []
    for path in modules():
        room = path.relative_to(ROOT).parts[1]
        if room not in ORDER:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "snapshotd" and len(parts) > 1 and parts[1] in ORDER:
                # The daemon for one node alone runs a coordinator inside it: the composition root may.
                if ORDER.index(parts[1]) > ORDER.index(room):
                    wrong.append(f"{name_of(path)} imports {name}")
            elif parts[0] == "snapshotd_client":
                wrong.append(f"{name_of(path)} imports {name}")
    assert [] == wrong


def test_torch_stays_with_the_client_and_the_launchers_plugin() -> None:
    allowed = {"snapshotd/coordinator/rendezvous.py"}
    using = {
        name_of(path) for path in modules() if uses(path, {"torch"}) and path.is_relative_to(ROOT / "snapshotd")
    }
    assert set() == {name for name in using - allowed if not name.startswith("snapshotd/universal/")}


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import snapshotd.cli, snapshotd.daemon.node, snapshotd.coordinator.node", "torch"),
        ("import snapshotd_client, snapshotd_client.start", "grpc"),
        ("import snapshotd_client", "snapshotd.universal"),
        ("import snapshotd_client.start", "snapshotd.universal.unpickle"),
    ],
)
def test_what_a_process_must_not_load(program: str, absent: str) -> None:
    """gRPC in a worker breaks forked DataLoader workers; torch in a daemon costs memory on every node."""
    check = f"{program}\nimport sys\nsys.exit({absent!r} in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", check]).returncode


def test_the_settings_page_is_that_of_the_code() -> None:
    ended = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (0, "") == (ended.returncode, ended.stderr)


def test_links_in_the_docs_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{name_of(page)}: {target}")
    assert [] == broken
