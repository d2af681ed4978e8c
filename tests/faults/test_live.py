"""
A job's snapshot in memory as a source like any other, with real launchers, daemons and workers that train on meanwhile.

The oracle is what the workers themselves noted of their whole state at that step, byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapshotd.arena.budget import Need
from snapshotd.cli import main
from snapshotd.errors import PeerUnreachable, UsageError
from snapshotd.settings import ToolSettings, defaults
from snapshotd.universal import Checkpoint, Job, open
from tests.faults.cluster import JOB, Cluster, Options
from tests.faults.processes import ROOT, Zygotes
from tests.faults.story import Player, Scenario

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(200)

PATIENCE_S = 60.0
NO_TENSORS = ("scheduler", "scaler", "position", "groups")
OPTIONS = Options(nodes=2, script="fsdp2.py", steps=100_000, holds=(4,), trace=True)


class Live:
    """A job of two ranks, FSDP2, which stands still at the end of a step until it is told to go on."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._player = Player(Scenario(name="live", options=cluster.options, story="", outcome="undisturbed"), cluster)

    @property
    def settings(self) -> ToolSettings:
        return defaults(ToolSettings, coordinator=self.cluster.address)

    def stand(self, step: int = 0) -> int:
        """Go on, step by step, to one from that one on which is committed, and return it."""
        if self._player.held < 0:
            self._player._do_at("0")
        while self._player.held < step:
            (self.cluster.directory / f"go-{self._player.held}").touch()
            self._player._do_at(str(self._player.held + 1))
        return self._player.held

    def walk(self, steps: int) -> None:
        """So many steps further, whether they are committed or not."""
        here = max(notes.holding or 0 for notes in self.cluster.notes())
        for step in range(here, here + steps):
            (self.cluster.directory / f"go-{step}").touch()
            self.until(
                lambda step=step: {step + 1} == {notes.holding for notes in self.cluster.notes()}, "a step is made"
            )

    def truth(self, step: int) -> dict[str, str]:
        """Digests of all tensors, as the first rank noted them."""
        noted = next(notes.traces[step] for notes in self.cluster.notes() if notes.rank == 0)
        return {name: digest for name, digest in noted.items() if name not in NO_TENSORS}

    def open(self, step: int | None = None) -> Checkpoint:
        return open(Job(name=JOB, step=step, settings=self.settings))

    def run(self, *words: str) -> int:
        return main([*words, "--coordinator", self.cluster.address])

    def slots(self) -> list[int]:
        """How many slots there are on each node."""
        return [len(list((self.cluster.directory / node / "arena").rglob("*.slot"))) for node in ("n0", "n1")]

    def counts(self) -> Counter[str]:
        """What the daemons, and the coordinator of the job, have counted."""
        status, total = self.cluster.status(), Counter[str]()
        for counters in (*(node["counters"] for node in status["nodes"]), *(job["counts"] for job in status["jobs"])):
            total.update(counters)
        return total

    @property
    def job(self) -> dict[str, Any]:
        return self.cluster.job()

    def until(self, condition: Callable[[], object], what: str) -> None:
        self.cluster.until(condition, PATIENCE_S, what)

    def holder(self, step: int, *lines: str) -> subprocess.Popen[bytes]:
        """A process that has opened the step as anybody would, and waits."""
        script = ["import sys", "from snapshotd.universal import open", f"c = open('job:{JOB}@{step}')", *lines]
        script += ["print('held', flush=True)", "sys.stdin.read()"]
        process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "SNAPSHOTD_COORDINATOR": self.cluster.address},
            cwd=ROOT,
        )
        assert process.stdout is not None
        assert b"held\n" == process.stdout.readline()
        return process


@contextmanager
def started(zygotes: Zygotes, options: Options) -> Iterator[Live]:
    cluster = Cluster(zygotes, options)
    try:
        cluster.start()
        yield Live(cluster)
    finally:
        try:
            cluster.close(orderly=False)
        finally:
            cluster.remove()


@pytest.fixture(scope="module")
def zygotes() -> Iterator[Zygotes]:
    zygotes = Zygotes()
    yield zygotes
    zygotes.close()


@pytest.fixture(scope="module")
def live(zygotes: Zygotes) -> Iterator[Live]:
    with started(zygotes, OPTIONS) as live:
        yield live


@pytest.fixture
def ddp(zygotes: Zygotes) -> Iterator[Live]:
    """The same with DDP: each rank has all of the state, and captures a share of it."""
    with started(zygotes, replace(OPTIONS, script="ddp.py")) as live:
        yield live


