"""
Readers: one file per foreign format, each with ``detect(path)`` and ``read(path)``; see state.py for how to write one.
Those in ``WITH_RULES`` have ``read(path, rules)``: their files need not say how ranks' parts make a whole.

The order of the table is the order of detection: the more special format first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from snapshotd.errors import CorruptionError, FormatError, LayoutError, UsageError
from snapshotd.universal.places import Job, Place
from snapshotd.universal.readers.rivals import rivals
from snapshotd.universal.state import State

if TYPE_CHECKING:
    from snapshotd.universal.rules import Rules

__all__ = ["FORMATS", "WITH_RULES", "detect", "read"]

FORMATS: Final = ("universal", "snapshot", "megatron", "deepspeed", "dcp", "hf", "torch")
"""What ``--from`` knows, in the order of detection. Megatron's torch_dist lies in DCP files, so it comes before."""

WITH_RULES: Final = ("megatron", "deepspeed", "torch")

_MODULES: Final = {"torch": "torch_save"}

_HINTS: Final = {
    "universal": re.compile(r"universal\.json$|\.snapshotd-convert\.jsonl$"),
    "snapshot": re.compile(r"snapshot\.json$"),
    "megatron": re.compile(r"latest_checkpointed_iteration\.txt$|(iter_\d+|release)/$|mp_rank_\d|metadata\.json$"),
    "deepspeed": re.compile(r"latest(_universal)?$|.*_states\.pt$|.*/$"),
    "dcp": re.compile(r"\.metadata$|__|.*/$|.*\.safetensors$"),
    "hf": re.compile(r".*\.safetensors$|.*\.safetensors\.index\.json$"),
}
"""
What at least one name in a folder must match (folders end in "/"), else the format is out of the question. It saves
the import of readers that have nothing to do here; ``detect`` decides.
"""


class Reader(Protocol):
    """A module of this package."""

    def detect(self, path: Path) -> bool:
        """Whether ``path`` is of this format; reads names and first bytes only, and raises nothing."""

    def read(self, path: Path, *rules: Any) -> State:
        """Return the state at ``path``. FormatError, naming file, expectation and remedy, when it is broken."""


def detect(path: Place) -> str:
    """Return the name of the format of ``path``; UsageError when none of them is recognised, or several are."""
    if isinstance(path, Job):
        return "snapshot"
    try:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        names = _names(path)
        for name in FORMATS:
            if name in _HINTS and not any(map(_HINTS[name].match, names)):
                continue
            reader = _reader(name)
            if reader is not None and reader.detect(path):
                _refuse_rivals(path, names, name)
                return name
    except OSError as error:
        raise UsageError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    raise UsageError(
        f"{path} is not a checkpoint that snapshotd knows (looked for {', '.join(FORMATS)}); if it is one of these, "
        "say so with --from: the message will then tell what is missing"
    )


def read(path: Place, format_name: str = "auto", rules: Rules | None = None, *, idle_rules: bool = False) -> State:
    """
    Return the state at ``path``, which is of ``format_name``, or of what is detected. The caller closes it.

    ``rules`` are used only for what the files do not record themselves. One that matches no name is an error, unless
    ``idle_rules`` is set: it may be meant for another checkpoint.
    """
    state = _read(path, format_name, rules)
    if rules is not None and not idle_rules:
        try:
            rules.check_used(dict.fromkeys(t.name for t in state.tensors if t.kind not in ("rng", "extra")))
        except UsageError:
            state.close()
            raise
    return state


def _read(path: Place, format_name: str, rules: Rules | None) -> State:
    if isinstance(path, Job):
        if format_name not in ("auto", "snapshot"):
            raise UsageError(f"{path} is a snapshot of ours, and nothing in the format {format_name}: leave --from out")
        from snapshotd.universal.readers import live

        return live.read(path)
    if format_name == "auto":
        format_name = detect(path)
    elif format_name not in FORMATS:
        raise UsageError(f"unknown format {format_name!r}; there are {', '.join(FORMATS)}")
    elif not path.exists():
        raise UsageError(f"{path} does not exist")
    reader = _reader(format_name)
    if reader is None:
        raise UsageError(f"this version has no reader for {format_name}")
    try:
        state = reader.read(path, rules) if format_name in WITH_RULES else reader.read(path)
    except LayoutError as error:  # sizes that a file tells, and that cannot be
        raise FormatError(f"{path}: {error}") from error
    except OSError as error:
        raise FormatError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if format_name == "universal":
        _check_marks(path, state)
    return state


def _refuse_rivals(path: Path, names: list[str], found: str) -> None:
    """UsageError where the folder ``path`` holds another checkpoint beside the one that was found, both whole."""
    claimed = rivals(path, names, found) if path.is_dir() else {}
    claimed = {name: file for name, file in claimed.items() if _is_whole(path, name)}
    if found in claimed and len(claimed) > 1:
        told = ", ".join(f"{name} ({file})" for name, file in claimed.items())
        raise UsageError(f"{path} holds checkpoints of several formats: {told}: say with --from which one is meant")


def _is_whole(path: Path, name: str) -> bool:
    """Whether the checkpoint can be opened; one of torch.save that has a claim was."""
    if name == "torch":
        return True
    try:
        with closing(_read(path, name, None)) as state:
            state.check()
    except CorruptionError:
        return False
    except UsageError:  # it wants rules
        pass
    return True


def _check_marks(path: Path, state: State) -> None:
    """FormatError where ``extra`` or a group has a mark ($tensor, ...) that stands for nothing."""
    from snapshotd.universal.plain import from_json

    try:
        from_json([state.extra, state.param_groups], state.of_kind("extra"))
    except FormatError as error:
        raise FormatError(f"{path}: in extra or param_groups, {error}") from error


def _reader(name: str) -> Reader | None:
    module = f"{__name__}.{_MODULES.get(name, name)}"
    if importlib.util.find_spec(module) is None:
        return None
    return cast("Reader", importlib.import_module(module))


def _names(path: Path) -> list[str]:
    if not path.is_dir():
        return [path.name]
    try:
        return [entry.name + "/" * entry.is_dir() for entry in os.scandir(path)]
    except OSError:
        return []
