"""
A fresh job's start from a universal checkpoint: each rank reads its part by ranges, straight into its tensors.

This is the one module of the hook that knows a checkpoint format: ``readers.universal``, safetensors and JSON. No
pickle is opened there, nor by anything that it imports; foreign checkpoints are converted beforehand.

Rule 1: the whole checkpoint is verified before a byte of it is used: each rank reads its share of the tensors and
compares their digests, and ``agree`` lets no rank train when one has found rot.
Rule 2: a tensor's bytes go from the file into the tensor; what has to be cast, or lies on an accelerator, goes through
a buffer of at most BATCH_BYTES.
Rule 3: random generators are set where the checkpoint has those of exactly as many ranks as there are.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snapshotd.errors import UsageError
from snapshotd.universal.readers import universal
from snapshotd_client.arrays import carrier, view_of
from snapshotd_client.counters import logger
from snapshotd_client.errors import RestoreError
from snapshotd_client.fetch import Want, cut
from snapshotd_client.inventory import Inventory
from snapshotd_client.load import Loader
from snapshotd_client.matching import Checkpoint, Matcher, Notes, View
from snapshotd_client.rng import set_rng
from snapshotd_client.settings import Settings

__all__ = ["begin"]

_FIXED = frozenset({"model", "buffer", "fp32", "rng", "extra"})
"""Kinds that are no state of an optimizer; docs/reference/universal-format.md."""


def begin(path: str, inventory: Inventory, settings: Settings, threads: int) -> tuple[int, dict[str, Any]]:
    """
    Load the checkpoint at ``path``; return the step to go on with, and the facts for whoever asks.

    UsageError when it is none or does not fit this job, CorruptionError when its files are not what they should be.
    """
    begun = time.monotonic()
    checkpoint = _open(path, settings, threads)
    matcher = Matcher(checkpoint, inventory)
    manifest = matcher.manifest()
    loader = Loader(inventory, manifest, model_only=not checkpoint.has_optimizer)
    try:
        _fill(loader.wants(), matcher.views, threads)
        missing = _apply(loader, inventory, matcher.kept_state)
    except RestoreError as error:
        raise UsageError(f"{path}: {error}") from error
    matcher.notes.kept += [f"extra {name}" for name in missing]
    generators = checkpoint.has_optimizer and _set_generators(checkpoint, inventory, settings)
    if checkpoint.has_optimizer and not generators:
        matcher.notes.kept.append("the random generators (it has not just those of as many ranks)")
    load_s = time.monotonic() - begun
    facts = {
        "kind": "start",
        "step": checkpoint.step,
        "source": path,
        "kept": matcher.notes.kept,
        "cast": matcher.notes.cast,
        "unused": matcher.notes.unused,
        "generators": generators,
        "load_s": load_s,
        "told": f"from {path}: {_told(checkpoint, matcher, generators)} (read and verified in {load_s:.2f} s)",
    }
    if settings.rank == 0:
        _warn(checkpoint, matcher.notes)
    return checkpoint.first_step, facts


def _open(path: str, settings: Settings, threads: int) -> Checkpoint:
    """Read what there is, with this rank's share of the bytes verified."""
    folder = Path(path)
    if not universal.detect(folder):
        raise UsageError(
            f"{path} is no universal checkpoint: universal.json is not there. Any other checkpoint is made one by "
            "`snapshotd convert SRC DST --to universal`"
        )
    folder = folder if folder.is_dir() else folder.parent
    manifest = universal.manifest_of(folder)
    tensors = universal.tensors_of(folder, manifest)
    universal.check_share(tensors, settings.rank, settings.world_size, threads)
    states: dict[str, dict[str, View]] = {}
    for tensor in tensors:
        if tensor.kind not in _FIXED:
            states.setdefault(tensor.name, {})[tensor.kind] = tensor.view
    return Checkpoint(
        path=path,
        step=manifest.step,
        steps_made=manifest.steps_made,
        tensors={tensor.key: tensor.view for tensor in tensors},
        states=states,
        tied=manifest.tied,
        param_groups=manifest.param_groups,
        extra=manifest.extra,
    )


