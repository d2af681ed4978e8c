"""
Persist: copy this node's slots of a committed step to the durable tier, verified, without the workers noticing.

Every node writes its own slots into the same directory. When all have reported, one node checks that everything is
there, writes the marker, and prunes. See snapshotd/durable for the format and for what a crash leaves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from snapshotd.arena import Arena, SlotFile
from snapshotd.daemon.cancel import Cancelled, check_cancel
from snapshotd.daemon.plans import PlanSources, slots_of_plan
from snapshotd.daemon.sources import Source, Sources
from snapshotd.durable import Marker, MarkerRank, RankRecord, RankWriter, prune, write_marker
from snapshotd.durable.format import rank_file_name, rank_record_name, read_json_file
from snapshotd.durable.reader import read_marker
from snapshotd.durable.writer import make_directories, remove_temporaries, snapshot_path
from snapshotd.errors import CorruptionError, FormatError, SnapshotdError, UsageError
from snapshotd.layout import CHUNK_BYTES
from snapshotd.v1 import control_pb2 as control

__all__ = ["export_snapshot", "persist_slots", "seal_persisted"]

_PIECE_BYTES: Final = 32 * CHUNK_BYTES
"""4 MiB: verified, then written while it is in the cache."""


def persist_slots(
    order: control.Persist,
    arena: Arena,
    sources: Sources,
    root: str | os.PathLike[str],
    cancel: threading.Event | None = None,
) -> control.PersistDone:
    """
    Write the slots of the order's step that are in this arena below ``root``.

    What goes wrong (no slots, a full disk, rot) is told in ``reason``; only Cancelled is raised. Files that another
    attempt has finished are written again: they are the same, and who knows how that attempt ended.
    """
    done = control.PersistDone(job=order.job, epoch=order.epoch, step=order.step)
    try:
        refs = _slots_of(order, arena)
        if not refs:
            raise UsageError(f"this node has no slot of step {order.step} of epoch {order.epoch}")
        directory = snapshot_path(root, order.job, order.epoch, order.step)
        make_directories(directory, below=Path(root))
        for ref in refs:
            with closing(sources.slot(ref, sources.node_id, cancel)) as source:
                _write_rank(directory, ref, source, cancel)
        done.ok = True
    except Cancelled:
        raise
    except (SnapshotdError, OSError) as error:
        done.reason = str(error)
    return done


def seal_persisted(
    order: control.PersistSeal,
    root: str | os.PathLike[str],
    *,
    keep: int,
    note: Callable[[str], None] = lambda text: None,
) -> control.PersistSealed:
    """
    Check that the files of all ranks are there, make them a snapshot, and remove all but the ``keep`` newest.

    The sizes and the ranks' JSON are checked, not all bytes: those were verified when they were written. What goes
    wrong is told in ``reason``, and then nothing is removed; ``note`` hears what a removal could not do.
    """
    path = snapshot_path(root, order.job, order.epoch, order.step)
    done = control.PersistSealed(
        durable=control.DurableRef(
            job=order.job, epoch=order.epoch, step=order.step, world_size=order.world_size, path=str(path)
        )
    )
    try:
        marker = _marker_of(order.job, order.epoch, order.step, order.world_size, order.slots)
        for ref in order.slots:
            _check_rank(path, ref)
        remove_temporaries(path)
        write_marker(path, marker)
        if read_marker(path) != marker:
            raise FormatError(f"the marker of {path} was changed while it was written")
        done.ok = True
        removed = prune(root, order.job, keep=keep, written=(order.epoch, order.step), note=note)
        done.removed.extend(removed)
    except (SnapshotdError, OSError) as error:
        done.reason = str(error)
    return done


def export_snapshot(
    plan: control.RestorePlan,
    directory: str | os.PathLike[str],
    sources: Sources,
    cancel: threading.Event | None = None,
) -> control.DurableRef:
    """
    Write a snapshot, from memory or durable, into ``directory``: the same format, the files directly in it.

    The directory must be empty, or not be there. CorruptionError, PeerError as the sources have them; OSError of the
    disk. After an error there is no marker.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty; choose another directory")
    make_directories(target, below=target)
    with closing(PlanSources(plan, sources)) as opening, opening.use() as opened:
        refs = slots_of_plan(plan, opened)
        marker = _marker_of(plan.job, plan.source_epoch, plan.source_step, plan.source_world_size, refs)
        for ref, source in zip(refs, opened, strict=True):
            _write_rank(target, ref, source, cancel)
        write_marker(target, marker)
    return control.DurableRef(
        job=plan.job,
        epoch=plan.source_epoch,
        step=plan.source_step,
        world_size=plan.source_world_size,
        path=str(target),
    )


