"""What a conversion says while it runs: a bar for people, a line now and then for logs, and nothing in between."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from snapshotd.cli.convert import ProgressBar

GB = 1_000_000_000


def test_a_log_gets_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch job's log must neither be silent for an hour nor grow by a line for each tensor."""
    now = 100.0
    bar = ProgressBar("converting", clock=lambda: now)
    for second in range(1, 26):
        now = 100.0 + second
        for part in range(4):
            bar((4 * second + part) * GB // 40, 10 * GB)
    bar.close()
    captured = capsys.readouterr()
    assert "" == captured.out
    assert [
        "converting: 1.00 of 10.00 GB, 100 MB/s, 90 s left",
        "converting: 2.00 of 10.00 GB, 100 MB/s, 80 s left",
    ] == captured.err.splitlines()


def test_nothing_is_divided_by_zero(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bar = ProgressBar("verifying", clock=lambda: now)
    now = 10.0
    bar(0, 0)
    assert "verifying: 0.00 of 0.00 GB, 0 MB/s, 0 s left\n" == capsys.readouterr().err


def test_a_short_conversion_in_a_pipe_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("converting")
    bar(GB, GB)
    bar.close()
    assert ("", "") == capsys.readouterr()


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    """On a real pseudo-terminal, as a user's shell has it."""
    program = (
        "from snapshotd.cli.convert import ProgressBar\n"
        "bar = ProgressBar('converting')\n"
        "bar(250_000_000, 1_000_000_000); bar(1_000_000_000, 1_000_000_000); bar.close(); print('done')"
    )
    leader, follower = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    child = subprocess.Popen(
        [sys.executable, "-c", program], stderr=follower, stdout=subprocess.PIPE, env=environment
    )
    os.close(follower)
    shown = b""
    try:
        while True:
            shown += os.read(leader, 65_536)
    except OSError:  # the terminal's last user has gone
        pass
    finally:
        os.close(leader)
    assert child.stdout is not None
    with child.stdout:
        assert b"done\n" == child.stdout.read()
    assert 0 == child.wait(20)
    text = shown.decode()
    assert "converting" in text
    assert "1.0/1.0 GB" in text
    assert "\x1b[2K" in text  # the line is wiped at the end
