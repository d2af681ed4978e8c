"""The durable format: only whole snapshots are visible, and only right bytes come out of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from snapshotd.durable import (
    Marker,
    MarkerRank,
    RankRecord,
    RankWriter,
    job_directory_name,
    open_snapshot,
    prune,
    scan_durable,
    snapshot_directory_name,
    write_marker,
)
from snapshotd.durable.format import _digest_of
from snapshotd.durable.writer import make_directories, snapshot_path
from snapshotd.errors import CorruptionError, FormatError, SnapshotdError, UsageError
from snapshotd.layout import CHUNK_BYTES, Box, Layout, TensorBox, chunk_digests, root_digest
from snapshotd.v1 import control_pb2 as control

JOB = "train/gpt"


def slot_bytes(rank: int, step: int, elements: int = 150_000) -> tuple[Layout, bytes]:
    box = TensorBox(
        name="w",
        dtype="float32",
        global_shape=(2 * elements,),
        box=Box((rank * elements,), (elements,)),
        scope="global",
        kind="param",
    )
    layout = Layout.build([box], meta_capacity=64)
    values = np.random.default_rng(step * 100 + rank).random(elements, np.float32)
    meta = json.dumps({"step": step}).encode().ljust(64)
    return layout, layout.header + values.tobytes() + meta


def record_of(rank: int, step: int, epoch: int, layout: Layout, data: bytes, chunk_bytes: int) -> RankRecord:
    digests = chunk_digests(data, len(data), chunk_bytes)
    ref = control.SlotRef(
        job=JOB,
        epoch=epoch,
        step=step,
        rank=rank,
        world_size=2,
        file_bytes=len(data),
        root_digest=root_digest(digests),
        layout_hash=layout.hash,
    )
    return RankRecord(slot=ref, chunk_digests=digests, chunk_bytes=chunk_bytes)


def write_snapshot(
    root: Path, step: int, epoch: int = 1, *, marker: bool = True, chunk_bytes: int = CHUNK_BYTES
) -> Path:
    path = snapshot_path(root, JOB, epoch, step)
    make_directories(path, below=root)
    entries = []
    for rank in range(2):
        layout, data = slot_bytes(rank, step)
        record = record_of(rank, step, epoch, layout, data, chunk_bytes)
        with RankWriter(path, rank) as writer:
            writer.write(memoryview(data))
            writer.finish(record)
        entries.append(MarkerRank(file_bytes=len(data), root_digest=record.slot.root_digest, layout_hash=layout.hash))
    if marker:
        write_marker(path, Marker(job=JOB, epoch=epoch, step=step, ranks=tuple(entries)))
    return path


def steps(root: Path) -> list[tuple[int, int]]:
    return [(ref.epoch, ref.step) for ref in scan_durable(root)]


def test_what_was_written_is_read_and_any_tool_can_open_it(tmp_path: Path) -> None:
    """The durable tier outlives everything: it must be readable, also without us."""
    path = write_snapshot(tmp_path, 7)
    with open_snapshot(path) as snapshot:
        assert snapshot.ref == control.DurableRef(job=JOB, epoch=1, step=7, world_size=2, path=str(path))
        for rank in range(2):
            layout, data = slot_bytes(rank, 7)
            file = snapshot.rank_file(rank)
            assert file.read(0, len(data)) == data
            assert file.layout.hash == layout.hash
            assert json.loads(file.meta()) == {"step": 7}
            tensors = load_file(file.path)
            assert tensors[f"w@{rank * 150_000}" if rank else "w@0"].tobytes() == data[layout.data_begin : -64]
        assert snapshot.verify() == sum(len(slot_bytes(rank, 7)[1]) for rank in range(2))
    assert scan_durable(tmp_path) == scan_durable(tmp_path, JOB) == [snapshot.ref]
    assert scan_durable(tmp_path, "other") == []
    assert scan_durable(tmp_path / "nowhere") == []


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 256 * 1024, 99_999, 16 << 20])
def test_any_range_is_read_as_a_slice(tmp_path: Path, chunk_bytes: int) -> None:
    """A restore with another world size reads ranges that begin and end anywhere, whatever wrote the snapshot."""
    dice = random.Random(3)
    _, data = slot_bytes(0, 1)
    with open_snapshot(write_snapshot(tmp_path, 1, chunk_bytes=chunk_bytes)) as snapshot:
        file = snapshot.rank_file(0)
        assert file.verify() == len(data)
        edges = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, len(data) - 1, len(data)]
        pairs = [(a, b) for a in edges for b in edges if a <= b]
        pairs += [tuple(sorted(dice.sample(range(len(data)), 2))) for _ in range(50)]
        for begin, end in pairs:
            assert file.read(begin, end) == data[begin:end]
        with pytest.raises(UsageError, match="not inside"):
            file.read(0, len(data) + 1)


def test_a_changed_chunk_of_another_size_is_named(tmp_path: Path) -> None:
    """Chunks have been larger once: what was kept then is read, and verified, as it was written."""
    path = write_snapshot(tmp_path, 1, chunk_bytes=256 * 1024)
    with (path / "rank-000000.safetensors").open("r+b") as file:
        file.seek(300_000)
        file.write(bytes(8))
    with open_snapshot(path) as snapshot:
        assert snapshot.rank_file(0).read(0, 262_144) == slot_bytes(0, 1)[1][:262_144]
        for begin, end in ((262_144, 262_145), (0, 600_000)):
            with pytest.raises(CorruptionError, match=r"changed in bytes \[262144, 524288\): digest"):
                snapshot.rank_file(0).read(begin, end)
    record = path / "rank-000000.json"
    for wrong in ("0", "16777217"):
        text = record.read_text().replace('"chunk_bytes": 262144', f'"chunk_bytes": {wrong}')
        with pytest.raises(FormatError, match=f"chunks of {wrong} bytes; possible are 1 to 16777216"):
            RankRecord.decode(text.encode(), "it")


def test_each_changed_bit_is_found_when_it_is_read(tmp_path: Path) -> None:
    """Disks rot: a bit that flipped must never reach a tensor, and the message must name the file."""
    path = write_snapshot(tmp_path, 1)
    dice = random.Random(5)
    for name in ("rank-000000.safetensors", "rank-000001.json", "snapshot.json"):
        for _ in range(15):
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            with open(copy / name, "r+b") as file:
                at = dice.randrange(os.path.getsize(copy / name))
                file.seek(at)
                byte = file.read(1)[0] ^ (1 << dice.randrange(8))
                file.seek(at)
                file.write(bytes([byte]))
            try:
                with open_snapshot(copy) as snapshot:
                    snapshot.verify()
                    changed = [snapshot.rank_file(rank).slot for rank in range(2)]
            except CorruptionError as error:
                assert name.split(".")[0] in str(error)
            else:
                # A blank between two JSON tokens may change into another blank, and nothing is different.
                assert name.endswith(".json")
                with open_snapshot(path) as snapshot:
                    assert changed == [snapshot.rank_file(rank).slot for rank in range(2)]
            shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: os.unlink(path / "rank-000001.safetensors"), "rank-000001.safetensors cannot be opened"),
        (lambda path: os.unlink(path / "rank-000000.json"), "rank-000000.json cannot be read"),
        (lambda path: os.truncate(path / "rank-000000.safetensors", 5000), "has 5000 bytes, expected"),
        (lambda path: shutil.copy(path / "rank-000000.json", path / "rank-000001.json"), "rank is 0, but the marker"),
    ],
)
def test_missing_and_truncated_files_are_named(tmp_path: Path, harm: Callable[[Path], None], words: str) -> None:
    """Somebody copies half a checkpoint away, and must be told which half."""
    path = write_snapshot(tmp_path, 1)
    harm(path)
    with open_snapshot(path) as snapshot, pytest.raises(CorruptionError, match=words):
        snapshot.verify()


def test_a_directory_without_marker_is_invisible(tmp_path: Path) -> None:
    """A crash before the marker must look as if nothing had been written."""
    path = write_snapshot(tmp_path, 1, marker=False)
    assert steps(tmp_path) == []
    with pytest.raises(FormatError, match=r"snapshot\.json cannot be read"):
        open_snapshot(path)


def test_a_renamed_directory_is_not_another_snapshot(tmp_path: Path) -> None:
    """A person who copies step 1 over to the name of step 2 must not make a job go on from wrong numbers."""
    path = write_snapshot(tmp_path, 1)
    os.rename(path, path.with_name(snapshot_directory_name(1, 2)))
    assert steps(tmp_path) == []


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    """A full disk is an outage, and so is a prune that takes the one snapshot that was good."""
    for step in (1, 2, 3, 5):
        write_snapshot(tmp_path, step)
    write_snapshot(tmp_path, 4, marker=False)
    write_snapshot(tmp_path, 6, marker=False)
    write_snapshot(tmp_path, 2, epoch=2)
    foreign = snapshot_path(tmp_path, JOB, 1, 3)
    (foreign / "notes.txt").write_text("mine")
    odd = snapshot_path(tmp_path, JOB, 1, 1)
    (odd / "snapshot.json").write_text('{"format": "snapshotd-snapshot", "version": 2}')
    notes: list[str] = []
    removed = prune(tmp_path, JOB, keep=2, written=(2, 2), note=notes.append)
    assert [(ref.epoch, ref.step) for ref in removed] == [(1, 2), (1, 3)]
    assert steps(tmp_path) == [(1, 5), (2, 2)]
    left = sorted(os.listdir(foreign.parent))
    # Step 1 is not understood, step 3 holds somebody's notes; 4 and 6 are older than epoch 2 and had no marker.
    assert left == [snapshot_directory_name(e, s) for s, e in ((1, 1), (2, 2), (3, 1), (5, 1))]
    assert os.listdir(foreign) == ["notes.txt"]
    assert [note.split(" ", 1)[1][:30] for note in notes] == [
        "is left alone: " + str(odd)[:15],
        "could not be removed altogethe",
    ]


def test_prune_never_removes_what_was_just_written(tmp_path: Path) -> None:
    """After a fall-back the newest snapshot may have a lower step than those that are there."""
    for step in (5, 6, 3):
        write_snapshot(tmp_path, step)
    prune(tmp_path, JOB, keep=1, written=(1, 3))
    assert steps(tmp_path) == [(1, 3), (1, 6)]
    with pytest.raises(UsageError, match="at least 1"):
        prune(tmp_path, JOB, keep=0, written=(1, 3))


def test_the_marker_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that dies while it removes a snapshot must not leave a marker that speaks of missing files."""
    write_snapshot(tmp_path, 1)
    write_snapshot(tmp_path, 2)

    class Died(Exception):
        pass

    def unlink(path: Path, real=os.unlink) -> None:
        if not str(path).endswith("snapshot.json"):
            raise Died
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(Died):
        prune(tmp_path, JOB, keep=1, written=(1, 2))
    assert steps(tmp_path) == [(1, 2)]


