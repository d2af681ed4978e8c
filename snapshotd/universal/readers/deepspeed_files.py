"""
The folder of a DeepSpeed checkpoint: which files are there, which must be, and what is said when they are not.

Rule 1: ``pp_rank`` in a file's name is the data-parallel rank; ``mp_rank`` is ``pipeline stage * tp + tensor rank``.
Rule 2: ranks are sorted as numbers; the world size is what the files say inside, never a count of files.
Rule 3: what does not belong to that world size is the rest of another run in the same folder: refused, by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal import torchzip
from snapshotd.universal.sources import FileSource

__all__ = ["Folder", "Saved", "find_tag", "is_tag_folder", "listed", "load", "require_ranks", "same_everywhere"]

_MODEL: Final = re.compile(r"mp_rank_([0-9]+)_model_states\.pt\Z")
_MODEL3: Final = re.compile(r"zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_model_states\.pt\Z")
_OPTIM: Final = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt\Z")
_LAYER: Final = re.compile(r"layer_([0-9]+)-(?:model_([0-9]+)-)?model_states\.pt\Z")
_EXPERT: Final = re.compile(r"layer_([0-9]+)_expert_([0-9]+)_mp_rank_([0-9]+)_model_states\.pt\Z")
_EXPP: Final = re.compile(r"expp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt\Z")

_TAG_BYTES_MAX: Final = 4096


@dataclass(slots=True)
class Saved:
    """One file that was opened: its path and the dict in it."""

    path: Path
    values: dict[str, Any]

    @property
    def name(self) -> str:
        return self.path.name

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def typed(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value of ``key``; ``default`` where it is missing or None; FormatError where it is of another type."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise FormatError(f"{self.path}: {key} is a {type(value).__name__}: not a file that DeepSpeed wrote")
        return value

    def count(self, key: str) -> int | None:
        """A number of things, None where the file does not say; a float that is whole counts too."""
        value = self.values.get(key)
        if type(value) is float and value.is_integer():
            value = int(value)
        return value if type(value) is int and value >= 0 else None


@dataclass(slots=True)
class Folder:
    """The files of one tag, by rank."""

    path: Path
    model: dict[int, Path] = field(default_factory=dict)
    model3: dict[tuple[int, int], Path] = field(default_factory=dict)
    optim: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    expp: dict[tuple[int, int], Path] = field(default_factory=dict)
    universal: bool = False

    @classmethod
    def scan(cls, path: Path) -> Folder:
        """Return what is in ``path``; FormatError where two files claim to be the same rank's."""
        folder = cls(path)
        names = sorted(entry.name for entry in os.scandir(path))
        for name in names:
            file = path / name
            if match := _MODEL.match(name):
                _put(folder.model, int(match[1]), file)
            elif match := _MODEL3.match(name):
                _put(folder.model3, (int(match[1]), int(match[2])), file)
            elif match := _OPTIM.match(name):
                _put(folder.optim, (int(match[2]), int(match[3])), file)
            elif match := _EXPERT.match(name):
                _put(folder.experts, (int(match[1]), int(match[2]), int(match[3])), file)
            elif match := _LAYER.match(name):
                _put(folder.layers, (int(match[1]), int(match[2] or 0)), file)
            elif match := _EXPP.match(name):
                _put(folder.expp, (int(match[1]), int(match[2])), file)
        folder.universal = (path / "zero").is_dir()
        if folder.universal and folder.model:
            folder.model3.clear()  # a Universal folder may serve all stages
        if folder.model and folder.model3:
            raise FormatError(
                f"{path} has {folder.model[min(folder.model)].name} (ZeRO stage 0 to 2) and "
                f"{folder.model3[min(folder.model3)].name} (stage 3): the rest of another run with the same tag; move "
                "away the files of the older one"
            )
        return folder

    @property
    def is_empty(self) -> bool:
        return not self.model and not self.model3

    @property
    def mp_ranks(self) -> list[int]:
        return sorted(self.model) if self.model else sorted({mp for _, mp in self.model3})


def load(path: Path) -> Saved:
    """Return what torch.save wrote into ``path``, which must be a dict."""
    values = torchzip.load(FileSource(path))
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds a {type(values).__name__}, expected a dict: not a file that DeepSpeed wrote")
    return Saved(path, values)


