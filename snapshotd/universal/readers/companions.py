"""
What HF Trainer, accelerate and Lightning put beside the weights: schedulers, scalers, random generators, counters.

A file that is not understood is told in ``warnings`` and left out: the weights do not depend on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.conventions import find_step
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import load

__all__ = ["CONFIGS", "is_companion", "is_optimizer_file", "optimizer_file", "put_companions"]

CONFIGS: Final = ("config.json", "generation_config.json", "trainer_state.json", "adapter_config.json")
_MAX_JSON: Final = 64 << 20

_FILES: Final = re.compile(
    r"(?:(?P<scheduler>scheduler(?P<number>_[0-9]+)?)\.(?:pt|bin)|(?P<scaler>scaler)\.(?:pt|bin)"
    r"|(?P<other>(?:sampler|dl_state_dict|custom_checkpoint)(?:_[0-9]+)?)\.(?:bin|pkl|pt)"
    r"|rng_state(?:_(?P<rank>[0-9]+))?\.pth|random_states_(?P<process>[0-9]+)\.pkl"
    r"|(?P<meta>meta)\.pt|(?P<arguments>training_args)\.bin)\Z"
)

_OPTIMIZERS: Final = ("optimizer.pt", "optimizer.bin")
_NUMBERED: Final = re.compile(r"(?:(?:pytorch_)?model|optimizer)_[0-9]+\.(?:safetensors|bin|pt)\Z")
"""accelerate's further models and optimizers; the first of each has no number."""

_GENERATORS: Final = {"torch_manual_seed": "cpu", "torch_cuda_manual_seed": "cuda", "torch_xpu_manual_seed": "xpu"}
"""accelerate's names for the generators' states."""


def is_companion(name: str) -> bool:
    """Whether a file of that name stands beside weights, and is no checkpoint of its own."""
    return _FILES.match(name) is not None


def optimizer_file(folder: Path) -> Path | None:
    """Return Trainer's or accelerate's optimizer in ``folder``, if there is one."""
    return next((folder / name for name in _OPTIMIZERS if (folder / name).is_file()), None)


def is_optimizer_file(name: str) -> bool:
    """Whether a file of that name is an optimizer's, or a further model of accelerate's."""
    return name in _OPTIMIZERS or _NUMBERED.match(name) is not None


def put_companions(state: State, folder: Path) -> None:
    """Add to ``state`` what lies in ``folder`` beside the weights, and the step where only that tells it."""
    configs = _configs(folder)
    if configs:
        state.extra["configs"] = {key: to_json(value, key) for key, value in configs.items()}
    for file in sorted(folder.iterdir()):
        if _NUMBERED.match(file.name):
            state.warnings.append(f"{file.name} is of another model or optimizer and is not carried over")
        match = _FILES.match(file.name)
        if match is None or not file.is_file():
            continue
        if match["arguments"]:
            state.warnings.append(f"{file.name} is an object of transformers and is not carried over")
            continue
        try:
            value = load(FileSource(file))
            _put(state, match, value)
        except FormatError as error:
            state.warnings.append(f"{file.name} is not carried over: {error}")
    trainer = configs.get("trainer_state.json")
    if state.step is None and isinstance(trainer, Mapping) and type(trainer.get("global_step")) is int:
        state.step = int(trainer["global_step"])
    if state.step is None:
        state.step = find_step(state)


def _put(state: State, match: re.Match[str], value: Any) -> None:
    if match["scheduler"]:
        key = "lr_scheduler" + (match["number"] or "")
        state.extra[key] = to_json(value, key, state.tensors)
    elif match["scaler"] or match["other"]:
        key = match["scaler"] or match["other"]
        state.extra[key] = to_json(value, key, state.tensors)
    elif match["meta"]:
        for key, item in value.items() if isinstance(value, Mapping) else ():
            state.extra.setdefault(str(key), to_json(item, str(key), state.tensors))
    elif isinstance(value, Mapping):
        _put_generators(state, str(int(match["rank"] or match["process"] or 0)), value)


def _put_generators(state: State, rank: str, value: Mapping[Any, Any]) -> None:
    """The generators of one rank: torch's become tensors, the rest (Python's, NumPy's) values."""
    rest: dict[str, Any] = {}
    for key, item in value.items():
        device = _GENERATORS.get(key, key)
        if isinstance(item, TensorRef):
            state.tensors.append(Tensor("rng", rank if device == "cpu" else f"{rank}/{device}", item.view))
        elif isinstance(item, list) and item and all(isinstance(one, TensorRef) for one in item):
            state.tensors += [Tensor("rng", f"{rank}/{device}:{i}", one.view) for i, one in enumerate(item)]
        elif item is not None:
            rest[str(key)] = item
    if rest:
        kept = state.extra.setdefault("rng", {})
        kept[rank] = to_json(rest, f"rng.{rank}", state.tensors)


def _configs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in CONFIGS:
        if (folder / name).is_file():
            source = FileSource(folder / name)
            if source.size > _MAX_JSON:
                raise FormatError(f"{source.label} has {source.size} bytes; the limit is {_MAX_JSON}")
            text = read_bytes(source, 0, source.size)
            try:
                found[name] = json.loads(text)  # Trainer writes NaN, which strict JSON does not know
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{source.label} is not JSON: {error!s:.200}") from error
    return found
