"""
Compare and verify checkpoints, tensor by tensor and bit by bit, with bounded memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from snapshotd.errors import CorruptionError, UsageError
from snapshotd.universal import readers
from snapshotd.universal.checksums import compare_records
from snapshotd.universal.format import MARKER_NAME
from snapshotd.universal.places import Place
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import Settings, digest_of
from snapshotd.universal.torchzip import Archive, watch
from snapshotd.universal.views import View, slabs
from snapshotd.universal.words import to_float, word_dtype

if TYPE_CHECKING:
    from snapshotd.universal.rules import Rules

__all__ = ["Difference", "Verified", "diff", "verify", "verify_state"]

_SLAB: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """
    One thing in which two checkpoints differ: ``what`` is "missing", "extra", "dtype", "shape", "bytes" or the name of
    a part of the structure ("step", "param_groups", "tied", "frozen", "extra_state").
    """

    what: str
    kind: str
    name: str
    detail: str
    max_abs: float | None = None
    elements: int = 0


@dataclass(slots=True)
class Verified:
    """What ``verify`` found: each problem is one line."""

    format: str
    step: int | None
    tensors: int = 0
    nbytes: int = 0
    digests: int = 0
    crcs: int = 0
    """Records of torch.save whose CRC-32 matches."""
    without_crc: int = 0
    """Records of torch.save that have no CRC-32."""
    bare_files: int = 0
    """Files with tensors that have neither digests nor CRC-32s."""
    problems: list[str] = field(default_factory=list)

    @property
    def how(self) -> str:
        """What was compared, in words."""
        if self.format == "snapshot":
            return "every chunk matches its digest"  # or it would not have been read
        if self.digests:
            return f"{self.digests} digests match"
        if not self.crcs and not self.without_crc:
            return "all bytes are there (the format has no digests)"
        bare = f"; {self.bare_files} other files have no digests" if self.bare_files else ""
        if not self.crcs:
            return f"all bytes are there (torch.save wrote no CRC-32s: {self.without_crc} records have none{bare})"
        without = f"; {self.without_crc} are without" if self.without_crc else ""
        return f"{self.crcs} records match their CRC-32s{without}{bare}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    path: Place, format_name: str = "auto", settings: Settings | None = None, rules: Rules | None = None
) -> Verified:
    """
    Read every byte: each element must be there exactly once, and match its digest where the format has digests. Records
    of torch.save must match their CRC-32s, all those of the files that the checkpoint is read from.

    Problems of tensors are collected; an unreadable structure is raised as FormatError.
    """
    name = readers.detect(path) if format_name == "auto" else format_name
    with watch() as archives, closing(readers.read(path, name, rules)) as state:
        return verify_state(path, name, state, archives, settings or Settings())


def verify_state(
    path: Place, name: str, state: State, archives: Mapping[Archive, None], settings: Settings
) -> Verified:
    """
    The same for a state that was read, of the format ``name``.

    ``archives`` are those of a ``watch`` that began before it was read, and has not ended.
    """
    result = Verified(format=name, step=state.step)
    try:
        state.check()
    except CorruptionError as error:
        result.problems.append(str(error))
    _verify_tensors(_digests_of(path, name), state, settings, result)
    compared = compare_records(archives, settings, state.nbytes)
    result.crcs, result.without_crc = compared.matching, compared.without
    result.problems += compared.problems
    if archives:
        known = {archive.source.label for archive in archives}
        labels = {label for tensor in state.tensors for label in tensor.view.labels()} - known
        result.bare_files = sum(Path(label).is_file() for label in labels)
    return result


def _digests_of(path: Place, name: str) -> dict[tuple[str, str], str]:
    if name != "universal" or not isinstance(path, Path):
        return {}
    from snapshotd.universal.readers.universal import manifest_of

    folder = path.parent if path.name == MARKER_NAME else path
    return {(entry.kind, entry.name): entry.digest for entry in manifest_of(folder).tensors}


def _verify_tensors(digests: Mapping[tuple[str, str], str], state: State, settings: Settings, result: Verified) -> None:
    total, done = state.nbytes, 0
    for tensor in state.tensors:
        result.tensors += 1
        try:
            got = digest_of(tensor.view, _SLAB)
            expected = digests.get(tensor.key)
            if expected is not None:
                result.digests += 1
                if got != expected:
                    files = ", ".join(tensor.view.labels())
                    result.problems.append(
                        f"{tensor.kind} of {tensor.name} has the digest {got}, expected {expected} ({files})"
                    )
        except CorruptionError as error:
            result.problems.append(f"{tensor.kind} of {tensor.name}: {error}")
        result.nbytes += tensor.nbytes
        done += tensor.nbytes
        if settings.progress is not None:
            settings.progress(done, total)


def diff(one: State, other: State) -> list[Difference]:
    """Return all differences between two states, in the order of the first."""
    found: list[Difference] = []
    left = {tensor.key: tensor for tensor in one.tensors}
    right = {tensor.key: tensor for tensor in other.tensors}
    for key, tensor in left.items():
        if key not in right:
            found.append(Difference("missing", *key, f"{tensor.dtype} {list(tensor.shape)} is in the first only"))
        else:
            found += _compare(tensor, right[key])
    for key, tensor in right.items():
        if key not in left:
            found.append(Difference("extra", *key, f"{tensor.dtype} {list(tensor.shape)} is in the second only"))
    for what, a, b in (
        ("step", one.steps_made, other.steps_made),
        ("param_groups", one.param_groups, other.param_groups),
        ("tied", one.tied, other.tied),
        ("frozen", sorted(one.frozen), sorted(other.frozen)),
        ("extra_state", one.extra, other.extra),
    ):
        if a != b:
            found.append(Difference(what, "", "", f"{_short(a)} against {_short(b)}"))
    return found


def _compare(one: Tensor, other: Tensor) -> list[Difference]:
    if one.shape != other.shape:
        detail = f"{list(one.shape)} against {list(other.shape)}"
        return [Difference("shape", one.kind, one.name, detail)]
    if one.dtype != other.dtype:
        detail = f"{one.dtype} against {other.dtype}"
        most, count = _distance(one.view, other.view)
        return [Difference("dtype", one.kind, one.name, detail, most, count)]
    most, count = _distance(one.view, other.view)
    if not count:
        return []
    return [Difference("bytes", one.kind, one.name, f"{count} of {one.view.numel} elements differ", most, count)]


def _distance(one: View, other: View) -> tuple[float | None, int]:
    """Return (largest absolute difference, number of elements that differ in a bit, or in value for other dtypes)."""
    most: float | None = None
    count = 0
    for at, lengths in slabs(one.shape, max(one.itemsize, other.itemsize), _SLAB):
        a = np.empty(lengths, dtype=word_dtype(one.dtype))
        b = np.empty(lengths, dtype=word_dtype(other.dtype))
        one.read_into(at, a)
        other.read_into(at, b)
        if one.dtype == other.dtype:
            if a.tobytes() == b.tobytes():
                continue
            width = one.itemsize
            pairs = a.reshape(-1).view(np.uint8).reshape(-1, width) != b.reshape(-1).view(np.uint8).reshape(-1, width)
            count += int(pairs.any(axis=1).sum())
        try:
            x, y = to_float(a, one.dtype).reshape(-1), to_float(b, other.dtype).reshape(-1)
        except UsageError:
            continue
        if x.dtype.kind == "b":
            continue
        wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.abs(x.astype(wide) - y.astype(wide))
        if one.dtype != other.dtype:
            count += int((far != 0).sum())
        far = far[~np.isnan(far)]
        if far.size:
            most = max(most or 0.0, float(far.max()))
    return most, count


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else text[:200] + "..."
