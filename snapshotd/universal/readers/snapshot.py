"""
Read our own durable snapshots: each rank's slot file with its boxes, every byte verified as it is read.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from snapshotd.durable import DurableSnapshot, open_snapshot
from snapshotd.durable.format import MARKER_NAME
from snapshotd.errors import FormatError
from snapshotd.layout import Shard
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.client_json import decode
from snapshotd.universal.readers.conventions import Model
from snapshotd.universal.readers.optimizers import Optimizer
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import Joined, Stored, View, stored_bytes

__all__ = ["assemble", "detect", "parse_meta", "read"]

META_VERSION: Final = 1

_Ranks = list[tuple[Any, Any, dict[str, str], dict[str, Any]]]
"""Of each rank: its shards, the source that has their bytes, the ties, and the step's JSON."""


def detect(path: Path) -> bool:
    """A snapshot's directory, or its marker."""
    return (path / MARKER_NAME).is_file() or (path.name == MARKER_NAME and path.is_file())


def read(path: Path) -> State:
    """Return the state at ``path``."""
    snapshot = open_snapshot(path.parent if path.name == MARKER_NAME else path)
    ranks = [_Rank(snapshot, rank) for rank in range(snapshot.world_size)]
    ref = snapshot.ref
    state = assemble(
        [
            (rank.file.layout.shards, rank, dict(rank.file.layout.ties), parse_meta(rank.file.meta(), rank.label))
            for rank in ranks
        ]
    )
    state.source.update({"job": ref.job, "epoch": ref.epoch, "world_size": ref.world_size})
    return state


class _Rank:
    """A verified rank's file as a source. It keeps the snapshot, which closes the files, alive."""

    def __init__(self, snapshot: DurableSnapshot, rank: int) -> None:
        self.snapshot = snapshot
        self.file = snapshot.rank_file(rank)

    @property
    def label(self) -> str:
        return str(self.file.path)

    @property
    def size(self) -> int:
        return self.file.file_bytes

    def read_into(self, begin: int, out: memoryview) -> None:
        self.file.read_into(begin, out)


def assemble(ranks: _Ranks) -> State:
    """Return the state of (shards, source, ties, meta) of all ranks, by rank; also for the live reader."""
    if any(meta.get("step") != ranks[0][3].get("step") for *_, meta in ranks):
        raise FormatError("the ranks' files are of different steps")
    state = State(format="snapshot", tensors=[], step=ranks[0][3].get("step"))
    views = _views(ranks)
    meta, ties = ranks[0][3], {alias: name for _, _, ties, _ in ranks for alias, name in ties.items()}
    used: set[str] = set()

    def leaf(data: Mapping[str, Any]) -> View:
        name = str(data["n"])
        used.add(name)
        found = views.get((name, 0)) or views.get((name, None))
        if found is None:
            raise FormatError(f"the snapshot's JSON speaks of the tensor {name}, which is in no rank's file")
        return found[1]

    optimizers = _optimizers(ranks, leaf)
    rest = decode(meta.get("rest", {}), leaf)
    weights: dict[str, View] = {}
    buffers: list[str] = []
    for (name, rank), (kind, view) in views.items():
        if kind in ("param", "buffer") and rank in (0, None):
            weights[_plain(name)] = view
            buffers += [_plain(name)] if kind == "buffer" else []
    listed = {name for optimizer in optimizers for name in optimizer.names if name not in optimizer.idle}
    frozen = [name for name in weights if name not in listed and name not in buffers] if optimizers else []
    tied = {_plain(alias): _plain(name) for alias, name in ties.items() if _plain(name) in weights}
    Model.put_noted(state, weights, {"buffers": buffers, "tied": tied, "frozen": frozen})
    for optimizer in optimizers:
        optimizer.put(state)
    _put_rng(state, ranks)
    _put_extra(state, rest)
    return state


