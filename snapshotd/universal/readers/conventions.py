"""
What torch's state dicts do not say: which tensor of a model is a buffer, which parameter is frozen, which is tied.

A state dict is names and tensors. The optimizer knows which of them it trains; of the others, a rule decides, and each
rule stands here with its reason. Rules never change a value: they choose the kind only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import View, read_all, slabs
from snapshotd.universal.words import to_float, word_dtype

__all__ = [
    "Model",
    "find_step",
    "is_extra_state",
    "is_rng",
    "looks_like_buffer",
    "looks_like_parameter",
    "same_bytes",
    "step_of_name",
    "unwrapped",
]

_INTEGERS: Final = frozenset({"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"})

_BUFFER_NAME: Final = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|.*inv_freq|.*freqs?(_cis|_cos|_sin)?|.*position_ids|"
    r"(cos|sin)_cached|masked_bias|.*attn_mask|.*causal_mask|.*relative_position_index|e_score_correction_bias|"
    r"expert_bias|tokens_per_expert|.*rope.*)$"
)
"""Last parts of names that are buffers in the models that people train: batch norm, rotary tables, masks, routers."""

_PARAMETER_TAILS: Final = frozenset({"weight", "bias", "weight_g", "weight_v", "gamma", "beta", "lora_A", "lora_B"})

_STEP_PATHS: Final = (
    *(("step",), ("global_step",), ("iteration",), ("iter",), ("global_steps",)),
    *(("train", "step"), ("train_state", "step"), ("trainer_state", "global_step"), ("train_state", "global_step")),
    *(("progress", "step"), ("state", "step"), ("trainer", "global_step"), ("meta", "step")),
)


_STEP_NAME: Final = re.compile(r"(?:step|checkpoint|ckpt|iter|iteration)[-_=]?([0-9]+)(?![0-9])")

_WRAPPERS: Final = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What torch.compile, activation checkpointing and FSDP1 put into names: no module of a user's is called so."""


class Model:
    """
    The tensors of a model's state dict, in its order, and what is known of them.

    ``sharded``: names that were cut over ranks: parameters, since no framework cuts buffers. ``listed``: names in the
    optimizer's groups, None where there is no optimizer. ``idle``: those of them that have no state. ``compare``: read
    weights to find tied ones.
    """

    def __init__(
        self,
        views: Mapping[str, View],
        *,
        listed: Collection[str] | None,
        idle: Collection[str] = (),
        sharded: Collection[str] = (),
        parameters: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
        compare: bool = True,
    ) -> None:
        self.views = views
        self.listed = None if listed is None else set(listed)
        self.idle = set(idle)
        self.sharded = set(sharded)
        self.parameters = set(parameters)
        self.tied = dict(tied or {})
        self._tails = {name.rpartition(".")[2] for name in self.listed or ()}
        if compare:
            self._find_tied_copies()
        self.frozen = [name for name in views if name not in self.tied and self._is_frozen(name)]

    def put(self, state: State) -> None:
        """Add the tensors, ``tied`` and ``frozen`` to ``state``."""
        for name, view in self.views.items():
            if name not in self.tied:
                kind = "buffer" if self.is_buffer(name) else "model"
                state.tensors.append(Tensor(kind, name, view))
        state.tied.update(self.tied)
        state.frozen += self.frozen

    @staticmethod
    def put_noted(state: State, views: Mapping[str, View], note: Mapping[str, Any]) -> None:
        """As ``put``, where the writer was snapshotd and left a note of what is what."""
        buffers, tied = set(note.get("buffers") or ()), dict(note.get("tied") or {})
        for name, view in views.items():
            if name not in tied:
                state.tensors.append(Tensor("buffer" if name in buffers else "model", name, view))
        state.tied.update(tied)
        state.frozen += [name for name in note.get("frozen") or () if isinstance(name, str)]

    def is_buffer(self, name: str) -> bool:
        if name in (self.listed or ()) or name in self.parameters:
            return False
        tail = name.rpartition(".")[2]
        if self.views[name].dtype in _INTEGERS:
            return tail not in _PARAMETER_TAILS
        if name in self.sharded:
            return False
        if looks_like_buffer(name):
            return True
        if tail in _PARAMETER_TAILS or tail in self._tails or self.listed is None:
            return False
        # A module's own parameters come before its own buffers: what precedes a trained one is a parameter.
        module = name.rpartition(".")[0]
        mine = [other for other in self.views if other.rpartition(".")[0] == module]
        return not any(other in self.listed for other in mine[mine.index(name) + 1 :])

    def _is_frozen(self, name: str) -> bool:
        if self.listed is None or self.is_buffer(name):
            return False
        return name in self.idle or name not in self.listed

    def _find_tied_copies(self) -> None:
        """
        A state dict has a tied weight under both names, the optimizer under one. Neither torch.save's shared storages
        nor anything else tells so in DCP: what the optimizer does not know, and is in every bit equal to a parameter
        that it trains, is that parameter. An untied copy would have moved on, or stayed behind.
        """
        if not self.listed:
            return
        trained: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name in self.views:
            if name in self.listed:
                trained.setdefault((self.views[name].dtype, self.views[name].shape), []).append(name)
        for name, view in self.views.items():
            if name in self.listed or name in self.tied or view.numel < 2 or self.is_buffer(name):
                continue
            for other in trained.get((view.dtype, view.shape), ()):
                if same_bytes(view, self.views[other]):
                    self.tied[name] = other
                    break