def is_tag_folder(path: Path) -> bool:
    """Whether ``path`` has files of DeepSpeed's ranks."""
    try:
        names = [entry.name for entry in os.scandir(path)]
    except OSError:
        return False
    return any(_MODEL.match(name) or _MODEL3.match(name) or _OPTIM.match(name) for name in names)


def find_tag(path: Path) -> Path:
    """
    Return the folder with the files: ``path`` itself, what ``latest`` (``latest_universal``) in it names, or the only
    folder of that kind in it. FormatError when there is none, or no telling which.
    """
    if path.is_file() and path.name in ("latest", "latest_universal"):
        return _named(path)
    if is_tag_folder(path):
        return path
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            return _named(path / name)
    found = [child for child in listed(path) if child.is_dir() and is_tag_folder(child)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(child.name for child in found)
        raise FormatError(
            f"{path} has no file 'latest' and several checkpoints ({names}): give the path of one of them"
        )
    raise FormatError(
        f"{path} is no checkpoint of DeepSpeed: neither it nor a folder in it has *_model_states.pt files, and there "
        "is no file 'latest'"
    )


def require_ranks(
    found: Mapping[int, Path], expected: int, *, name: str, why: str, folder: Path, what: str = "rank"
) -> list[Path]:
    """
    Return the files of ranks 0 to ``expected`` - 1. FormatError when some are missing or there are others.

    ``name``: what a file is called, with ``{}`` for the rank. ``why``: which file says how many there are.
    """
    missing = [rank for rank in range(expected) if rank not in found]
    if missing:
        names = ", ".join(name.format(rank) for rank in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        have = ", ".join(map(str, sorted(found)[:8])) or "none"
        raise FormatError(
            f"{folder}: missing {names}{more}. Expected {what}s 0 to {expected - 1} ({why}), found {have}. Copy what "
            "is missing from the nodes that wrote it, or take an older checkpoint"
        )
    others = sorted(rank for rank in found if rank >= expected)
    if others:
        names = ", ".join(found[rank].name for rank in others[:4])
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise FormatError(
            f"{folder}: {names}{more} are of {what}s that do not belong here: expected {expected} ({why}), found "
            f"{len(found)}. They are left over from another run with the same tag, or the other files are: move away "
            "those that do not belong to this run"
        )
    return [found[rank] for rank in range(expected)]


def listed(path: Path) -> list[Path]:
    """The entries of a folder, in order of their names; none where it can't be read."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(path))
    except OSError:
        return []


def _named(latest: Path) -> Path:
    data = latest.read_bytes()[:_TAG_BYTES_MAX]
    tag = data.decode("utf-8", "replace").strip()
    if not tag or "\0" in tag or Path(tag).is_absolute() or ".." in Path(tag).parts:
        raise FormatError(f"{latest} should name a folder beside it, but has {tag!r:.100}")
    folder = latest.parent / tag
    if not is_tag_folder(folder):
        others = [child.name for child in listed(latest.parent) if child.is_dir() and is_tag_folder(child)]
        hint = f"; give the path of one that is there ({', '.join(others[:5])})" if others else ""
        raise FormatError(f"{latest} names {tag!r:.100}, but {folder} has no files of a checkpoint in it{hint}")
    return folder


def _put(files: dict[Any, Path], key: Any, path: Path) -> None:
    if key in files:
        raise FormatError(
            f"{files[key]} and {path.name} are of the same rank: one of them is the rest of another run (the prefix "
            "bf16_ is on the files of bf16 runs only); move it away"
        )
    files[key] = path


def same_everywhere(files: Iterable[Saved], key: str, what: str) -> int | None:
    """Return the count ``key`` of all files; FormatError, naming two of them, where it differs."""
    first: tuple[Saved, int] | None = None
    for saved in files:
        value = saved.count(key)
        if value is None:
            continue
        if first is None:
            first = (saved, value)
        elif first[1] != value:
            raise FormatError(
                f"{saved.path} is of {what} {value}, but {first[0].name} is of {first[1]}: the files are of different "
                f"saves. Take all files of one {what}, or an older checkpoint that is whole"
            )
    return first[1] if first else None
