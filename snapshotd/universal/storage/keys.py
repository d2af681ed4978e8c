"""
Answer any trainer's flat keys from a State: whatever dict of model, optimizer and the rest is passed to dcp.load.

A key says what it is by its parts: ``...state.NAME.KIND`` is the optimizer's, ``...param_groups.NUMBER.FIELD`` (or
``.NAME.FIELD``, where the optimizer was flattened) a group's, what ends with the name of a weight is that weight, and
the rest is looked up in ``extra``. So the trainer may call its sections as it likes; see readers/dcp_keys.py for what
is met. ``torch`` is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from snapshotd.universal.plain import from_json
from snapshotd.universal.readers.conventions import is_rng, unwrapped
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import Described
from snapshotd.universal.writers.torch_tree import MODULES_KEY, is_plain_step, optimizer_groups, plain_value

__all__ = ["KeyLookup"]

_MISSING: Final = object()
_RNG_LIKE: Final = Described("uint8", (1,))


class KeyLookup:
    """``find(key)`` gives a Tensor, a plain value (views stand for the tensors in it), or raises KeyError."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._tensors = {tensor.key: tensor for tensor in state.tensors}
        self._weights = state.of_kind("model") | state.of_kind("buffer")
        self._weights |= {alias: self._weights[name] for alias, name in state.tied.items() if name in self._weights}
        self._kinds = set(state.optimizer_kinds)
        views = {name: tensor.view for name, tensor in state.of_kind("extra").items()}
        self._extra = {key: from_json(value, views) for key, value in state.extra.items()}
        self._groups = optimizer_groups(state, views)
        self._ids = list(dict.fromkeys(name for group in self._groups for name in group["names"]))
        self._group_of = {name: group for group in reversed(self._groups) for name in group["names"]}

    def find(self, key: str, *, numbered: bool = False) -> Any:
        """
        Return what ``key`` stands for. ``numbered``: the trainer's optimizer has numbers in place of names, so a
        group's list of parameters is one of numbers.
        """
        parts = next(iter(unwrapped([key]).values())).split(".")
        for look in (self._optimizer, self._group, self._weight, self._generator, self._rest):
            found = look(parts, numbered)
            if found is not _MISSING:
                return found
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        try:
            self.find(str(key))
        except KeyError:
            return False
        return True

    def master_of(self, tensor: Tensor) -> Tensor | None:
        """Return the float32 master copy of a weight, where there is one besides it."""
        return self._tensors.get(("fp32", tensor.name)) if tensor.kind == "model" else None

    def _optimizer(self, parts: Sequence[str], numbered: bool) -> Any:
        for at in _places(parts, "state"):
            rest = parts[at + 1 :]
            # Hardly any kind has a dot in it, but names do: the longest name first.
            for cut in range(len(rest) - 1, 0, -1):
                kind, name = ".".join(rest[cut:]), ".".join(rest[:cut])
                if kind not in self._kinds:
                    continue
                if name.isdigit() and int(name) < len(self._ids):
                    name = self._ids[int(name)]
                tensor = self._tensors.get((kind, name)) or self._tensors.get((kind, self.state.tied.get(name, "")))
                tensor = tensor or self._tensors.get((kind, name.removeprefix("module.")))
                if tensor is not None:
                    return plain_value(tensor.view) if is_plain_step(tensor) else tensor
        return _MISSING

    def _group(self, parts: Sequence[str], numbered: bool) -> Any:
        for at in _places(parts, "param_groups"):
            first, *inner = parts[at + 1 :] or [""]
            if first.isdigit() and int(first) < len(self._groups) and inner:
                group = self._groups[int(first)]
                if inner == ["params"]:
                    return [self._ids.index(name) for name in group["names"]] if numbered else list(group["names"])
                if inner == ["param_names"]:
                    return list(group["names"])
                found = _descend(group, inner)
                if found is not _MISSING or len(inner) == 1:
                    return found
            name = ".".join(parts[at + 1 : -1])
            found = self._group_of.get(name) or self._group_of.get(self.state.tied.get(name, ""))
            if found is not None:
                return name if parts[-1] == "params" else found.get(parts[-1], _MISSING)
        return _MISSING

    def _weight(self, parts: Sequence[str], numbered: bool) -> Any:
        for at in range(len(parts)):
            found = self._weights.get(".".join(parts[at:]))
            if found is not None:
                return found
        return _MISSING

    def _generator(self, parts: Sequence[str], numbered: bool) -> Any:
        path = [int(part) if part.isdigit() else part for part in parts]
        name = is_rng(path, _RNG_LIKE)
        return self._tensors.get(("rng", name), _MISSING) if name is not None else _MISSING

    def _rest(self, parts: Sequence[str], numbered: bool) -> Any:
        if parts in (["step"], ["global_step"]) and parts[0] not in self._extra and self.state.step is not None:
            return self.state.steps_made
        for at in range(len(parts)):
            for tree in (self._extra, self._extra.get(MODULES_KEY), self._extra.get("app")):
                found = _descend(tree, parts[at:])
                if found is not _MISSING:
                    return found
        return _MISSING


def _places(parts: Sequence[str], word: str) -> Iterator[int]:
    return (i for i, part in enumerate(parts) if part == word)


def _descend(value: Any, parts: Sequence[str]) -> Any:
    """Follow dotted parts into dicts, whose keys may have dots themselves, and lists."""
    if not parts:
        return value
    if isinstance(value, (list, tuple)) and parts[0].isdigit() and int(parts[0]) < len(value):
        return _descend(value[int(parts[0])], parts[1:])
    if isinstance(value, Mapping):
        for cut in range(len(parts), 0, -1):
            key = ".".join(parts[:cut])
            if key in value:
                found = _descend(value[key], parts[cut:])
                if found is not _MISSING:
                    return found
    return _MISSING
