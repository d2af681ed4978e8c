"""
What a checkpoint is, for people who found one: format, step, tensors, layout, whether it is whole, and who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from snapshotd.errors import CorruptionError
from snapshotd.universal import readers
from snapshotd.universal.places import Job, Place
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import Archive, watch
from snapshotd.universal.views import View

if TYPE_CHECKING:
    from snapshotd.universal.rules import Rules

__all__ = ["describe"]

_READERS: Final = {
    "universal": ("safetensors", "transformers (the weights)", "snapshotd (Snapshotter.restore)"),
    "snapshot": ("safetensors (rank files)", "snapshotd (Snapshotter.restore)"),
    "job": ("snapshotd restore",),
    "dcp": ("torch.distributed.checkpoint",),
    "deepspeed": ("DeepSpeed",),
    "megatron": ("Megatron-LM",),
    "hf": ("safetensors", "transformers"),
    "torch": ("torch.load",),
}
_PLACES: Final = ("topology", "layout", "ranks", "world_size")


def describe(
    path: Place, format_name: str = "auto", rules: Rules | None = None, *, verify: bool = False
) -> dict[str, Any]:
    """
    Return what lies at ``path``; nothing of its tensors is read, unless every byte is to be verified.

    One that is broken is described as far as it can be, with ``complete`` false and the ``problem`` in words.
    UsageError where nothing is there that is known, or where rules are needed.
    """
    name = readers.detect(path) if format_name == "auto" else format_name
    found: dict[str, Any] = {"kind": "checkpoint", "path": str(path), "format": name, "complete": True}
    try:
        with watch() as archives, closing(readers.read(path, name, rules)) as state:
            found.update(_of_state(state, "job" if isinstance(path, Job) else name))
            if isinstance(path, Job):
                found.update(kind="job", path=str(replace(path, step=state.step)), **state.source)
            state.check()
            if verify:
                found.update(_verified(path, name, state, archives))
    except CorruptionError as error:
        found.update(complete=False, problem=str(error))
    return found


def _verified(path: Place, name: str, state: State, archives: Mapping[Archive, None]) -> dict[str, Any]:
    from snapshotd.universal.compare import verify_state
    from snapshotd.universal.stream import Settings

    checked = verify_state(path, name, state, archives, Settings())
    if checked.problems:
        return {"complete": False, "problem": "; ".join(checked.problems[:10]), "verified_bytes": checked.nbytes}
    return {"verified_bytes": checked.nbytes}


def _of_state(state: State, name: str) -> dict[str, Any]:
    files = dict.fromkeys(label for tensor in state.tensors for label in tensor.view.labels())
    layout = {key: state.source[key] for key in _PLACES if state.source.get(key) is not None}
    tensors = [_of_tensor(tensor) for tensor in state.tensors]
    first = state.of_kind("model") or state.of_kind("fp32")
    return {
        "step": state.step,
        "layout": layout or {"files": len(files), "parts of a tensor": max((t["parts"] for t in tensors), default=0)},
        "source": state.source,
        "bytes": state.nbytes,
        "parameters": sum(tensor.view.numel for tensor in first.values()),
        "files": len(files),
        "kinds": {kind: len(state.of_kind(kind)) for kind in state.kinds},
        "tensors": tensors,
        "param_groups": [
            {**{key: value for key, value in group.items() if key != "names"}, "members": len(group.get("names", []))}
            for group in state.param_groups
        ],
        "tied": state.tied,
        "frozen": state.frozen,
        "extra": sorted(state.extra),
        "warnings": state.warnings,
        "readable_by": [*_readers_of(state, name), "snapshotd convert"],
    }


def _of_tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "parts": _parts(tensor.view),
    }


def _readers_of(state: State, name: str) -> tuple[str, ...]:
    if name == "deepspeed" and str(state.source.get("tag", "")).endswith("_universal"):
        return ("DeepSpeed with load_universal",)
    return _READERS.get(name, ())


def _parts(view: View) -> int:
    """In how many ranges of files a tensor is."""
    inner = list(view.inner())
    return sum(map(_parts, inner)) if inner else 1
