"""
Writers: one file per format.

Each has ``losses(state)``, which says what the format can not hold, one line each, and ``write(state, target, settings,
identity=, options=)``, which makes files out of views for stream.write_files and writes the small ones itself, the one
without which nobody reads the checkpoint last. ``options``: ``layout`` is a dict such as {"dp": 2, "tp": 4}. One may
have ``limits(state)`` too: what is in the files, but the framework's own loader leaves alone; these are warnings. One
that a layout or rules mean something to has ``check(state, options)``, which raises what ``write`` would raise of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Final, Protocol, cast

from snapshotd.errors import UsageError
from snapshotd.universal.state import State
from snapshotd.universal.stream import Settings

__all__ = ["FORMATS", "Writer", "writer_for"]

FORMATS: Final = ("universal", "dcp", "deepspeed", "megatron", "hf", "torch")
"""What ``--to`` knows."""

_MODULES: Final = {"torch": "torch_save"}


class Writer(Protocol):
    """A module of this package."""

    def losses(self, state: State) -> list[str]:
        """Return what the format can not hold of ``state``, one line each."""

    def write(self, state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
        """Write ``state`` to ``target``."""


def writer_for(name: str) -> Writer:
    """Return the writer for ``--to NAME``; UsageError for a format that is not known."""
    module = f"{__name__}.{_MODULES.get(name, name)}"
    if name not in FORMATS or importlib.util.find_spec(module) is None:
        raise UsageError(f"cannot write {name!r}; there are {', '.join(FORMATS)}")
    return cast("Writer", importlib.import_module(module))