def _apply(loader: Loader, inventory: Inventory, kept_state: set[int]) -> list[str]:
    """Put everything in place; state of what the checkpoint does not know stays. Returns missing extras."""
    before = [dict(view.optimizer.state) for view in inventory.optimizers]
    missing = loader.apply()
    for view, old in zip(inventory.optimizers, before, strict=True):
        for key, value in old.items():
            if not isinstance(key, torch.Tensor) or id(key) in kept_state:
                view.optimizer.state.setdefault(key, value)
    return missing


def _fill(wants: Sequence[Want], views: Mapping[str, View], threads: int) -> None:
    with ThreadPoolExecutor(threads, "snapshotd-fill") as readers:
        for _ in readers.map(partial(_read, views), wants):
            pass


def _read(views: Mapping[str, View], want: Want) -> None:
    view, slices = views[want.entry.name], want.piece.slices()
    if want.target.device.type == "cpu" and view.dtype == want.entry.dtype:
        whole = view_of(want.target)
        view.read_into(want.piece.box.offsets, whole[slices] if slices else whole)
        return
    dtype: torch.dtype = getattr(torch, view.dtype)
    for part in cut(want):
        words = np.empty(part.piece.box.lengths, dtype=carrier(dtype.itemsize))
        view.read_into(part.piece.box.offsets, words)
        slices = part.piece.slices()
        with torch.no_grad():
            (part.target[slices] if slices else part.target).copy_(torch.from_numpy(words).view(dtype))


def _set_generators(checkpoint: Checkpoint, inventory: Inventory, settings: Settings) -> bool:
    """Set this rank's random generators, if the checkpoint is of as many ranks; says whether it is."""
    names = [name for kind, name in checkpoint.tensors if kind == "rng"]
    if {name.split("/")[0] for name in names} != {str(rank) for rank in range(settings.world_size)}:
        return False
    mine = str(settings.rank)
    if mine not in names:
        return False
    data: dict[str, Any] = {"torch": _text(checkpoint.tensors["rng", mine]), "devices": []}
    for index, device in enumerate(inventory.devices()):
        view = checkpoint.tensors.get(("rng", f"{mine}/{device.type}:{index}"))
        if view is None:
            break  # they count by position
        data["devices"].append([device.type, _text(view)])
    set_rng({**data, **checkpoint.generators.get(mine, {})}, inventory.devices())
    return True


def _text(view: View) -> str:
    out = np.empty(view.shape, dtype=np.uint8)
    view.read_into((0,) * len(view.shape), out)
    return base64.b64encode(out.tobytes()).decode()


def _told(checkpoint: Checkpoint, matcher: Matcher, generators: bool) -> str:
    count = sum(1 for kind, _ in checkpoint.tensors if kind in ("model", "buffer"))
    if not checkpoint.has_optimizer:
        return f"{count} tensors of the model. It has no optimizer state: the optimizer starts fresh"
    step = "it does not say of which step" if checkpoint.step is None else f"step {checkpoint.step}"
    taken = [f"{count} tensors of the model", f"{sum(map(len, checkpoint.states.values()))} of the optimizer"]
    taken += ["the random generators"] if generators else []
    return f"{step}, {', '.join(taken)}"


def _warn(checkpoint: Checkpoint, notes: Notes) -> None:
    """Say what was not there, what was left, and what is not what it was."""
    place = os.fspath(checkpoint.path)
    if not checkpoint.has_optimizer:
        logger.warning("snapshotd: %s has no optimizer state: the optimizer starts fresh, at step 0", place)
    elif checkpoint.step is None:
        logger.warning("snapshotd: %s does not say its step: training starts at step 0", place)
    for told, items in (
        ("%s has nothing for these, which stay as they are: %s", notes.kept),
        ("nothing here takes this of %s: %s", notes.unused),
        ("these of %s were cast: %s", notes.cast),
    ):
        if items:
            more = f" and {len(items) - 20} more" if len(items) > 20 else ""
            logger.warning("snapshotd: " + told, place, ", ".join(items[:20]) + more)
