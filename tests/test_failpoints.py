"""Failpoints: free when off, exact when on, and none without a sentence."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotd import failpoints
from snapshotd.errors import UsageError
from snapshotd.failpoints import SITES, FailpointError, armed, configure, failpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    configure(None)


def test_off_is_nothing() -> None:
    assert failpoint("arena.before_seal_record") is None
    assert frozenset() == armed()
    configure("")
    configure("  ")
    assert failpoints._table is None


def test_raise_at_the_nth_hit_only() -> None:
    configure("a.b=raise@3; other=off")
    assert [failpoint("a.b"), failpoint("a.b")] == [None, None]
    with pytest.raises(FailpointError, match=r"a\.b"):
        failpoint("a.b")
    assert failpoint("a.b") is None
    assert failpoint("other") is None
    assert failpoint("nobody") is None
    assert frozenset({"a.b", "other"}) == armed()


def test_each_hit_and_counters_restart() -> None:
    configure("x=corrupt")
    assert [failpoint("x") for _ in range(3)] == ["corrupt"] * 3
    configure("x=corrupt@1")
    assert [failpoint("x") for _ in range(2)] == ["corrupt", None]


def test_several_actions_of_one_site_in_order(tmp_path: Path) -> None:
    reached, gate = tmp_path / "reached", tmp_path / "gate"
    configure(f"x=touch({reached});x=wait({gate});x=raise@2")
    seen: list[str | None] = []
    waiter = threading.Thread(target=lambda: seen.append(failpoint("x")))
    waiter.start()
    failpoints._wait(str(reached))
    assert seen == []
    gate.touch()
    waiter.join(10)
    assert seen == ["wait"]
    with pytest.raises(FailpointError):
        failpoint("x")


def test_delay() -> None:
    configure("x=delay(1)")
    assert failpoint("x") == "delay"


@pytest.mark.parametrize(
    "text",
    ["x", "=raise", "x=", "x=explode", "x=raise@0", "x=raise@", "x=raise(1)", "x=delay", "x=delay(a)", "x=exit(-1)"]
    + ["x=touch", "x=wait()", "x=kill@two", "x=off;y"],
)
def test_unknown_actions_are_refused_with_their_text(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text.rpartition(";")[2])):
        configure(text)


def _run(action: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from snapshotd.failpoints import failpoint; failpoint('x'); print('went on')"],
        env={"SNAPSHOTD_FAILPOINTS": f"x={action}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_environment_arms_and_death_is_sudden() -> None:
    assert _run("exit(7)").returncode == 7
    killed = _run("kill")
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "")
    assert "went on" in _run("kill@2").stdout
    assert "UsageError" in _run("nonsense").stderr


def test_hang_hangs() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "from snapshotd.failpoints import failpoint; print(1, flush=True); failpoint('x')"],
        env={"SNAPSHOTD_FAILPOINTS": "x=hang", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.kill()


def test_every_site_in_the_code_has_a_sentence() -> None:
    used = {
        name
        for folder in ("snapshotd", "client")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "failpoints.py"
        for name in re.findall(r"""\bfailpoint\(\s*["']([^"']+)["']""", path.read_text())
    }
    assert set() == used - SITES.keys()


def test_sites_are_sorted_and_say_something() -> None:
    assert sorted(SITES) == list(SITES)
    assert all(text.endswith(".") and len(text) > 20 for text in SITES.values())
