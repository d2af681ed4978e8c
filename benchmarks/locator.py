"""
The daemon of a node without a slot, as far as a restore needs it: `python -m benchmarks.locator SOCKET FOUND`.

A worker that asks what to restore gets the state that the holder has (FOUND is what it wrote), and then where its boxes
are. Its world is that of its hello. The daemon has protected this state, and so knows its layouts, as one does whose
own rank is gone; for a worker whose hello says NEW it is one that never saw them.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snapshotd.arena import Arena
from snapshotd.daemon.events import WorkerConn
from snapshotd.daemon.layouts import Layouts
from snapshotd.daemon.restore import Restore
from snapshotd.daemon.sources import Sources
from snapshotd.daemon.workers import WorkerSocket
from snapshotd.transfer import BulkClient
from snapshotd.v1 import control_pb2 as control
from snapshotd.v1 import worker_pb2 as worker

from .holder import JOB, RANKS

NEW = "new"
"""The formation of a worker whose daemon has just been started."""


class _Locator:
    def __init__(self, found: Path, arena: Arena, client: BulkClient) -> None:
        self._found = json.loads(found.read_text(encoding="ascii"))
        self._arena = arena
        self._sources = Sources("reader", arena, client)
        self._layouts = Layouts()
        self._hellos: dict[WorkerConn, worker.WorkerHello] = {}
        self._restores: dict[WorkerConn, Restore] = {}

    def learn(self) -> None:
        """As behind the first step that it protects."""
        self._sources.learn(self._plan().peers)
        stripe_set = control.StripeSet.FromString(b64decode(self._found["set"]))
        learning = self._layouts.learn([stripe_set], self._sources)
        assert learning is not None
        learning.result()

    def serve(self, conn: WorkerConn, frame: worker.Frame) -> worker.Frame | None:
        if frame.HasField("hello"):
            self._hellos[conn] = frame.hello
            return worker.Frame(welcome=worker.WorkerWelcome(node_id="reader"))
        if frame.HasField("restore_query"):
            hello = self._hellos[conn]
            layouts = Layouts() if hello.formation == NEW else self._layouts
            self._restores[conn] = Restore(self._plan(), hello.world_size, self._arena, self._sources, layouts)
            decision = worker.RestoreDecision(kind=worker.RestoreDecision.KIND_SNAPSHOT, direct=True)
            return worker.Frame(request_id=frame.request_id, restore_decision=decision)
        if frame.HasField("restore_locate"):
            found = self._restores[conn].locate(self._hellos[conn].rank, frame.restore_locate.boxes)
            return worker.Frame(request_id=frame.request_id, restore_sources=found)
        if frame.HasField("restore_done"):
            self._restores.pop(conn).close()
        return None

    def _plan(self) -> control.RestorePlan:
        stripe_set = control.StripeSet.FromString(b64decode(self._found["set"]))
        nodes = [f"n{rank}" for rank in range(RANKS)]
        return control.RestorePlan(
            job=JOB,
            epoch=2,
            kind=control.RESTORE_KIND_MEMORY,
            source_epoch=1,
            source_step=1,
            source_world_size=RANKS,
            nodes=nodes,
            slots=[member.slot for member in stripe_set.members],
            peers=[
                control.PeerAddress(node_id=node, bulk=address)
                for node, address in zip(nodes, self._found["addresses"], strict=True)
            ],
        )


async def main(path: str, found: str) -> None:
    loop = asyncio.get_running_loop()
    arena = Arena(Path(f"{path}.arena"), budget_bytes=1 << 30)
    with BulkClient() as client, ThreadPoolExecutor(1) as thread:
        locator = _Locator(Path(found), arena, client)
        locator.learn()

        def hear(conn: WorkerConn, frame: worker.Frame) -> None:
            answered = loop.run_in_executor(thread, locator.serve, conn, frame)
            answered.add_done_callback(lambda done: done.result() and socket.send(conn, done.result()))

        socket = WorkerSocket(Path(path), who=worker.IAm, frame=hear, gone=lambda conn: None)
        gc.freeze()  # as a daemon does
        await socket.start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
