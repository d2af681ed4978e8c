"""
Write Hugging Face safetensors: the model's weights and buffers, and the configs where the source had them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snapshotd.errors import UsageError
from snapshotd.universal.format import INDEX_NAME
from snapshotd.universal.state import State
from snapshotd.universal.stream import Settings, remove_journal, write_files
from snapshotd.universal.writers.torch_tree import NOTE_KEY, note_of
from snapshotd.universal.writers.universal import model_index, plan_files, write_configs, write_whole

__all__ = ["losses", "write"]


def losses(state: State) -> list[str]:
    """Return what the format can not hold of ``state``, one line each. UsageError where it would hold nothing."""
    if not any(tensor.kind in ("model", "buffer") for tensor in state.tensors):
        raise UsageError("there are no weights, and files of Hugging Face hold nothing else: choose another format")
    lost = [f"{kind}: {len(state.of_kind(kind))} tensors" for kind in state.kinds if kind not in ("model", "buffer")]
    if state.param_groups:
        lost.append(f"param_groups: {len(state.param_groups)} groups")
    lost += [f"extra.{key}" for key in state.extra if key != "configs"]
    return lost


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write the model of ``state`` into the directory ``target``."""
    model = [tensor for tensor in state.tensors if tensor.kind in ("model", "buffer")]
    note = note_of(state)
    if any(note[key] for key in ("buffers", "frozen", "tied")) or state.step is not None:
        # Read by our own reader only; others look at "format".
        files, places = plan_files(model, {NOTE_KEY: json.dumps(note)})
    else:
        files, places = plan_files(model)
    write_files(target, files, settings, identity=identity)
    if len(files) > 1:
        write_whole(target / INDEX_NAME, model_index(model, places))
    write_configs(state, target)
    remove_journal(target)
