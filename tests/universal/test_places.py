"""What a user writes is a path, or a job; and neither is taken for the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from snapshotd.errors import UsageError
from snapshotd.settings import ToolSettings, defaults
from snapshotd.universal import Job
from snapshotd.universal.places import Place, place_of
from snapshotd.universal.readers import detect, read

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "torch_save_plain" / "checkpoint.pt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("job:a", Job(name="a")),
        ("job:a@7", Job(name="a", step=7)),
        ("job:a@0", Job(name="a", step=0)),
        ("job:a:b/c", Job(name="a:b/c")),
        ("job:a@b@12", Job(name="a@b", step=12)),
        ("job:a@1@12", Job(name="a@1", step=12)),
        ("job:a@b", Job(name="a@b")),
        ("job:a@", Job(name="a@")),
        ("job:@a", Job(name="@a")),
        ("job:a@-1", Job(name="a@-1")),
        ("job:a@\u0663", Job(name="a@\u0663")),
        ("job:job:a@3", Job(name="job:a", step=3)),
        ("./job:a", Path("job:a")),
        (Path("job:a"), Path("job:a")),
        ("jobs/a@7", Path("jobs/a@7")),
        ("Job:a", Path("Job:a")),
    ],
)
def test_what_is_meant(text: str, expected: Place) -> None:
    assert expected == place_of(text)
    if isinstance(expected, Job):
        assert expected == place_of(str(expected))


@pytest.mark.parametrize("text", ["job:", "job:@7"])
def test_a_job_has_a_name(text: str) -> None:
    with pytest.raises(UsageError, match="names no job; write job:NAME or job:NAME@STEP"):
        place_of(text)


def test_only_a_job_asks_how_coordinators_are_reached() -> None:
    """A broken configuration of the cluster must not keep anybody from a checkpoint on the disk."""

    def settings() -> ToolSettings:
        raise UsageError("the configuration is broken")

    assert Path("a") == place_of("a", settings)
    with pytest.raises(UsageError, match="broken"):
        place_of("job:a", settings)
    wanted = defaults(ToolSettings, coordinator="10.0.0.1:1")
    found = place_of("job:a", lambda: wanted)
    assert isinstance(found, Job)
    assert wanted == found.settings


def test_a_job_is_in_no_other_format() -> None:
    assert "snapshot" == detect(Job(name="a"))
    with pytest.raises(UsageError, match="job:a is a snapshot of ours"):
        read(Job(name="a"), "dcp")


def test_conversions_of_files_load_neither_torch_nor_grpc(tmp_path: Path) -> None:
    """Each of them takes longer to import than many a checkpoint takes to convert."""
    program = (
        "import sys; from snapshotd.cli import main\n"
        f"code = main(['convert', {str(FIXTURE)!r}, {str(tmp_path / 'u')!r}, '--to', 'universal'])\n"
        "print(code, sorted({'torch', 'grpc', 'asyncio', 'snapshotd.daemon'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "0 []" == done.stdout.splitlines()[-1]
