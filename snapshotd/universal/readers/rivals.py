"""
Two checkpoints in one folder: which file speaks for which format, and which formats come together.

Rule 1: a format has a claim on a folder by a file without which nobody reads the whole of it. What was not finished
claims nothing.
Rule 2: what is part of a checkpoint, or the same weights once more, is no rival: a universal checkpoint's own weights;
Megatron's torch_dist, which lies in DCP files; weights for transformers beside the folders in which DeepSpeed and
accelerate keep the training state, and beside the same weights as ``pytorch_model.bin``; files of torch.save that do
not hold both a model and its optimizer.
Rule 3: names decide as far as they can: a reader is imported only where there is something for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from snapshotd.errors import CorruptionError
from snapshotd.universal.sources import FileSource, read_bytes

__all__ = ["rivals"]

_SEVERAL: Final = 8
"""Files of torch.save that are opened at most: folders with more of them are no trainer's single checkpoint."""

_MARKER: Final = "universal.json"
_NAMED_FILE: Final = re.compile(rb'"file"\s*:\s*"([^"\\]+)"')
_TAGGED: Final = re.compile(r"latest(_universal)?\Z")
_DCP: Final = re.compile(r"\.metadata\Z|__[0-9]+\.metadata\Z")
_ACCELERATE: Final = re.compile(r"(pytorch_)?model_fsdp_[0-9]+/\Z")
_ITERATION: Final = re.compile(r"(iter_[0-9]+|release|mp_rank_[0-9].*)/\Z")
_TORCH: Final = re.compile(r".*\.(pt|pth|bin|ckpt|tar|pkl)\Z")
_WEIGHTS: Final = re.compile(r"pytorch_model\.bin(\.index\.json)?\Z")
_PARTS: Final = re.compile(
    r".*_states\.pt\Z|(common|model_optim_rng|distrib_optim|optimizer)\.pt\Z|optimizer\.bin\Z|pytorch_model-.*"
)
"""Files of torch.save that belong to a checkpoint of another format, or of several files, by their name."""


def rivals(path: Path, names: Collection[str], found: str) -> dict[str, str]:
    """
    Return the formats of all checkpoints in the folder ``path``, with the file that says so of each; empty where there
    is none but the one of the format ``found``, which was the first in the order of detection that fitted.

    ``names``: what the folder holds, folders with a "/" behind.
    """
    order = list(_CLAIMS)
    mine = _CLAIMS[found](path, sorted(names)) if found != order[-1] else None
    if mine is None:
        return {}
    claimed = {name: _CLAIMS[name](path, sorted(names)) for name in order[order.index(found) + 1 :]}
    others = {name: file for name, file in claimed.items() if file and not _comes_with(found, mine, name, file)}
    return {found: mine, **others} if others else {}


def _comes_with(found: str, file: str, other: str, other_file: str) -> bool:
    """Whether what ``other`` claims is part of the checkpoint that was found, or goes with it."""
    if (found, other) == ("megatron", "dcp"):
        return file == "metadata.json"
    exported = other == "hf" or _WEIGHTS.match(other_file) is not None
    in_folders = _TAGGED.match(file) is not None or "/" in file
    return exported and (found == "hf" or (found in ("deepspeed", "dcp") and in_folders))


def _universal(path: Path, names: Collection[str]) -> str | None:
    return _MARKER if _MARKER in names else None


def _snapshot(path: Path, names: Collection[str]) -> str | None:
    return "snapshot.json" if "snapshot.json" in names else None


def _megatron(path: Path, names: Collection[str]) -> str | None:
    folders = [name for name in names if _ITERATION.match(name)]
    if not folders and "metadata.json" not in names:
        return None
    from snapshotd.universal.readers import megatron

    if not megatron.detect(path):
        return None
    own = [name for name in (megatron.TRACKER, "metadata.json") if name in names]
    return own[0] if own else folders[0].removesuffix("/")


def _deepspeed(path: Path, names: Collection[str]) -> str | None:
    files = [name for name in names if name.endswith("_states.pt")]
    folders = [name for name in names if name.endswith("/")]
    if not files and not folders:
        return None
    from snapshotd.universal.readers.deepspeed_files import find_tag, is_tag_folder

    if is_tag_folder(path):
        return next((name for name in files if "model_states" in name), files[0])
    if any(map(_TAGGED.match, names)):
        try:
            find_tag(path)
        except CorruptionError:  # it names what is not there
            return None
        return next(name for name in names if _TAGGED.match(name))
    return next((name for name in folders if is_tag_folder(path / name)), None)


def _dcp(path: Path, names: Collection[str]) -> str | None:
    inside = [f"{name}.metadata" for name in names if _ACCELERATE.match(name)]
    return next(
        (name for name in names if _DCP.match(name)),
        next((name for name in inside if (path / name).is_file()), None),
    )


def _hf(path: Path, names: Collection[str]) -> str | None:
    files = [name for name in names if name.endswith(".safetensors")]
    ours = _files_of_marker(path) if _MARKER in names else set()
    if ours.issuperset(files):
        return None
    from snapshotd.universal.readers import hf

    indexes = [] if ours else [name for name in hf.INDEX_NAMES if name in names]
    weights = [name for name in files if name not in ours and (name in hf.SINGLE_NAMES or hf.PART.match(name))]
    return next(iter(indexes + weights), None)


def _files_of_marker(path: Path) -> set[str]:
    """The files that ``universal.json`` names: its own, which are no checkpoint of another format."""
    source = FileSource(path / _MARKER)
    return {name.decode("utf-8", "replace") for name in _NAMED_FILE.findall(read_bytes(source, 0, source.size))}


def _torch(path: Path, names: Collection[str]) -> str | None:
    weights = next((name for name in names if _WEIGHTS.match(name)), None)
    files = [name for name in names if _TORCH.match(name) and not _PARTS.match(name) and not _WEIGHTS.match(name)]
    if not files:
        return weights
    from snapshotd.universal.readers.companions import is_companion
    from snapshotd.universal.readers.torch_save import is_training_state

    files = [name for name in files if not is_companion(name)][:_SEVERAL]
    return next((name for name in files if is_training_state(path / name)), weights)


_CLAIMS: Final[Mapping[str, Callable[[Path, Collection[str]], str | None]]] = {
    "universal": _universal,
    "snapshot": _snapshot,
    "megatron": _megatron,
    "deepspeed": _deepspeed,
    "dcp": _dcp,
    "hf": _hf,
    "torch": _torch,
}
