"""
A snapshot of a job that trains on, for a tool: found, and held until the tool has read it.

Rule 1: a slot may be gone between the coordinator's word and the hold. Then the coordinator is asked again: for the
newest step that is another one, and for a named one it says what there is instead. A bounded number of times.
Rule 2: a hold is of the whole snapshot, or there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Final

from snapshotd.arena import slot_key
from snapshotd.calls import ask
from snapshotd.daemon.sources import Sources
from snapshotd.errors import PeerUnreachable
from snapshotd.settings import ToolSettings
from snapshotd.transfer import BulkClient, ObjectMissing
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1.bulk_pb2 import ObjectKey

__all__ = ["hold_located", "held_snapshot"]

_LOCATE_TIMEOUT_S: Final = 600.0
"""A lost slot may have to be rebuilt first, or a node may be away for the length of its lease."""

_TRIES: Final = 50
_PAUSE_S: Final = 0.1
_MAX_THREADS: Final = 8


@contextmanager
def held_snapshot(
    settings: ToolSettings, job: str, step: int | None
) -> Iterator[tuple[control.RestorePlan, Sources]]:
    """
    Yield where a job's snapshot (of ``step``, or the newest) is, and the sources that read it until the block ends.

    It may be durable: then nothing is held. UsageError for a job or a step that is not there, Unrecoverable when there
    is no snapshot, PeerError as the coordinator and the daemons have it.
    """
    request = control.LocateSnapshotRequest(job=job, step=step or 0, latest=step is None)

    def locate() -> control.RestorePlan:
        found: control.LocateSnapshotResponse = ask(
            settings, lambda stub: stub.LocateSnapshot(request, timeout=_LOCATE_TIMEOUT_S)
        )
        return found.plan

    tls = settings.tls
    with ExitStack() as stack:
        client = stack.enter_context(BulkClient(tls=tls.client_context() if tls else None))
        plan = hold_located(client, locate, stack)
        yield plan, Sources("", None, client)


def hold_located(
    client: BulkClient, locate: Callable[[], control.RestorePlan], stack: ExitStack
) -> control.RestorePlan:
    """Return a plan of ``locate``, asked as often as need be, whose slots are held until ``stack`` is closed."""
    tries = _TRIES
    while True:
        plan = locate()
        try:
            stack.enter_context(_hold(client, plan))
            return plan
        except ObjectMissing:
            tries -= 1
            if not tries:
                raise
            time.sleep(_PAUSE_S)  # the daemon has freed it, and tells the coordinator with its next message


def _hold(client: BulkClient, plan: control.RestorePlan) -> ExitStack:
    """Hold all slots of a plan, on all nodes at once."""
    if plan.kind != control.RESTORE_KIND_MEMORY:
        return ExitStack()
    addresses = {peer.node_id: peer.bulk for peer in plan.peers}
    wanted: dict[str, list[ObjectKey]] = {}
    for ref, node in zip(plan.slots, plan.nodes, strict=True):
        if not addresses.get(node):
            raise PeerUnreachable(f"rank {ref.rank} of step {ref.step} is on {node}, which has no known address")
        wanted.setdefault(addresses[node], []).append(slot_key(ref))
    with ExitStack() as stack, ThreadPoolExecutor(min(len(wanted), _MAX_THREADS) or 1, "snapshotd-hold") as pool:
        holds = [pool.submit(client.hold, address, keys) for address, keys in wanted.items()]
        for hold in wait(holds).done:
            if hold.exception() is None:
                stack.enter_context(hold.result())
        for hold in holds:
            hold.result()
        return stack.pop_all()
