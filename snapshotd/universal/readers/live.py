"""
Read a job's snapshot from its daemons' memory, every byte verified as it is read, while the job trains on.

Rule: the slots are held until the state is closed, or nobody has it any more. The job never waits for that: what it
has no room for meanwhile it leaves out, and counts.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path

from snapshotd.daemon.held import held_snapshot
from snapshotd.daemon.plans import PlanSources, read_bytes, read_layouts
from snapshotd.errors import LocalProtocolError, UsageError
from snapshotd.settings import ToolSettings, from_environment
from snapshotd.transfer import ObjectMissing, Piece
from snapshotd.universal.places import Job
from snapshotd.universal.readers import snapshot
from snapshotd.universal.state import State
from snapshotd.v1 import control_pb2 as control

__all__ = ["read"]


def read(job: Job) -> State:
    """
    Return the state of a job's snapshot; where nothing is in memory any more, that of the durable one.

    UsageError for a job or a step that is not there, Unrecoverable when there is no snapshot, PeerError when the
    coordinator or a daemon does not answer.
    """
    with ExitStack() as stack:
        settings = job.settings or from_environment(ToolSettings, "tools")
        plan, sources = stack.enter_context(held_snapshot(settings, job.name, job.step))
        if plan.kind != control.RESTORE_KIND_MEMORY:
            return snapshot.read(Path(plan.durable_path))
        opened = PlanSources(plan, sources)
        stack.callback(opened.close)
        live = _Live(opened)
        with opened.use() as found:
            layouts = read_layouts(found)
            metas = [read_bytes(source, *layout.meta) for source, layout in zip(found, layouts, strict=True)]
        ranks = [_Rank(live, ref, str(Job(name=job.name, step=plan.source_step))) for ref in plan.slots]
        state = snapshot.assemble(
            [
                (layout.shards, rank, dict(layout.ties), snapshot.parse_meta(meta, rank.label))
                for layout, rank, meta in zip(layouts, ranks, metas, strict=True)
            ]
        )
        state.source.update(
            {"job": plan.job, "epoch": plan.source_epoch, "world_size": plan.source_world_size, "from": "memory"}
        )
        state.closer = weakref.finalize(live, stack.pop_all().close)
        return state


class _Live:
    """What all ranks of a snapshot are read from; with the last of them the hold ends."""

    def __init__(self, opened: PlanSources) -> None:
        self.opened = opened


class _Rank:
    """A rank's held slot as a source. ``label`` names its very bytes: two runs that read equal labels read the same."""

    def __init__(self, live: _Live, ref: control.SlotRef, name: str) -> None:
        self.label = f"rank {ref.rank} of {name} (epoch {ref.epoch}, {ref.root_digest})"
        self.size = ref.file_bytes
        self._rank = ref.rank
        self._live = live

    def read_into(self, begin: int, out: memoryview) -> None:
        try:
            with self._live.opened.use() as sources:
                sources[self._rank].read([Piece(begin, out)])
        except ObjectMissing as error:
            raise ObjectMissing(f"{self.label} was held, and is gone: has its daemon restarted? ({error})") from error
        except LocalProtocolError as error:
            raise UsageError(f"{self.label} was let go of: the checkpoint is closed") from error
