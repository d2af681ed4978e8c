"""
The rows behind the vocabulary, up to a size that tensor ranks can divide: parameters with moments, but of no token.

They are no part of the undivided model, and another tensor size has another number of them. But they stand in the
softmax, so a run that goes on at the same padded size needs them as they were, or its loss changes. They are kept
apart, as tensors of kind "extra"; who writes for another size makes new ones (zeros).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View

__all__ = ["PADDING_KEY", "padding_of", "put_padding", "take_padding"]

PADDING_KEY: Final = "vocabulary_padding"


def put_padding(state: State, padding: Mapping[tuple[str, str], View]) -> None:
    """Put the padding rows of each (kind, name) into ``state``."""
    for (kind, name), view in padding.items():
        tensor = f"{PADDING_KEY}.{kind}.{name}"
        state.tensors.append(Tensor("extra", tensor, view))
        state.extra.setdefault(PADDING_KEY, {}).setdefault(kind, {})[name] = {"$tensor": tensor}


def padding_of(state: State) -> dict[tuple[str, str], View]:
    """Return the padding rows that ``state`` has, by (kind, name)."""
    kept = state.extra.get(PADDING_KEY)
    views = {tensor.name: tensor.view for tensor in state.tensors if tensor.kind == "extra"}
    found: dict[tuple[str, str], View] = {}
    for kind, names in kept.items() if isinstance(kept, dict) else ():
        for name in names:
            if (view := views.get(f"{PADDING_KEY}.{kind}.{name}")) is not None:
                found[kind, name] = view
    return found


def take_padding(state: State) -> None:
    """Take the padding rows out of ``state``."""
    state.extra.pop(PADDING_KEY, None)
    state.tensors = [
        tensor for tensor in state.tensors if tensor.kind != "extra" or not tensor.name.startswith(f"{PADDING_KEY}.")
    ]