@pytest.mark.parametrize(
    ("job", "name"),
    [
        ("job", "job"),
        ("a/b", "a%2Fb"),
        ("..", "%2E."),
        (".", "%2E"),
        ("a~b", "a%7Eb"),
        ("grün 1", "gr%C3%BCn%201"),
        ("x" * 200, "x" * 200),
    ],
)
def test_job_names_are_safe_file_names(job: str, name: str) -> None:
    """A job called ../../etc must not write there."""
    assert job_directory_name(job) == name


def test_long_and_impossible_job_names() -> None:
    long = {job_directory_name("x" * 300 + str(i)) for i in range(5)}
    assert len(long) == 5
    assert all(len(name) <= 200 for name in long)
    for job in ("", "\ud800"):
        with pytest.raises(UsageError):
            job_directory_name(job)


def _mutations(value: object) -> list[object]:
    return [None, -1, 1.5, True, 1 << 63, "", "x" * 33, [], {}, [value]]


def test_hostile_markers_are_refused_in_words(tmp_path: Path) -> None:
    """Every number of a JSON file is somebody else's claim: parse it, or FormatError, and nothing else."""
    path = write_snapshot(tmp_path, 1)
    marker = json.loads((path / "snapshot.json").read_text())
    for key in marker:
        for wrong in _mutations(marker[key]):
            changed = {**marker, key: wrong}
            if key != "digest":
                changed.pop("digest")
                changed["digest"] = _digest_of(changed)
            if key == "job" and isinstance(wrong, str) and wrong:
                continue
            with pytest.raises(FormatError):
                Marker.decode(json.dumps(changed).encode(), "marker")
    for key in marker["ranks"][0]:
        for wrong in _mutations(marker["ranks"][0][key]):
            changed = json.loads(json.dumps(marker))
            changed["ranks"][0][key] = wrong
            changed.pop("digest")
            changed["digest"] = _digest_of(changed)
            with pytest.raises(FormatError):
                Marker.decode(json.dumps(changed).encode(), "marker")
    text = (path / "rank-000000.json").read_bytes()
    record = json.loads(text)
    assert RankRecord.decode(text, "record").encode() == text
    for key in record:
        for wrong in _mutations(record[key]):
            if key == "job" and isinstance(wrong, str) and wrong:
                continue
            with pytest.raises(FormatError):
                RankRecord.decode(json.dumps({**record, key: wrong}).encode(), "record")
    for garbage in (b"", b"\xff", b"[]", b"{", text[:-10], b'{"format":"snapshotd-rank","format":"x"}'):
        with pytest.raises(FormatError):
            RankRecord.decode(garbage, "record")


