"""Restore: a snapshot back into model and optimizer, verified, out of the own node's memory and out of a peer's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from snapshotd_client import Snapshotter

from snapshotd.layout import CHUNK_BYTES

from .. import Row, Run, Sample
from ..processes import BenchError, cpu_seconds, wait_for

if TYPE_CHECKING:
    from ..cluster import Cluster
    from ..state import Training

GOAL = 8
SECONDS = 19

_PIECE_BYTES = 1 << 20


def rows(run: Run) -> Iterator[Row]:
    training = run.training()
    cluster = run.cluster(2, m=0, budget=str(3 * training.nbytes + (256 << 20)))
    _capture(training, cluster)
    ways = _Ways(training, cluster, run.memory(training.nbytes))
    for node, at_least, against, floor in (
        (0, 0.85, "memcpy, then digest, one thread", ways.copy_and_digest),
        (1, 0.8, "plain TCP recv_into, one stream", ways.receive),
    ):
        found = run.rounds(
            {"ours": lambda node=node: ways.restore(node), "floor": floor}, rounds=6, within_s=25.0, pids=cluster.pids
        )
        goal = None if run.short else at_least  # what a restore costs however small the state is counts too much then
        what = "restore from the own node's slot" if node == 0 else "restore from a peer"
        yield Row.speed(
            what, found["ours"], found["floor"], at_least=goal, against=against, nbytes=training.nbytes
        )


class _Ways:
    def __init__(self, training: Training, cluster: Cluster, memory: memoryview) -> None:
        self._training = training
        self._cluster = cluster
        self._memory = np.frombuffer(memory, np.uint8)
        self._views = [tensor.reshape(-1).view(torch.uint8).numpy() for tensor in training.tensors]
        self._expected = self._digest()
        self._formation = 0

    def restore(self, node: int) -> Sample:
        """A new worker on that node; from the decision to the last tensor."""
        for tensor in self._training.tensors:
            tensor.zero_()
        self._formation += 1
        settings = self._cluster.settings(node, formation=f"again-{self._formation}")
        with Snapshotter(self._training.model, self._training.optimizer, settings=settings) as snapshotter:
            cpu_s = time.process_time() + cpu_seconds(self._cluster.pids)
            snapshotter.restore()
            cpu_s = time.process_time() + cpu_seconds(self._cluster.pids) - cpu_s
            facts = snapshotter.last_restore
        if self._digest() != self._expected:
            raise BenchError("what was restored is not what was captured")
        if facts["remote_bytes" if node == 1 else "local_bytes"] != facts["direct_bytes"]:
            raise BenchError(f"restored from the wrong place: {facts}")
        return Sample(facts["fetch_s"] + facts["load_s"], cpu_s)

    def _digest(self) -> bytes:
        whole = xxhash.xxh3_128()
        for view in self._views:
            whole.update(view)
        return whole.digest()

    def copy_and_digest(self) -> None:
        at = 0
        for view in self._views:
            np.copyto(view, self._memory[at : at + view.nbytes])
            at += view.nbytes
        for at in range(0, len(self._memory), CHUNK_BYTES):
            xxhash.xxh3_64_intdigest(self._memory[at : at + CHUNK_BYTES])

    def receive(self) -> None:
        """The tensors out of a socket, from a thread that sends warm memory."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sender = threading.Thread(target=self._send, args=(listener,))
            sender.start()
            with socket.create_connection(listener.getsockname()) as sock:
                for view in self._views:
                    at = 0
                    while at < view.nbytes:
                        at += sock.recv_into(view[at : at + _PIECE_BYTES])
            sender.join()

    def _send(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            for at in range(0, len(self._memory), _PIECE_BYTES):
                sock.sendall(self._memory[at : at + _PIECE_BYTES])


def _capture(training: Training, cluster: Cluster) -> None:
    with Snapshotter(training.model, training.optimizer, settings=cluster.settings(0)) as snapshotter:
        snapshotter.restore()
        step = 0
        while not snapshotter.stats["sealed"]:
            snapshotter.capture(step)
            snapshotter.wait(30.0)
            step += 1
        wait_for(lambda: cluster.job().get("committed"), "the commit", 30.0)
