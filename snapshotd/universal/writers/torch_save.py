"""
Write one file as torch.save does, which ``torch.load(weights_only=True)`` reads; torch is not needed for it. For a
layout with tensor ranks it is a folder with such a file for each, cut by rules, which the files then record.

``model`` is a state dict with both names of tied weights (sharing a storage), ``optimizer`` what
``optimizer.load_state_dict`` takes, with ``param_names``; the rest as the source had it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapshotd.errors import UsageError
from snapshotd.universal.pickling import Call, Ordered, dumps, tensor_call
from snapshotd.universal.rules import cut_ranks
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import OutFile, Settings, remove_journal, write_files
from snapshotd.universal.torchfile import lay_out
from snapshotd.universal.views import View
from snapshotd.universal.writers.torch_tree import (
    NOTE_KEY,
    is_plain_step,
    modules_of,
    note_of,
    optimizer_groups,
    plain_value,
    rest_of,
    stand_ins,
)

__all__ = ["check", "losses", "write"]


def losses(state: State) -> list[str]:
    """Return what the format can not hold: nothing but the marks of frameworks' objects."""
    return []


def check(state: State, options: dict[str, Any]) -> None:
    """UsageError for a layout that the files have not, or that the rules do not say how to cut for."""
    if (ranks := _ranks(options)) > 1:
        cut_ranks(state, options.get("rules"), ranks)


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write ``state`` into the file ``target``, or for ``tp`` ranks into the folder ``target``."""
    ranks = _ranks(options)
    if ranks == 1:
        journal = f".{target.name}.convert.jsonl"
        write_files(target.parent, [_file(state, target.name, {})], settings, identity=identity, journal=journal)
        (target.parent / journal).unlink(missing_ok=True)
        return
    parts, record = cut_ranks(state, options.get("rules"), ranks)
    width = len(str(ranks - 1))
    note = {"ranks": ranks, "shares": record}
    files = [_file(part, f"model_rank_{rank:0{width}d}.pt", note) for rank, part in enumerate(parts)]
    write_files(target, files, settings, identity=identity)
    remove_journal(target)


def _ranks(options: Mapping[str, Any]) -> int:
    layout = {axis: size for axis, size in options.get("layout", {}).items() if size > 1}
    if set(layout) - {"tp", "dp"}:  # data-parallel ranks have all the same
        raise UsageError(f"torch files hold whole tensors, or those of tensor ranks: --layout tp=N, not {layout}")
    return int(layout.get("tp", 1))


def _file(state: State, name: str, note: Mapping[str, Any]) -> OutFile:
    """Return the file that holds ``state``; ``note``: what it says beside what torch's dicts do."""
    storages: list[tuple[str, str, View]] = []

    def put(tensor: Tensor) -> Call:
        return put_view(tensor.view, f"{tensor.kind}/{tensor.name}")

    def put_view(view: View, name: str = "") -> Call:
        key = str(len(storages))
        storages.append((key, name or f"extra/{key}", view))
        return tensor_call(key, view.dtype, view.shape, view.nbytes)

    weights: dict[str, Any] = {t.name: put(t) for t in state.tensors if t.kind in ("model", "buffer")}
    weights.update({alias: weights[name] for alias, name in state.tied.items() if name in weights})
    extra = {t.name: t.view for t in state.tensors if t.kind == "extra"}
    weights.update(stand_ins(modules_of(state, extra), put_view))
    tree: dict[str, Any] = {"model": Ordered(weights)}
    if state.optimizer_kinds or state.param_groups:
        tree["optimizer"] = stand_ins(_optimizer(state, put, extra), put_view)
    if masters := {t.name: put(t) for t in state.tensors if t.kind == "fp32"}:
        tree["fp32"] = masters
    if generators := {t.name: put(t) for t in state.tensors if t.kind == "rng"}:
        tree["rng_state"] = generators
    for key, value in rest_of(state, extra).items():
        tree[key] = stand_ins(value, put_view)
    if state.step is not None:
        tree.setdefault("step", state.step)
    tree[NOTE_KEY] = {**note_of(state), **note}
    archive = lay_out(dumps(tree), storages, prefix=Path(name).stem or "archive")
    return OutFile(
        name=name,
        nbytes=archive.nbytes,
        blocks=archive.blocks,
        tensors=archive.tensors,
        crc=True,
        finish=archive.finish,
    )


def _optimizer(state: State, put: Any, extra: dict[str, Any]) -> dict[str, Any]:
    groups = optimizer_groups(state, extra)
    ids: dict[str, int] = {}
    for group in groups:
        names = group.pop("names")
        for name in names:
            ids.setdefault(name, len(ids))
        group["params"] = [ids[name] for name in names]
        group["param_names"] = names
    states: dict[Any, dict[str, Any]] = {}
    kinds = set(state.optimizer_kinds)
    for tensor in state.tensors:
        if tensor.kind in kinds:
            owner = states.setdefault(ids.get(tensor.name, tensor.name), {})
            owner[tensor.kind] = plain_value(tensor.view) if is_plain_step(tensor) else put(tensor)
    return {"state": states, "param_groups": groups}
