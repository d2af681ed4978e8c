"""
Folders in which each tensor-parallel rank left a file of torch.save: ``model_rank_0.pt``, ``consolidated.00.pth``,
``mp_rank_00/model.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from snapshotd.errors import FormatError
from snapshotd.universal.sources import FileSource
from snapshotd.universal.torchzip import is_torch_file

__all__ = ["find_ranks"]

_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
_NUMBERED: Final = re.compile(
    r"(?P<head>(?:.*[._-])?(?:mp_rank|tp_rank|rank|mp|tp|shard|part|consolidated)[._-]?)(?P<rank>\d{1,5})(?P<tail>\D*)\Z"
)
"""Names of files and folders of ranks. A bare number is none: ``checkpoint_1.pt`` is a step."""


def find_ranks(path: Path) -> list[Path]:
    """
    Return the files of the ranks in the folder ``path``, in order; none where there are not at least two of them.

    FormatError where one of them is missing, or there are several sets.
    """
    entries = sorted(path.iterdir()) if path.is_dir() else []
    sets = _sets(entry for entry in entries if entry.suffix in _SUFFIXES and entry.is_file())
    if not sets:
        for key, folders in _sets(entry for entry in entries if entry.is_dir()).items():
            sets[key] = {rank: file for rank, folder in folders.items() if (file := _inside(folder))}
    sets = {key: ranks for key, ranks in sets.items() if len(ranks) > 1 and _are_torch(ranks.values())}
    if not sets:
        return []
    if len(sets) > 1:
        names = ", ".join(f"{head}N{tail}" for head, tail in sets)
        raise FormatError(f"{path} has files of ranks of several kinds ({names}): give each kind a folder of its own")
    ((head, tail), ranks) = next(iter(sets.items()))
    missing = [rank for rank in range(max(ranks) + 1) if rank not in ranks]
    if missing:
        width = len(str(max(ranks)))
        raise FormatError(
            f"{path}: {head}{missing[0]:0{width}d}{tail} is missing: there are files of the ranks "
            f"{', '.join(map(str, sorted(ranks)))}. Copy it from where the checkpoint was written"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _sets(entries: Iterable[Path]) -> dict[tuple[str, str], dict[int, Path]]:
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for entry in entries:
        match = _NUMBERED.match(entry.name if entry.is_dir() else entry.stem)
        if match:
            tail = match["tail"] + ("" if entry.is_dir() else entry.suffix)
            found.setdefault((match["head"], tail), {})[int(match["rank"])] = entry
    return found


def _inside(folder: Path) -> Path | None:
    files = [entry for entry in folder.iterdir() if entry.suffix in _SUFFIXES and entry.is_file()]
    return files[0] if len(files) == 1 else None


def _are_torch(files: Iterable[Path]) -> bool:
    try:
        return all(is_torch_file(FileSource(file)) for file in files)
    except (OSError, FormatError):
        return False