def _views(ranks: _Ranks) -> dict[tuple[str, int | None], tuple[str, View]]:
    """Return (name, rank or None) to (kind, view): tensors of scope "rank" stay apart, global ones are joined."""
    parts: dict[tuple[str, int | None], list[Shard]] = {}
    places: dict[int, Any] = {}
    seen: set[tuple[str, tuple[int, ...], tuple[int, ...]]] = set()
    for rank, (shards, source, _, _) in enumerate(ranks):
        for shard in shards:
            box = shard.tensor
            key = (box.name, rank if box.scope == "rank" else None)
            region = (box.name, box.box.offsets, box.box.lengths)
            if box.scope == "global":
                if region in seen:  # a replica of the very same box
                    continue
                seen.add(region)
            parts.setdefault(key, []).append(shard)
            places[id(shard)] = source
    found: dict[tuple[str, int | None], tuple[str, View]] = {}
    for key, shards in parts.items():
        first = shards[0].tensor
        pieces: list[tuple[tuple[int, ...], View]] = []
        for shard in shards:
            box = shard.tensor
            if box.dtype != first.dtype or box.global_shape != first.global_shape:
                raise FormatError(f"{box.name}: the ranks disagree about its dtype or shape")
            pieces.append((box.box.offsets, Stored(places[id(shard)], shard.begin, box.dtype, box.box.lengths)))
        whole = len(pieces) == 1 and pieces[0][1].shape == first.global_shape
        view = pieces[0][1] if whole else Joined(first.dtype, first.global_shape, pieces)
        found[key] = (first.kind, view)
    return found


def _optimizers(ranks: _Ranks, leaf: Any) -> list[Optimizer]:
    """The groups of rank 0, and the states of all ranks: a rank may lack what it holds no part of."""
    found: list[Optimizer] = []
    for i, described in enumerate(ranks[0][3].get("optimizers", [])):
        groups = [
            {"params": [_plain(name) for name in group["params"]], **decode(group["hyper"], leaf)}
            for group in described["groups"]
        ]
        states: dict[Any, dict[str, Any]] = {}
        for *_, meta in ranks:
            for key, value in meta["optimizers"][i]["state"]:
                owner = _plain(key[1]) if key[0] == "param" else str(decode(key[1], leaf))
                if owner not in states:
                    decoded = decode(value, leaf)
                    states[owner] = decoded if isinstance(decoded, dict) else {"state": decoded}
        found.append(Optimizer(groups, states))
    return found


def _put_rng(state: State, ranks: _Ranks) -> None:
    kept: dict[str, Any] = {}
    for rank, (*_, meta) in enumerate(ranks):
        data = dict(meta.get("rest", {}).get("rng") or {})
        for name, text in (
            (str(rank), data.pop("torch", None)),
            *((f"{rank}/{kind}:{i}", text) for i, (kind, text) in enumerate(data.pop("devices", []))),
        ):
            if text is not None:
                raw = base64.b64decode(text)
                state.tensors.append(Tensor("rng", name, stored_bytes(raw, "uint8", (len(raw),), f"rng {name}")))
        if data:
            kept[str(rank)] = data
    if kept:
        state.extra["rng"] = kept


def _put_extra(state: State, rest: dict[str, Any]) -> None:
    schedulers = rest.get("schedulers") or []
    for name, value in schedulers:
        key = "lr_scheduler" if len(schedulers) == 1 else f"lr_{name}"
        state.extra[key] = to_json(value, key, state.tensors)
    if rest.get("scaler") is not None:
        state.extra["scaler"] = to_json(rest["scaler"], "scaler", state.tensors)
    for section in ("extra", "modules"):
        for name, value in (rest.get(section) or {}).items():
            key = name if section == "extra" and name not in state.extra else f"{section}.{name}"
            state.extra[key] = to_json(value, key, state.tensors)


def _plain(name: str) -> str:
    """The client puts the module's place before the name: ``model.`` where there is one module."""
    return name.removeprefix("model.")


def parse_meta(data: bytes, label: str) -> dict[str, Any]:
    """Return the step's JSON of a rank, whose padding may be with it."""
    try:
        meta = json.loads(data.rstrip(b" \0"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{label}: the step's JSON cannot be read: {error!s:.200}") from error
    if not isinstance(meta, dict) or meta.get("version") != META_VERSION:
        raise FormatError(f"{label}: the step's JSON is of a version that is not known: update snapshotd")
    return meta
