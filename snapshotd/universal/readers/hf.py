"""
Read Hugging Face folders: safetensors, one file or sharded, and what Trainer puts beside them.

Names are those in the files; transformers may call them otherwise inside (it maps them when it loads).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.layout.header import decode_json
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.companions import optimizer_file, put_companions
from snapshotd.universal.readers.conventions import Model, step_of_name
from snapshotd.universal.readers.module_order import module_order
from snapshotd.universal.readers.optimizers import Optimizer, name_optimizers
from snapshotd.universal.safetensors import read_header
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import load
from snapshotd.universal.views import View

__all__ = ["detect", "read"]

INDEX_NAMES: Final = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
SINGLE_NAMES: Final = ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
NOTE_KEY: Final = "snapshotd"
PART: Final = re.compile(r"(model|diffusion_pytorch_model)-\d{5}-of-(\d{5})\.safetensors\Z")

_EMBEDDINGS: Final = (
    *("model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight", "shared.weight"),
    *("gpt_neox.embed_in.weight", "transformer.word_embeddings.weight", "model.language_model.embed_tokens.weight"),
    *("language_model.model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight"),
)


def detect(path: Path) -> bool:
    """A safetensors file, or a folder with an index, with model.safetensors, or with files that count themselves."""
    if path.is_file():
        return path.suffix == ".safetensors" or path.name in INDEX_NAMES
    named = any((path / name).is_file() for name in (*INDEX_NAMES, *SINGLE_NAMES))
    return named or _only_file(path) is not None or bool(_numbered(path))


def read(path: Path) -> State:
    """Return the state at ``path``."""
    if path.name in INDEX_NAMES:
        path = path.parent
    state = State(format="hf", tensors=[])
    folder = path if path.is_dir() else path.parent
    views, metadata = _weights(path)
    note = _note(metadata)
    if metadata:
        state.source["metadata"] = metadata
    if path.is_dir():
        put_companions(state, folder)
    tied = _tied(state.extra.get("configs", {}).get("config.json", {}), views)
    optimizer = _optimizer(state, folder, views) if path.is_dir() else None
    if note is not None:
        Model.put_noted(state, views, note)
    elif optimizer is None:
        # Weights only: nothing tells which of them are buffers, but integers are none that train.
        state.tensors += [Tensor("model", name, view) for name, view in views.items()]
        state.tied.update({alias: name for alias, name in tied.items() if alias not in views})
    else:
        Model(views, listed=optimizer.names, idle=optimizer.idle).put(state)
        state.tied.update({alias: name for alias, name in tied.items() if alias not in views})
        optimizer.put(state)
    if note is not None:
        state.step = note.get("step")
    elif state.step is None:
        state.step = step_of_name(path.name)
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
    if index is None and (numbered := _numbered(path)):
        return _all_of(path, numbered)
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


def _numbered(path: Path) -> list[str]:
    """The names of the files that ``model-00001-of-00003.safetensors`` is one of, where there is one such set."""
    files = path.iterdir() if path.is_dir() else ()
    sets = {(match[1], int(match[2])) for file in files if (match := PART.match(file.name))}
    if len(sets) != 1:
        return []
    ((head, count),) = sets
    return [f"{head}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _all_of(path: Path, names: list[str]) -> tuple[dict[str, View], dict[str, str]]:
    """The index is gone, but the files say how many they are, and each what it holds."""
    views: dict[str, View] = {}
    said: dict[str, str] = {}
    for name in names:
        if not (path / name).is_file():
            raise FormatError(f"{path / name} is missing, and so is {INDEX_NAMES[0]}: copy them again")
        tensors, metadata = read_header(FileSource(path / name))
        twice = next((key for key in tensors if key in views), None)
        if twice is not None:
            raise FormatError(f"{path / name} holds {twice}, which another file of the set has too")
        views.update(tensors)
        said.update(_said(metadata))
    return views, said


def _only_file(path: Path) -> Path | None:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return files[0] if len(files) == 1 else None


def _said(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value for key, value in metadata.items() if key == NOTE_KEY or (key != "format" and len(value) < 10_000)
    }


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


def _optimizer(state: State, folder: Path, views: Mapping[str, View]) -> Optimizer | None:
    """
    Return Trainer's or accelerate's optimizer, under the names of ``views``; None where there is none.

    The weights' files are sorted by name, the optimizer's numbers count in the order of the modules. Where no order
    that is known fits, the optimizer's state is kept as it is in ``extra``.
    """
    file = optimizer_file(folder)
    if file is None:
        return None
    value = load(FileSource(file))
    if not isinstance(value, Mapping) or not isinstance(value.get("param_groups"), list):
        raise FormatError(f"{file} is not the state of an optimizer")
    reason = ""
    for order in (module_order(views), list(views)):
        optimizer = Optimizer(list(map(dict, value["param_groups"])), value.get("state", {}))
        numbered = not all(isinstance(name, str) for name in optimizer.names)
        try:
            name_optimizers([optimizer], {name: views[name] for name in order})
        except FormatError as error:
            reason = str(error)
            continue
        if numbered:
            state.warnings.append(
                f"{file.name} has numbers instead of names: they are given to the weights in the order in which "
                "well-known models list them, which fits by shape"
            )
        return optimizer
    state.warnings.append(f"{file.name} is kept in extra.optimizer, without the model's names: {reason}")
    state.extra["optimizer"] = to_json(dict(value), "optimizer", state.tensors)
    return None