def looks_like_buffer(name: str) -> bool:
    """Whether a name is one that buffers have in well-known models."""
    return _BUFFER_NAME.search(name) is not None


def looks_like_parameter(name: str) -> bool:
    """Whether a name ends as parameters of torch's own modules do."""
    return name.rpartition(".")[2] in _PARAMETER_TAILS


def same_bytes(one: View, other: View, slab_bytes: int = 1 << 20) -> bool:
    """Whether two views of one dtype and shape have the same bytes; stops at the first that differs."""
    for at, lengths in slabs(one.shape, one.itemsize, slab_bytes):
        left = np.empty(lengths, dtype=word_dtype(one.dtype))
        right = np.empty(lengths, dtype=word_dtype(other.dtype))
        one.read_into(at, left)
        other.read_into(at, right)
        if left.tobytes() != right.tobytes():  # not by value: complex words may be NaN
            return False
    return True


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """
    Return {name: name in the model that nobody has wrapped}.

    torch.compile, activation checkpointing and FSDP1 leave marks that are unmistakable; DDP's and DataParallel's
    ``module.`` is one where all names begin with it.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: _WRAPPERS.sub("", inner[len("module.") :]) for name, inner in plain.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def is_extra_state(name: str) -> bool:
    """Whether an entry of a model's state dict is what a module's ``get_extra_state`` gave: no tensor of the model."""
    return name.rpartition(".")[2] == "_extra_state"


def is_rng(path: Sequence[Any], view: View) -> str | None:
    """
    Return the name under which a random generator's state is kept (see state.py), None for any other tensor.

    The rank is the first number in the path, as in ``rng_3`` or ``rank_3.rng``; 0 where there is none. A list's index
    is the rank too, unless its name speaks of an accelerator: then it is the device.
    """
    text = ".".join(map(str, path)).lower()
    if view.dtype != "uint8" or len(view.shape) != 1 or not re.search(r"(^|[._])(rng|random|generator)", text):
        return None
    device = re.search(r"(cuda|xpu|npu|hpu|mps)(?:[._:]*([0-9]+))?", text)
    if device is None:
        number = re.search(r"[0-9]+", text)
        return str(int(number.group())) if number else "0"
    index = device.group(2)
    if index is None and type(path[-1]) is int:
        index = str(path[-1])
        text = ".".join(map(str, path[:-1])).lower()
    number = re.search(r"[0-9]+", text)
    of_device = number is not None and number.start() == device.start(2)
    rank = number.group() if number is not None and not of_device else "0"
    return f"{int(rank)}/{device.group(1)}" + (f":{int(index)}" if index else "")


def find_step(state: State) -> int | None:
    """Return the step that the trainer's own values tell, if one does: numbers, or tensors of one number."""
    numbers = {tensor.name: tensor.view for tensor in state.tensors if tensor.kind == "extra"}
    for path in (*_STEP_PATHS, *(("app", *path) for path in _STEP_PATHS)):
        value: Any = state.extra
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(value.get("$tensor"), str):
            value = _number(numbers.get(value["$tensor"]))
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is int and value >= 0:
            return value
    return None


def step_of_name(name: str) -> int | None:
    """Return the step that a file's or folder's name tells, as in ``checkpoint-500`` or ``epoch=1-step=500.ckpt``."""
    found = _STEP_NAME.findall(name.lower())
    return int(found[-1]) if found else None


def _number(view: View | None) -> Any:
    if view is None or view.numel != 1 or view.dtype not in _INTEGERS | {"float32", "float64"}:
        return None
    return to_float(read_all(view), view.dtype).reshape(-1)[0].item()
