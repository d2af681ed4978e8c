"""The short form of each part of the benchmark: ratios only, judged widely: what is four times off has broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("part", bench.names())
def test_short_form(part: str) -> None:
    """Measured again when it is missed: another process may have had the cores."""
    command = [sys.executable, "-m", "snapshotd", "bench", "--short", "--check", "--json", "--only", part]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            break
    assert 0 == done.returncode, done.stderr
    assert part in {row["part"] for row in json.loads(done.stdout)["rows"]}
