"""ISA-L, the library by ctypes: the system's, or the one inside the installed pyeclib."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

__all__ = ["isal_paths", "load_isal"]


def isal_paths() -> list[str]:
    """Return where it may be, the best first; nothing is looked at yet."""
    paths = ["libisal.so.2", "libisal.2.dylib"]
    spec = importlib.util.find_spec("pyeclib")
    if spec is not None and spec.origin is not None:
        beside = Path(spec.origin).parent.parent / "pyeclib.libs"
        paths += sorted(str(path) for path in beside.glob("libisal*.so*"))
    return paths


def load_isal(paths: Sequence[str]) -> tuple[str, ctypes.CDLL]:
    """Return the first of ``paths`` that loads, and the library; its calls let go of the GIL. OSError if none does."""
    failures: list[str] = []
    for path in paths:
        try:
            return path, ctypes.CDLL(path)
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures) or "no libisal was found")
