"""
Convert a checkpoint: read it as a State, select and cast, say what the target cannot hold, stream it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

import xxhash

from snapshotd.errors import UsageError
from snapshotd.layout.dtypes import dtype_of
from snapshotd.universal import readers
from snapshotd.universal.derived import Cast
from snapshotd.universal.places import Job, Place, place_of
from snapshotd.universal.rules import Rules, load_rules
from snapshotd.universal.state import FIXED_KINDS, State, Tensor
from snapshotd.universal.stream import Settings, unwritable
from snapshotd.universal.writers import Writer, writer_for

__all__ = ["DTYPE_NAMES", "Report", "convert", "parse_layout", "select"]

Only = Literal["model", "optimizer"]

DTYPE_NAMES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_FLOATS: Final = frozenset(DTYPE_NAMES.values())
_AXES: Final = ("dp", "tp", "pp", "ep", "cp", "vpp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a conversion did, or (``dry_run``) would do."""

    source_format: str
    target_format: str
    step: int | None
    tensors: int
    nbytes: int
    kinds: dict[str, int]
    lost: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False


def convert(
    source: str | os.PathLike[str] | Job,
    target: str | os.PathLike[str],
    *,
    to: str,
    source_format: str = "auto",
    layout: Mapping[str, int] | None = None,
    rules: Rules | str | None = None,
    dtype: str | None = None,
    only: Only | None = None,
    strict: bool = False,
    dry_run: bool = False,
    settings: Settings | None = None,
) -> Report:
    """
    Convert the checkpoint at ``source`` into ``to`` at ``target``; see ``snapshotd convert --help`` for the meanings.

    FormatError and CorruptionError say what is wrong with the source, UsageError with the arguments or the target. When
    it raises, nothing stands under a final name that is not whole, and ``settings.resume`` goes on.
    """
    place, target_path = place_of(source), Path(target)
    writer = writer_for(to)
    goal = Path(os.path.realpath(target_path))
    if isinstance(place, Path) and Path(os.path.realpath(place)) in (goal, *goal.parents):
        raise UsageError(f"the target {target_path} must not be the source, nor inside it")
    name = readers.detect(place) if source_format == "auto" else source_format
    if isinstance(rules, str):
        rules = load_rules(rules)
    with closing(readers.read(place, name, rules)) as state:
        state = select(state, only=only, dtype=dtype)
        state.check()
        options = {"layout": dict(layout or {}), "rules": rules}
        written = state if to == "universal" else replace(state, step=state.steps_made)
        report = _report(state, writer, name, to, options, dry_run)
        if report.lost and strict:
            raise UsageError(f"{to} cannot hold: {'; '.join(report.lost)} (--strict was given)")
        if dry_run and (check := getattr(writer, "check", None)) is not None:
            check(written, options)
        if not dry_run:
            identity = _identity(place, state, to, options)
            try:
                writer.write(written, target_path, settings or Settings(), identity=identity, options=options)
            except OSError as error:
                raise unwritable(Path(error.filename or target_path), error) from error
    return report


def _report(
    state: State, writer: Writer, source_format: str, to: str, options: Mapping[str, Any], dry_run: bool
) -> Report:
    limits = getattr(writer, "limits", None)
    warnings = [*state.warnings, *(limits(state) if limits is not None else ())]
    if prod(options["layout"].values()) > 1 and not hasattr(writer, "check"):
        warnings.append(f"--layout means nothing to {to}: every tensor is written whole")
    return Report(
        source_format=source_format,
        target_format=to,
        step=state.step,
        tensors=len(state.tensors),
        nbytes=state.nbytes,
        kinds={kind: sum(tensor.kind == kind for tensor in state.tensors) for kind in state.kinds},
        lost=writer.losses(state),
        warnings=warnings,
        dry_run=dry_run,
    )


def select(state: State, *, only: Only | None = None, dtype: str | None = None) -> State:
    """Return ``state`` with the model or the optimizer alone, and with its weights in another dtype."""
    if only == "model":
        kept = [tensor for tensor in state.tensors if tensor.kind in ("model", "buffer")]
        configs = {key: value for key, value in state.extra.items() if key == "configs"}
        state = replace(state, tensors=kept, param_groups=[], extra=configs)
    elif only == "optimizer":
        kept = [tensor for tensor in state.tensors if tensor.kind == "fp32" or tensor.kind not in FIXED_KINDS]
        state = replace(state, tensors=kept, tied={}, frozen=[], extra={})
    elif only is not None:
        raise UsageError(f"--only knows model and optimizer, not {only!r}")
    if dtype is None:
        return state
    name = dtype_of(DTYPE_NAMES.get(dtype, dtype)).name
    if name not in _FLOATS:
        raise UsageError(f"--dtype knows {', '.join(DTYPE_NAMES)}, not {dtype!r}")
    cast = [
        Tensor(tensor.kind, tensor.name, Cast(tensor.view, name))
        if tensor.kind == "model" and tensor.dtype in _FLOATS and tensor.dtype != name
        else tensor
        for tensor in state.tensors
    ]
    return replace(state, tensors=cast)


def parse_layout(text: str | None) -> dict[str, int]:
    """Return ``dp=2,tp=4`` as a dict; UsageError for anything else."""
    result: dict[str, int] = {}
    for part in filter(None, (text or "").split(",")):
        axis, _, number = part.strip().partition("=")
        if axis not in _AXES or not number.isdigit() or not 1 <= int(number) <= 1 << 20:
            raise UsageError(f"--layout: {part!r} is not AXIS=NUMBER with one of {', '.join(_AXES)}")
        if axis in result:
            raise UsageError(f"--layout: {axis} is given twice")
        result[axis] = int(number)
    return result


def _identity(source: Place, state: State, to: str, options: Mapping[str, Any]) -> str:
    """
    Name the work, so that an interrupted run goes on with nothing else: the source's bytes, and what comes of them.

    Files are taken for the same by size and time, a job's slots by what their labels say.
    """
    files: dict[str, None] = {}
    for tensor in state.tensors:
        files.update(dict.fromkeys(tensor.view.labels()))
    rules = options.get("rules")
    where = str(replace(source, step=state.step) if isinstance(source, Job) else source.resolve())
    facts: list[Any] = [to, options["layout"], where, repr(rules.rules) if rules else None]
    for label in files:
        try:
            stat = os.stat(label)
        except OSError:
            facts.append([label])
            continue
        facts.append([label, stat.st_size, stat.st_mtime_ns])
    facts += [[tensor.kind, tensor.name, tensor.dtype, tensor.shape] for tensor in state.tensors]
    return f"{xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())} {where}"