def _slots_of(order: control.Persist, arena: Arena) -> list[control.SlotRef]:
    refs: list[control.SlotRef] = []
    for obj in arena.sealed():
        ref = obj.ref
        if not isinstance(obj, SlotFile) or ref is None or not isinstance(ref, control.SlotRef):
            continue
        if (ref.job, ref.epoch, ref.step) != (order.job, order.epoch, order.step):
            continue
        if ref.world_size != order.world_size:
            raise UsageError(f"rank {ref.rank} is of a world of {ref.world_size}, not of {order.world_size}")
        refs.append(ref)
    return refs


def _write_rank(directory: Path, ref: control.SlotRef, source: Source, cancel: threading.Event | None) -> None:
    record = RankRecord(slot=ref, chunk_digests=source.digests())
    room = memoryview(bytearray(0 if source.is_local else min(_PIECE_BYTES, ref.file_bytes)))
    with RankWriter(directory, ref.rank) as writer:
        for begin in range(0, ref.file_bytes, _PIECE_BYTES):
            check_cancel(cancel, "persisting")
            end = min(begin + _PIECE_BYTES, ref.file_bytes)
            with source.fetch(begin, end, room) as piece:
                writer.write(piece)
        writer.finish(record)


def _marker_of(job: str, epoch: int, step: int, world_size: int, slots: Sequence[control.SlotRef]) -> Marker:
    ordered = sorted(slots, key=lambda ref: ref.rank)
    if [ref.rank for ref in ordered] != list(range(world_size)) or not ordered:
        raise UsageError(
            f"a snapshot of {world_size} ranks needs a slot of each, not of {[ref.rank for ref in ordered]!r:.200}"
        )
    for ref in ordered:
        if (ref.job, ref.epoch, ref.step, ref.world_size) != (job, epoch, step, world_size):
            raise UsageError(
                f"the slot of rank {ref.rank} is of job {ref.job!r}, epoch {ref.epoch}, step {ref.step}, "
                f"{ref.world_size} ranks; expected {job!r}, {epoch}, {step}, {world_size}"
            )
    ranks = tuple(
        MarkerRank(file_bytes=ref.file_bytes, root_digest=ref.root_digest, layout_hash=ref.layout_hash)
        for ref in ordered
    )
    return Marker(job=job, epoch=epoch, step=step, ranks=ranks)


def _check_rank(directory: Path, ref: control.SlotRef) -> None:
    """Is the file there that the coordinator was told of?"""
    record_path, path = directory / rank_record_name(ref.rank), directory / rank_file_name(ref.rank)
    record = RankRecord.decode(read_json_file(record_path), str(record_path))
    for what in ("job", "epoch", "step", "rank", "world_size", "file_bytes", "root_digest", "layout_hash"):
        got, expected = getattr(record.slot, what), getattr(ref, what)
        if got != expected:
            raise CorruptionError(f"{record_path}: {what} is {got!r}, expected {expected!r}")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CorruptionError(
            f"{path} cannot be seen from this node: {error.strerror}. Is the persist directory the same on all nodes?"
        ) from error
    if size != ref.file_bytes:
        raise CorruptionError(f"{path} has {size} bytes, expected {ref.file_bytes}")
