"""
Read checkpoints of Megatron-LM: its own format (a file per model-parallel rank) and torch_dist (on top of DCP).

``latest_checkpointed_iteration.txt`` names the newest of a run's folders; a folder may be given instead of the run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.readers import dcp
from snapshotd.universal.readers.megatron_dist import is_distributed, read_distributed
from snapshotd.universal.readers.megatron_legacy import is_legacy, read_legacy
from snapshotd.universal.rules import Rules
from snapshotd.universal.state import State

__all__ = ["detect", "read"]

TRACKER: Final = "latest_checkpointed_iteration.txt"
_FOLDER: Final = re.compile(r"iter_(\d+)\Z|release\Z")


def detect(path: Path) -> bool:
    """A run's folder with its tracker file or iterations, or one iteration's folder."""
    try:
        if path.name == TRACKER:
            return path.is_file()
        if not path.is_dir():
            return False
        if is_legacy(path) or is_distributed(path):
            return True
        iterations = _iterations(path)
        if (path / TRACKER).is_file():  # Megatron-DeepSpeed leaves one beside DeepSpeed's files
            return bool(iterations) or not (path / "latest").is_file()
        return any(is_legacy(folder) or is_distributed(folder) for folder in iterations)
    except OSError:
        return False


def read(path: Path, rules: Rules | None = None) -> State:
    """
    Return the state at ``path``: a run's folder (its newest iteration), or an iteration's.

    ``rules``: for parameters that the package's preset does not know.
    """
    folder = _find(path.parent if path.name == TRACKER else path)
    if is_distributed(folder):
        return read_distributed(folder, rules)
    if is_legacy(folder):
        return read_legacy(folder, rules)
    if (folder / ".metadata").is_file() and not (folder / "common.pt").is_file():
        return dcp.read(folder)  # --ckpt-format torch_dcp: DCP as any other trainer writes it
    if (folder / "common.pt").is_file():
        raise FormatError(
            f"{folder / 'metadata.json'} is missing or damaged: it is written last, "
            "and says how the checkpoint was written. Take an older checkpoint"
        )
    raise FormatError(
        f"{folder} has neither mp_rank_* folders nor metadata.json: nothing of a Megatron-LM checkpoint is there"
    )


def _iterations(path: Path) -> list[Path]:
    found = [entry for entry in path.iterdir() if _FOLDER.match(entry.name) and entry.is_dir()]
    return sorted(found, key=lambda entry: (entry.name != "release", entry.name))


def _find(path: Path) -> Path:
    if is_legacy(path) or is_distributed(path) or _FOLDER.match(path.name):
        return path
    tracker = path / TRACKER
    folders = _iterations(path)
    if not tracker.is_file():
        if len(folders) == 1:
            return folders[0]
        names = ", ".join(folder.name for folder in folders[:10]) or "none"
        raise FormatError(f"{tracker} is missing; give the folder of one iteration (there are: {names})")
    text = tracker.read_bytes()[:100].decode("utf-8", "replace").strip()
    if text != "release" and not text.isdigit():
        raise FormatError(f"{tracker} holds {text!r:.40}, expected an iteration's number or 'release'")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        names = ", ".join(folder.name for folder in folders[:10]) or "none"
        raise FormatError(
            f"{folder} is missing, though {tracker} names it; give the path of another iteration (there are: {names})"
        )
    return folder
