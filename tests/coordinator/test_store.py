"""The coordinator's store: what is put is there after a SIGKILL, and two coordinators never share one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.coordinator.events import Delete, Put
from snapshotd.coordinator.store import Store
from snapshotd.errors import FormatError, UsageError


def put(key: str, value: str, *, job: str = "j", sync: bool = False) -> Put:
    return Put(job=job, key=key, value=value, sync=sync)


def test_rows_survive_reopening(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.apply([put("epoch", "1", sync=True), put("commit", "a"), put("commit", "b")])
    store.apply([put("x", "1", job="other"), Delete(job="j", key="commit")])
    store.close()

    store = Store(tmp_path)
    assert list(store.remembered()) == [("j", "epoch", "1"), ("other", "x", "1")]
    store.apply([Delete(job="other", key=None)])
    assert list(store.remembered()) == [("j", "epoch", "1")]
    store.close()


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    """A commit that was announced and then forgotten would let a daemon free the wrong snapshot."""
    program = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from snapshotd.coordinator.store import Store\n"
        "from snapshotd.coordinator.events import Put\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for number in range(50):\n"
        "    store.apply([Put(job='j', key='commit', value=str(number), sync=number % 2 == 0)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ})
    assert ended.returncode == -signal.SIGKILL

    store = Store(tmp_path)
    assert list(store.remembered()) == [("j", "commit", "49")]
    store.close()


def test_a_batch_is_all_or_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(Exception, match="NOT NULL"):
        store.apply([put("a", "1"), Put(job="j", key="b", value=None, sync=False)])  # type: ignore[arg-type]
    assert list(store.remembered()) == []
    store.close()


def test_two_coordinators_never_share_a_store(tmp_path: Path) -> None:
    """Two coordinators on one store would both mint the same epoch."""
    store = Store(tmp_path)
    store.apply([put("a", "1")])
    with pytest.raises(UsageError, match="another coordinator"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_said_with_the_remedy(tmp_path: Path) -> None:
    """A home that is read-only, or none: the default directory is in it."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/state/coordinator.sqlite cannot be .* \(Not a directory\); .* --state"):
        Store(tmp_path / "file" / "state")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "coordinator.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(FormatError, match="not a coordinator's store"):
        Store(tmp_path)


def test_the_file_is_private(tmp_path: Path) -> None:
    Store(tmp_path / "state").close()
    assert (tmp_path / "state" / "coordinator.sqlite").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_key_values_are_kept_apart_from_the_core_and_old_epochs_go(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.apply([put("kv/1/a", "x"), put("kv/2/a", "y"), put("epoch", "2")])
    assert list(store.remembered()) == [("j", "epoch", "2")]
    assert store.key_values("j", "kv/2/") == {"kv/2/a": "y"}
    store.delete_prefix("j", "kv/", but="kv/2/")
    assert store.key_values("j", "kv/1/") == {}
    assert store.key_values("j", "kv/2/") == {"kv/2/a": "y"}
    store.close()