CRASHING = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_durable
test_durable.write_snapshot(Path({root!r}), 2)
test_durable.prune({root!r}, test_durable.JOB, keep=1, written=(1, 2))
"""


@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("site", ["persist.before_rename", "persist.after_rename", "persist.before_marker"])
def test_a_crash_at_any_site_leaves_only_whole_snapshots(tmp_path: Path, site: str, hit: int) -> None:
    """The machine dies while it writes step 2: step 1 is still there, and step 2 is not half there."""
    write_snapshot(tmp_path, 1)
    script = CRASHING.format(here=str(Path(__file__).parent), root=str(tmp_path))
    environment = {**os.environ, "SNAPSHOTD_FAILPOINTS": f"{site}=exit(9)@{hit}"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=60, check=False)
    crashed = not (site == "persist.before_marker" and hit == 2)
    assert done.returncode == (9 if crashed else 0)
    assert steps(tmp_path) == ([(1, 1)] if crashed else [(1, 2)])
    for ref in scan_durable(tmp_path):
        with open_snapshot(ref.path) as snapshot:
            snapshot.verify()
    # And the next attempt is whole, and cleans up.
    write_snapshot(tmp_path, 2)
    write_snapshot(tmp_path, 3)
    prune(tmp_path, JOB, keep=1, written=(1, 3))
    assert steps(tmp_path) == [(1, 3)]
    assert os.listdir(snapshot_path(tmp_path, JOB, 1, 3).parent) == [snapshot_directory_name(1, 3)]


def test_an_abandoned_write_leaves_nothing(tmp_path: Path) -> None:
    """A full disk ends the write: its half file must not stay and keep the disk full."""
    with pytest.raises(SnapshotdError), RankWriter(tmp_path, 0) as writer:
        writer.write(memoryview(b"abc"))
        layout, data = slot_bytes(0, 1)
        writer.finish(record_of(0, 1, 1, layout, data, CHUNK_BYTES))
    assert os.listdir(tmp_path) == []
