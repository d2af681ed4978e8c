"""
The messages of a coordinator and nothing else: what a step of many daemons costs before anybody decides anything.

`python -m benchmarks.replay PORT_FILE FOLDER` answers daemons over gRPC with what a real coordinator answered them: it
lies in FOLDER, a file for each daemon and kind of message. It reads what they say as far as it has to know who it was,
and when all have said it.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from snapshotd.v1 import control_pb2 as control

from .bare_server import relay, serve

__all__ = ["KINDS"]

KINDS = ("epoch_formed", "protect", "committed")
_CAUSES = {"hello": "epoch_formed", "sealed": "protect", "parity_built": "committed", "sealed and built": "committed"}
"""What all daemons have said before the answer goes to all."""


_Answer: TypeAlias = tuple[control.CoordinatorMessage, list[str]]
"""And to whom it goes."""


class _Replay(grpc.GenericRpcHandler):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: dict[str, list[_Answer]] = {}
        self._queues: dict[str, asyncio.Queue[bytes]] = {}
        self._said: dict[str, int] = defaultdict(int)
        self._all = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._session)

    async def _session(self, requests: object, context: Any) -> None:
        if not self._answers:  # written after this process began, and before anybody comes
            self._answers = {kind: _by_content(self._folder, kind) for kind in KINDS}
            self._all = len(list(self._folder.glob("*.epoch_formed")))
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        await relay(context, queue, lambda data: self._hear(control.NodeMessage.FromString(data), queue))

    def _hear(self, message: control.NodeMessage, queue: asyncio.Queue[bytes]) -> None:
        body = message.WhichOneof("body")
        if body == "hello":
            self._queues[message.hello.node_id] = queue
        cause = "sealed and built" if body == "sealed" and message.sealed.HasField("built") else body
        kind = _CAUSES.get(cause)
        if kind is None or message.sealed.protecting:
            return
        self._said[kind] += 1
        if self._said[kind] == self._all:
            self._said[kind] = 0
            for answer, names in self._answers[kind]:
                if body != "hello":
                    getattr(answer, kind).step = getattr(message, body).step
                data = answer.SerializeToString()
                for name in names:
                    self._queues[name].put_nowait(data)


def _by_content(folder: Path, kind: str) -> list[_Answer]:
    names: dict[bytes, list[str]] = defaultdict(list)
    for path in sorted(folder.glob(f"*.{kind}")):
        names[path.read_bytes()].append(path.stem)
    return [(control.CoordinatorMessage.FromString(data), whom) for data, whom in names.items()]


if __name__ == "__main__":
    handler = _Replay(Path(sys.argv[2]))
    asyncio.run(serve(sys.argv[1], lambda server: server.add_generic_rpc_handlers((handler,))))