def end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    os.kill(process.pid, signal.SIGKILL)
    assert -signal.SIGKILL == process.wait(20)
    process.stdin.close()
    process.stdout.close()


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The state as the workers note it (tests/scripts/lab.py)."""
    found = {}
    for tensor in checkpoint:
        if tensor.kind in ("rng", "extra"):
            continue
        name = tensor.name if tensor.kind in ("model", "buffer") else f"optimizer0.{tensor.name}.{tensor.kind}"
        found[name] = digest(tensor.torch())
    return found


def digest(tensor: Any) -> str:
    plain = tensor.detach().contiguous()
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode() + raw).hexdigest()[:16]


def loaded(path: Path) -> dict[str, str]:
    """The state of the job's own model and optimizer, made anew and loaded by torch from its own format."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from tests.scripts import lab

    model = lab.Words(large=0)
    (optimizer,) = lab.OPTIMIZERS["adamw"](model)
    weights, optim = get_state_dict(model, optimizer)  # makes the optimizer's state
    state = {"model": weights, "optim": optim}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    names = {p: name for name, p in model.named_parameters()}
    found = {name: digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for p, values in optimizer.state.items():
        found |= {f"optimizer0.{names[p]}.{kind}": digest(value) for kind, value in values.items()}
    return found


def costs(live: Live, before: Counter[str]) -> set[str]:
    """Names of what has been counted since then, if it is a loss of any kind other than a step that was left out."""
    words = ("skipped", "refused", "abandoned", "failures", "failed", "lost", "corrupt", "stale", "rebuil")
    grown = {name for name, count in (live.counts() - before).items() if count}
    spared = ("no_slot", "late")  # late: the next update came before the copy could begin, on a machine that is busy
    if any(name.endswith("late") for name in grown):
        grown.discard("abandoned_steps")  # what one rank was late for, the other may have sealed
    return {name for name in grown if any(word in name for word in words) and not name.lower().endswith(spared)}


def test_a_live_job_converts_bit_by_bit(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody wants the weights of this morning's step, and the run must not stop for it."""
    step = live.stand()
    source = f"job:{JOB}@{step}"
    assert 0 == live.run("convert", source, str(tmp_path / "u"), "--to", "universal", "--memory", "32MiB")
    with open(tmp_path / "u") as universal:
        assert (live.truth(step), step) == (digests(universal), universal.step)
        assert [JOB, 2] == [universal.state.source[key] for key in ("job", "world_size")]
    assert 0 == live.run("convert", f"job:{JOB}", str(tmp_path / "t.pt"), "--to", "torch")
    with open(tmp_path / "t.pt") as saved:
        assert live.truth(step) == digests(saved)
    # What the daemons write of the same step, and another reader of ours reads, is the same in all parts.
    assert 0 == live.run("restore", "--job", JOB, "--step", str(step), str(tmp_path / "durable"))
    capsys.readouterr()
    assert 0 == live.run("diff", source, str(tmp_path / "durable"))
    assert 0 == live.run("diff", str(tmp_path / "u"), source)
    assert ["equal: ", "equal: "] == [line[:7] for line in capsys.readouterr().out.splitlines()]
    assert 0 == live.run("verify", source)
    text = capsys.readouterr().out
    assert f"{source}: snapshot, step {step}, " in text and "every chunk matches its digest" in text


@pytest.mark.parametrize("kind", ["live", "ddp"])
def test_a_live_job_goes_to_where_frameworks_read_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The rows of a sharded job that lie on another rank, or the shares of replicas, would be missing elsewhere."""
    safetensors = pytest.importorskip("safetensors.torch")
    job: Live = request.getfixturevalue(kind)
    step = job.stand()
    truth = job.truth(step)
    for to in ("universal", "dcp", "hf", "deepspeed"):
        assert 0 == job.run("convert", f"job:{JOB}@{step}", str(tmp_path / to), "--to", to)
    with open(tmp_path / "universal") as universal:
        assert (truth, step) == (digests(universal), universal.step)
    assert truth == loaded(tmp_path / "dcp")
    weights = safetensors.load_file(tmp_path / "hf" / "model.safetensors")
    of_model = {name: value for name, value in truth.items() if not name.startswith("optimizer0.")}
    assert of_model == {name: digest(tensor) for name, tensor in weights.items() if name in of_model}
    assert {"head.weight"} >= set(weights) - set(of_model)  # the other name of a tied weight
    # Steps are counted from 0 here, and DeepSpeed says how many were made.
    assert f"global_step{step + 1}_universal" == (tmp_path / "deepspeed" / "latest_universal").read_text()


def test_inspect_says_what_it_is(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    step = live.stand()
    assert 0 == live.run("inspect", f"job:{JOB}", "--json", "--verify")
    found = json.loads(capsys.readouterr().out)
    expected = {"kind": "job", "job": JOB, "epoch": 1, "step": step, "world_size": 2, "complete": True}
    assert expected == {key: found[key] for key in expected}
    assert (found["bytes"], True) == (found["verified_bytes"], "snapshotd convert" in found["readable_by"])
    assert len(live.truth(step)) == sum(count for kind, count in found["kinds"].items() if kind not in ("rng", "extra"))
    assert 0 == live.run("inspect", f"job:{JOB}@{step}")
    text = capsys.readouterr().out
    assert f"path: job:{JOB}@{step}" in text and "embedding.weight" in text


def test_the_job_trains_on_and_what_is_held_stays(live: Live) -> None:
    """The slot would be written over in the middle of a conversion, or the run be unprotected as long as it takes."""
    step = live.stand()
    before = live.counts()
    live.until(lambda: live.slots() == [2, 2], "the room that others took is given back")
    with live.open(step) as checkpoint:
        newest = live.stand(step + 6)
        assert live.truth(step) == digests(checkpoint)
        live.until(lambda: live.slots() == [3, 3], "a slot stands in for the held one on each node")
        newest = live.stand(newest + 3)
        with live.open() as other:  # another tool, another step
            assert (newest, live.truth(newest)) == (other.step, digests(other))
            assert live.truth(step) == digests(checkpoint)
        with pytest.raises(UsageError, match=f"no snapshot of step {step}; there are steps .*{newest}"):
            live.open(step)
    with pytest.raises(UsageError, match="the checkpoint is closed"):
        digests(checkpoint)
    live.until(lambda: live.slots() == [2, 2], "the room is given back")
    after = live.stand(newest + 3)
    with live.open() as checkpoint:
        assert (after, live.truth(after)) == (checkpoint.step, digests(checkpoint))
    # Steps that found no slot are all that it cost.
    assert set() == costs(live, before)
    assert 0 < (live.counts() - before)["slots_beside_held"]


def test_without_room_for_more_the_job_leaves_steps_out_and_loses_nothing(live: Live, zygotes: Zygotes) -> None:
    """Two generations are all that fits: a stand-in that took the room of parity would cost the protection itself."""
    live.stand()
    size = max(path.stat().st_size for path in live.cluster.directory.rglob("*.slot"))
    least = Need(slot_bytes=(size,), generations=2, k=1, m=1).total + 4096
    with started(zygotes, replace(OPTIONS, daemon_flags=("--budget", str(least)))) as tight:
        step = tight.stand()
        before = tight.counts()
        with tight.open(step) as checkpoint:
            newest = tight.stand(step + 1)
            tight.walk(3)
            tight.until(lambda: tight.counts()["slots_refused"] >= 2, "each rank has asked for a slot")
            tight.walk(3)
            assert (newest, [2, 2]) == (tight.job["committed"]["step"], tight.slots())
            assert tight.truth(step) == digests(checkpoint)
        assert {"slots_refused"} == costs(tight, before)
        assert 3 <= (tight.counts() - before)["skipped_no_slot"]
        after = tight.stand(newest + 7)
        with tight.open() as checkpoint:
            assert (after, tight.truth(after)) == (checkpoint.step, digests(checkpoint))
        assert "that readers hold" in (tight.cluster.directory / "daemon-n0.log").read_text()


def test_a_killed_holder_gives_the_job_its_room_back(live: Live) -> None:
    step = live.stand()
    holder = live.holder(step)
    newest = live.stand(step + 6)
    live.until(lambda: live.slots() == [3, 3], "a slot stands in for the held one on each node")
    end(holder)
    live.until(lambda: live.slots() == [2, 2], "the room is given back")
    assert live.stand(newest + 2) > newest


def test_a_killed_conversion_goes_on_with_the_same_step_only(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of one step and half of another would be a checkpoint that no run ever was in."""
    step = live.stand()
    words = [
        "from snapshotd.universal import Settings, convert",
        "def progress(done, total):",
        "    if done * 2 >= total: print('held', flush=True); sys.stdin.read()",
        "settings = Settings(progress=progress, threads=1)",
        f"convert('job:{JOB}', {str(tmp_path / 'u')!r}, to='universal', settings=settings)",
    ]
    end(live.holder(step, *words))
    assert not (tmp_path / "u" / "universal.json").exists()
    shutil.copytree(tmp_path / "u", tmp_path / "late")
    assert 2 == live.run("convert", f"job:{JOB}", str(tmp_path / "u"), "--to", "universal")
    assert "go on with --resume" in capsys.readouterr().err
    assert 0 == live.run("convert", f"job:{JOB}@{step}", str(tmp_path / "u"), "--to", "universal", "--resume")
    with open(tmp_path / "u") as universal:
        assert live.truth(step) == digests(universal)
    live.stand(step + 1)
    assert 2 == live.run("convert", f"job:{JOB}", str(tmp_path / "late"), "--to", "universal", "--resume")
    assert f"an interrupted conversion of job:{JOB}@{step}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["inspect", "job:nobody"], 2, "there is no job 'nobody'; known are: job"),
        (["inspect", f"job:{JOB}@1"], 2, "has no snapshot of step 1; there are steps"),
        (["verify", f"job:{JOB}", "--from", "dcp"], 2, "leave --from out"),
        (["diff", f"job:{JOB}", "job:"], 2, "names no job"),
    ],
)
def test_what_is_not_there_is_said(
    live: Live, words: Sequence[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    live.stand()
    assert code == live.run(*words)
    assert says in capsys.readouterr().err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert PeerUnreachable.exit_code == main(["verify", "job:x", "--coordinator", "127.0.0.1:9"])
    error: Any = capsys.readouterr().err
    assert "no coordinator answers at 127.0.0.1:9" in error
