"""
Read Hugging Face folders: safetensors, one file or sharded, and what Trainer puts beside them.

Names are those in the files; transformers may call them otherwise inside (it maps them when it loads).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.layout.header import decode_json
from snapshotd.universal.globals import NumpyArray, TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.conventions import Model
from snapshotd.universal.readers.optimizers import Optimizer, name_optimizer
from snapshotd.universal.safetensors import read_header
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import load
from snapshotd.universal.views import View

__all__ = ["detect", "read"]

INDEX_NAMES: Final = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
SINGLE_NAMES: Final = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
_CONFIGS: Final = ("config.json", "generation_config.json", "trainer_state.json", "adapter_config.json")
NOTE_KEY: Final = "snapshotd"
_MAX_JSON: Final = 64 << 20

_EMBEDDINGS: Final = (
    *("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight", "shared.weight"),
    *("gpt_neox.embed_in.weight", "transformer.word_embeddings.weight", "model.language_model.embed_tokens.weight"),
    *("language_model.model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight"),
)


def detect(path: Path) -> bool:
    """A safetensors file, or a folder with an index or with model.safetensors."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in (*INDEX_NAMES, *SINGLE_NAMES)) or _only_file(path) is not None


def read(path: Path) -> State:
    """Return the state at ``path``."""
    state = State(format="hf", tensors=[])
    folder = path if path.is_dir() else path.parent
    views, metadata = _weights(path)
    configs = _configs(folder) if path.is_dir() else {}
    tied = _tied(configs.get("config.json", {}), views)
    optimizer, warning = _optimizer(folder, views) if path.is_dir() else (None, None)
    if warning:
        state.warnings.append(warning)
    if configs:
        state.extra["configs"] = {key: to_json(value, key) for key, value in configs.items()}
    note = _note(metadata)
    if metadata:
        state.source["metadata"] = metadata
    if path.is_dir():
        _trainer_files(state, folder)
    if note is not None:
        Model.put_noted(state, views, note)
    elif optimizer is None:
        # Weights only: nothing tells which of them are buffers, but integers are none that train.
        state.tensors += [Tensor("model", name, view) for name, view in views.items()]
        state.tied.update({alias: name for alias, name in tied.items() if alias not in views})
    else:
        Model(views, listed=optimizer.names).put(state)
        state.tied.update({alias: name for alias, name in tied.items() if alias not in views})
        optimizer.put(state)
    state.step = note.get("step") if note is not None else _step(configs, path)
    return state


def _note(metadata: dict[str, str]) -> Mapping[str, Any] | None:
    """What our own writer says besides; the key is taken out."""
    text = metadata.pop(NOTE_KEY, None)
    if text is None:
        return None
    note = decode_json(text, f"{NOTE_KEY} in __metadata__")
    return note if note.get("version") == 1 else None


def _weights(path: Path) -> tuple[dict[str, View], dict[str, str]]:
    if path.is_file():
        tensors, metadata = read_header(FileSource(path))
        return dict(tensors), _said(metadata)
    index = next((path / name for name in INDEX_NAMES if (path / name).is_file()), None)
    if index is None:
        single = next((path / name for name in SINGLE_NAMES if (path / name).is_file()), None) or _only_file(path)
        if single is None:
            raise FormatError(f"{path} has neither {INDEX_NAMES[0]} nor {SINGLE_NAMES[0]}")
        return _weights(single)
    source = FileSource(index)
    weights = decode_json(read_bytes(source, 0, source.size), source.label).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise FormatError(f"{index} has no weight_map")
    files: dict[str, dict[str, Any]] = {}
    said: dict[str, str] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or "/" in file or file.startswith("."):
            raise FormatError(f"{index}: {file!r:.80} is not a file of this folder")
        if file in files:
            continue
        if not (path / file).is_file():
            raise FormatError(f"{path / file} is missing; {index.name} says that it holds {name}: copy it again")
        tensors, metadata = read_header(FileSource(path / file))
        files[file] = dict(tensors)
        said.update(_said(metadata))
    for name, file in weights.items():
        if name not in files[file]:
            raise FormatError(f"{path / file} lacks {name}, which {index.name} says it holds: are they of one save?")
    for file, tensors in files.items():
        for name in tensors:
            if weights.get(name) != file:
                raise FormatError(f"{path / file} holds {name}, of which {index.name} says {weights.get(name)!r:.80}")
    return {name: files[file][name] for name, file in weights.items()}, said


def _only_file(path: Path) -> Path | None:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def _said(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value for key, value in metadata.items() if key == NOTE_KEY or (key != "format" and len(value) < 10_000)
    }


def _configs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _CONFIGS:
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


def _tied(config: Any, views: Mapping[str, View]) -> dict[str, str]:
    """transformers leaves the alias out of the files where the config says that it is tied."""
    if not isinstance(config, Mapping):
        return {}
    inner = config.get("text_config")
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, Mapping) else None)
    embedding = next((name for name in _EMBEDDINGS if name in views), None)
    if tied is not True or embedding is None or "lm_head.weight" in views:
        return {}
    return {"lm_head.weight": embedding}


def _optimizer(folder: Path, views: Mapping[str, View]) -> tuple[Optimizer | None, str | None]:
    file = next((folder / name for name in ("optimizer.pt", "optimizer.bin") if (folder / name).is_file()), None)
    if file is None:
        return None, None
    value = load(FileSource(file))
    if not isinstance(value, Mapping) or not isinstance(value.get("param_groups"), list):
        raise FormatError(f"{file} is not the state of an optimizer")
    optimizer = Optimizer(list(map(dict, value["param_groups"])), value.get("state", {}))
    warning = name_optimizer(optimizer, views)
    return optimizer, f"{file.name}: {warning}" if warning else None


def _trainer_files(state: State, folder: Path) -> None:
    """scheduler.pt, and the random generators of each rank."""
    for name, key in (("scheduler.pt", "lr_scheduler"), ("scheduler.bin", "lr_scheduler"), ("scaler.pt", "scaler")):
        if (folder / name).is_file():
            state.extra[key] = to_json(load(FileSource(folder / name)), key, state.tensors)
    for file in sorted(folder.glob("rng_state*.pth")):
        match = re.match(r"rng_state(?:_([0-9]+))?\.pth\Z", file.name)
        rank = (match.group(1) or "0") if match else "0"
        value = load(FileSource(file))
        if not isinstance(value, Mapping):
            continue
        rest: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(item, TensorRef):
                state.tensors.append(Tensor("rng", rank if key == "cpu" else f"{rank}/{key}", item.view))
            elif isinstance(item, NumpyArray) or item is not None:
                rest[str(key)] = item
        if rest:
            kept = state.extra.setdefault("rng", {})
            kept[rank] = to_json(rest, f"rng.{rank}", state.tensors)
    if (folder / "training_args.bin").is_file():
        state.warnings.append("training_args.bin is an object of transformers and is not carried over")


def _step(configs: Mapping[str, Any], path: Path) -> int | None:
    trainer = configs.get("trainer_state.json")
    if isinstance(trainer, Mapping) and type(trainer.get("global_step")) is int:
        return int(trainer["global_step"])
    match = re.search(r"(?:checkpoint|step)[-_]([0-9]+)\Z", path.name)
    return int(match.group(1)) if match else None
