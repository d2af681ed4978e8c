"""
All state that is neither module nor optimizer: schedulers, grad scaler, module extra states, and the user's ``extra``.

Rule 1: it may change at any time, so it is read when capture() is called and its tensors are cloned (``sync`` leaves).
Rule 2: objects are restored by their own ``load_state_dict``; tensors, arrays, dicts and lists in place; what cannot be
changed in place is written back into the user's dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from snapshotd_client.codec import Json, decode, encode
from snapshotd_client.errors import RestoreError
from snapshotd_client.leaves import Leaf, LeafSink, Names

__all__ = ["Extras"]


@dataclass(frozen=True, slots=True, eq=False)
class _Stateful:
    """One object with state_dict and load_state_dict."""

    name: str
    target: Any


class Extras:
    """What else the user gave us; TypeError with the fix for what cannot be used."""

    def __init__(self, scheduler: object, scaler: object, extra: object) -> None:
        self._schedulers = _stateful_list(scheduler)
        if scaler is not None and not _is_stateful(scaler):
            raise TypeError(f"scaler must have state_dict and load_state_dict, not {type(scaler).__name__}")
        self._scaler: Any = scaler
        if extra is not None and not isinstance(extra, Mapping):
            raise TypeError(f"extra must be a dict such as {{'data': sampler}}, not {type(extra).__name__}")
        self.values: Mapping[str, Any] = {} if extra is None else extra
        for name in self.values:
            if not isinstance(name, str):
                raise TypeError(f"the names in extra must be strings, not {name!r:.60}")

    def encode(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Json], list[Leaf]]:
        """Return the JSON of everything, and its leaves. CannotExpress names the path of what can't be kept."""
        names = Names()
        sink = LeafSink("extra", sync=True, name=names.take)
        data: dict[str, Json] = {
            "schedulers": [[s.name, encode(s.target.state_dict(), s.name, sink)] for s in self._schedulers],
            "scaler": None if self._scaler is None else encode(_scaler_state(self._scaler), "scaler", sink),
            "modules": {n: encode(m.get_extra_state(), f"extra_state.{n}", sink) for n, m in modules.items()},
            "extra": {name: self._encode_extra(name, value, sink) for name, value in self.values.items()},
        }
        return data, sink.leaves

    def scheduler_states(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the name and the state of each scheduler, as they are now."""
        return [(one.name, one.target.state_dict()) for one in self._schedulers]

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the scaler's state as it is now; None where there is no scaler."""
        state: dict[str, Any] | None = None if self._scaler is None else self._scaler.state_dict()
        return state

    def template(self, name: str) -> Any:
        """Return the state that ``extra[name]`` has now, in the shape that ``encode`` walks; None if there is none."""
        value: Any = self.values.get(name)
        return value.state_dict() if _is_stateful(value) else value

    def load_schedulers(self, data: Json, source: Callable[[Json], Any]) -> None:
        """Load schedulers and scaler. RestoreError when there are other ones than in the snapshot."""
        stored = data["schedulers"]
        if len(stored) != len(self._schedulers):
            raise RestoreError(
                f"the snapshot has {len(stored)} schedulers, here are {len(self._schedulers)}: give the same ones"
            )
        for scheduler, (_, state) in zip(self._schedulers, stored, strict=True):
            scheduler.target.load_state_dict(decode(state, source))
        if self._scaler is not None and data["scaler"] is not None:
            state = decode(data["scaler"], source)
            self._scaler.load_state_dict(_numbers(state) if _is_torchs(self._scaler) else state)

    def load_extra(self, data: Json, source: Callable[[Json], Any], modules: Mapping[str, nn.Module]) -> list[str]:
        """Load the modules' extra states and the user's extra; return the names that the snapshot does not have."""
        for name, state in data["modules"].items():
            if name in modules:
                modules[name].set_extra_state(decode(state, source))
        for name in self.values:
            if name in data["extra"]:
                self._load_one(name, decode(data["extra"][name], source))
        return [name for name in self.values if name not in data["extra"]]

    def _encode_extra(self, name: str, value: Any, sink: LeafSink) -> Json:
        if _is_stateful(value):
            value = value.state_dict()
        elif isinstance(value, torch.Generator):
            value = value.get_state()
        return encode(value, f"extra.{name}", sink)

    def _load_one(self, name: str, state: Any) -> None:
        value = self.values[name]
        if _is_stateful(value):
            value.load_state_dict(state)
        elif isinstance(value, torch.Generator):
            value.set_state(state)
        elif isinstance(value, torch.Tensor) and isinstance(state, torch.Tensor) and value.shape == state.shape:
            with torch.no_grad():
                value.copy_(state)
        elif isinstance(value, np.ndarray) and isinstance(state, np.ndarray) and value.shape == state.shape:
            np.copyto(value, state)
        elif isinstance(value, MutableMapping) and isinstance(state, Mapping):
            value.clear()
            value.update(state)
        elif isinstance(value, list) and isinstance(state, list):
            value[:] = state
        elif isinstance(self.values, MutableMapping):
            self.values[name] = state


def _is_torchs(scaler: Any) -> bool:
    return getattr(type(scaler), "state_dict", None) is torch.amp.GradScaler.state_dict


def _scaler_state(scaler: Any) -> dict[str, Any]:
    """Return ``scaler.state_dict()``, with the tensors that it would wait for where they lie on an accelerator."""
    scale = getattr(scaler, "_scale", None)
    if not _is_torchs(scaler) or not scaler.is_enabled() or scale is None or scale.is_cpu:
        state: dict[str, Any] = scaler.state_dict()
        return state
    return {
        "scale": scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": scaler._growth_tracker,
    }


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    """Return it as torch's scaler gives it: without tensors."""
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def _is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _stateful_list(scheduler: object) -> list[_Stateful]:
    if scheduler is None:
        return []
    if _is_stateful(scheduler):
        return [_Stateful("scheduler", scheduler)]
    items: list[tuple[object, object]]
    if isinstance(scheduler, Mapping):
        items = list(scheduler.items())
    elif isinstance(scheduler, Sequence) and not isinstance(scheduler, str):
        items = list(enumerate(scheduler))
    else:
        raise TypeError(
            f"scheduler must have state_dict and load_state_dict, or be a list of such, not {type(scheduler).__name__}"
        )
    for key, item in items:
        if not _is_stateful(item):
            raise TypeError(f"scheduler[{key!r}] must have state_dict and load_state_dict, not {type(item).__name__}")
    return [_Stateful(f"scheduler.{key}", item) for key, item in items]
