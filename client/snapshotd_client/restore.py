"""
Recovery, the worker's half: ask which state to go on from, fetch this rank's part of it, put it in place, agree.

Order: parameters, buffers and optimizer tensors are fetched; then groups and state are put in place, then schedulers,
scaler and extra; the random generators last, because everything before may draw from them.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from snapshotd.failpoints import failpoint
from snapshotd.v1 import worker_pb2 as pb
from snapshotd_client.agree import Verdict, agree
from snapshotd_client.counters import logger
from snapshotd_client.errors import RestoreError, StateLost
from snapshotd_client.fetch import Entry, Fetcher, Manifest
from snapshotd_client.interpreter import reading_state
from snapshotd_client.inventory import Inventory
from snapshotd_client.link import Link
from snapshotd_client.load import Loader
from snapshotd_client.rng import set_rng
from snapshotd_client.settings import Settings

__all__ = ["Outcome", "Restorer"]

_ASK_S: Final = 30.0
_PAUSE_S: Final = 0.05
_MAX_MANIFEST_BYTES: Final = 1 << 30
_MAX_THREADS: Final = 4  # training has not begun: the cores are free

_Decision = pb.RestoreDecision


@dataclass(frozen=True, slots=True)
class Outcome:
    """``first_step`` is the step to go on with; ``facts`` is what the user may look at."""

    first_step: int
    facts: dict[str, Any] = field(default_factory=dict)


class Restorer:
    """One restore of one worker; ``start`` is the universal checkpoint for a fresh job, empty for none."""

    def __init__(self, inventory: Inventory, link: Link, settings: Settings, start: str = "") -> None:
        self._inventory = inventory
        self._link = link
        self._settings = settings
        self._start = start

    def run(self) -> Outcome:
        """Return what to go on with. StateLost or RestoreError when nothing can be gone on with."""
        try:
            decision = self._decide()
            verdict, outcome = self._act(decision)
        except (Exception, SystemExit) as error:
            # The others must not wait for this rank until their collective times out.
            agree(Verdict.failed(), self._settings, error)
            raise
        agree(verdict, self._settings, None)
        self._say(outcome)
        return outcome

    def _act(self, decision: pb.RestoreDecision | None) -> tuple[Verdict, Outcome]:
        if decision is None:
            logger.warning(
                "snapshotd: no daemon answers at %s; training starts afresh, and steps are captured once one is "
                "there. Start one with `snapshotd daemon`, or set SNAPSHOTD_SOCKET",
                self._settings.socket,
            )
            if self._start:
                return self._begin(None)
            return Verdict.none(), Outcome(0, {"kind": "none", "step": None, "reason": "no daemon"})
        if decision.kind == _Decision.KIND_FRESH:
            if self._start:
                return self._begin(decision)
            self._done(True, "", 0.0, 0.0, 0)
            return Verdict.fresh(), Outcome(0, {"kind": "fresh", "step": None, "reason": decision.reason})
        if decision.kind == _Decision.KIND_REFUSED:
            print(f"snapshotd: the state is lost: {decision.reason}", file=sys.stderr, flush=True)
            raise StateLost(decision.reason)
        try:
            with reading_state():
                facts = self._load(decision)
        except Exception as error:
            self._done(False, f"{type(error).__name__}: {error}", 0.0, 0.0, decision.source_step)
            if isinstance(error, RestoreError):
                raise
            raise RestoreError(f"step {decision.source_step} could not be restored: {error}") from error
        return Verdict.snapshot(decision.source_epoch, decision.source_step), Outcome(decision.source_step + 1, facts)

    # ------------------------------------------------------------------ deciding

    def _decide(self) -> pb.RestoreDecision | None:
        """Return the daemon's decision; None when there is no daemon and nothing says that there should be one."""
        settings = self._settings
        begun = time.monotonic()
        expected = settings.epoch is not None
        deadline = begun + (settings.restore_timeout_s if expected else settings.connect_timeout_s)
        reason = ""
        while True:
            self._check_not_refused()
            left = deadline - time.monotonic()
            if self._link.was_seen and not expected:
                expected = True
                deadline = begun + settings.restore_timeout_s
                continue
            if left <= 0:
                break
            if not self._link.wait_session(left):
                continue
            answer = self._link.ask(pb.Frame(restore_query=pb.RestoreQuery()), min(left, _ASK_S))
            kind = answer.WhichOneof("body") if answer is not None else None
            if answer is not None and kind == "restore_decision":
                reason = answer.restore_decision.reason
                if answer.restore_decision.kind not in (_Decision.KIND_UNDECIDED, _Decision.KIND_UNSPECIFIED):
                    return answer.restore_decision
            elif answer is not None and kind == "error":
                reason = answer.error.message
            time.sleep(min(_PAUSE_S, max(left, 0.0)))
        if not expected:
            return None
        what = reason or ("it does not answer" if self._link.was_seen else f"nobody listens at {settings.socket}")
        raise RestoreError(
            f"the daemon did not say within {settings.restore_timeout_s:g} s which state to go on from: {what}. "
            "Check `snapshotd status`, or raise SNAPSHOTD_RESTORE_TIMEOUT_S"
        )

    def _check_not_refused(self) -> None:
        refused = self._link.refused
        if refused is not None:
            raise RestoreError(f"the daemon will not serve this worker: {refused.message} ({refused.code})")

    # ------------------------------------------------------------------ loading

    def _begin(self, decision: pb.RestoreDecision | None) -> tuple[Verdict, Outcome]:
        """Start from a universal checkpoint, with or without a daemon."""
        from snapshotd_client.start import begin  # its reader is loaded by those who use it

        try:
            first_step, facts = begin(self._start, self._inventory, self._settings, self._threads())
        except Exception as error:
            self._done(False, f"{type(error).__name__}: {error}", 0.0, 0.0, 0)
            raise
        self._done(True, "", 0.0, facts["load_s"], 0)
        reason = "no daemon" if decision is None else decision.reason
        verdict = Verdict.started(first_step, daemon=decision is not None)
        return verdict, Outcome(first_step, {**facts, "reason": reason})

    def _threads(self) -> int:
        return max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // self._settings.local_world_size))

    def _load(self, decision: pb.RestoreDecision) -> dict[str, Any]:
        begun = time.monotonic()
        manifest = _read_manifest(decision.manifest_path)
        if manifest.meta.get("step") != decision.source_step:
            raise RestoreError(f"the snapshot says step {manifest.meta.get('step')}, the daemon {decision.source_step}")
        deadline = begun + self._settings.restore_timeout_s
        fetcher = Fetcher(self._link, deadline, self._threads(), partial(self._decide_again, decision))
        loader = Loader(self._inventory, manifest)
        order = {name: place for place, name in enumerate(manifest.tensors)}
        wants = sorted(loader.wants(), key=lambda want: order[want.entry.name])
        read_s, own_bytes, peer_bytes = 0.0, 0, 0
        if decision.direct:
            from snapshotd_client.direct import DirectReader  # what reads sockets is loaded by those who do

            reader = DirectReader(self._link, deadline, self._threads())
            wants = reader.run(wants)
            read_s, own_bytes, peer_bytes = reader.read_s, reader.own_bytes, reader.peer_bytes
        fetcher.run(wants)
        fetch_s = read_s + fetcher.fetch_s
        missing = loader.apply()
        source_world = int(manifest.source["world_size"])
        if self._settings.rank < source_world:
            set_rng(manifest.meta["rest"]["rng"], self._inventory.devices())
        failpoint("client.after_restore")
        total_s = time.monotonic() - begun
        load_s = max(0.0, total_s - fetch_s)
        self._done(True, "", fetch_s, load_s, decision.source_step, own_bytes, peer_bytes)
        if missing:
            logger.warning("snapshotd: the snapshot has no extra %s: left as they are", ", ".join(missing))
        return {
            "kind": "snapshot",
            "step": decision.source_step,
            "source": decision.source,
            "source_epoch": decision.source_epoch,
            "source_world_size": source_world,
            "reason": decision.reason,
            "lost_steps": decision.lost_steps,
            "fetch_s": fetch_s,
            "load_s": load_s,
            "local_bytes": fetcher.local_bytes + own_bytes,
            "remote_bytes": fetcher.remote_bytes + peer_bytes,
            "direct_bytes": own_bytes + peer_bytes,
            "decoded_bytes": fetcher.decoded_bytes,
        }

    def _decide_again(self, decision: pb.RestoreDecision) -> None:
        """Ask a daemon that was away what to go on from. RestoreError unless it is what this restore began with."""
        now = self._decide() or pb.RestoreDecision()
        if (now.kind, now.source_epoch, now.source_step) != (
            decision.kind,
            decision.source_epoch,
            decision.source_step,
        ):
            raise RestoreError(
                f"step {decision.source_step} was being restored, and the daemon, which was away, says now "
                f"{_Decision.Kind.Name(now.kind).removeprefix('KIND_')}: {now.reason}"
            )

    def _done(
        self,
        ok: bool,
        error: str,
        fetch_s: float,
        load_s: float,
        step: int,
        own_bytes: int = 0,
        peer_bytes: int = 0,
    ) -> None:
        done = pb.RestoreDone(
            ok=ok,
            error=error[:2000],
            fetch_s=fetch_s,
            load_s=load_s,
            step=step,
            own_bytes=own_bytes,
            peer_bytes=peer_bytes,
        )
        self._link.post(pb.Frame(restore_done=done), self._link.session)

    def _say(self, outcome: Outcome) -> None:
        if self._settings.rank != 0 or outcome.facts["kind"] == "none":
            return
        facts = outcome.facts
        if facts["kind"] == "fresh":
            text = f"job {self._settings.job} starts at step 0: {facts['reason'] or 'nothing was captured before'}"
        elif facts["kind"] == "start":
            text = f"job {self._settings.job} starts at step {outcome.first_step} {facts['told']}"
        else:
            lost = f", {facts['lost_steps']} steps lost" if facts["lost_steps"] else ""
            text = (
                f"job {self._settings.job} goes on with step {outcome.first_step} "
                f"from {facts['source'] or 'memory'}{lost}: {facts['reason'] or 'newest snapshot'} "
                f"(fetched in {facts['fetch_s']:.2f} s, loaded in {facts['load_s']:.2f} s)"
            )
        logger.info("snapshotd: %s", text)
        print(f"snapshotd: {text}", file=sys.stderr, flush=True)


def _read_manifest(path: str) -> Manifest:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_size > _MAX_MANIFEST_BYTES:
            raise RestoreError(f"the manifest {path} is not a file of ours of a sensible size")
        data = json.loads(file.read())
    if data.get("version") != 1:
        raise RestoreError(f"the manifest has version {data.get('version')!r}; this client knows 1: update snapshotd")
    tensors: dict[str, Entry] = {}
    for item in data["tensors"]:
        entry = Entry(item["name"], item["dtype"], tuple(item["shape"]), item["scope"], item["kind"])
        tensors.setdefault(entry.name, entry)
    meta = json.loads(data["meta"])
    if meta.get("version") != 1:
        raise RestoreError(f"the snapshot has version {meta.get('version')!r}; this client knows 1: update snapshotd")
    return Manifest(source=data["source"], tensors=tensors, ties=dict(data.get("ties", {})), meta=meta)
