"""What all tests share: a directory for temporary files of their own, which goes with them."""

from __future__ import annotations

import os
import shutil
import tempfile


def pytest_configure(config) -> None:
    """torchrun leaves the directory of its logs behind, and so does whoever is killed."""
    before, directory = os.environ.get("TMPDIR"), tempfile.mkdtemp(prefix="snapshotd-")
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # pytest keeps those of the last runs

    def undo() -> None:
        tempfile.tempdir = None
        if before is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = before
        shutil.rmtree(directory, ignore_errors=True)

    os.environ["TMPDIR"] = directory
    tempfile.tempdir = None
    config.add_cleanup(undo)
