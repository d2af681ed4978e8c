"""Libraries of C that the process has loaded already, for what torch does not pass on of them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

__all__ = ["loaded"]


def loaded(*beginnings: str) -> Iterator[ctypes.CDLL]:
    """Yield those whose file's name begins like that, as in ``loaded("libcudart")``; none where there is no /proc."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    paths = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    for path in sorted(paths):
        if Path(path).name.startswith(beginnings):
            with contextlib.suppress(OSError):  # its file may be another by now
                yield ctypes.CDLL(path)
