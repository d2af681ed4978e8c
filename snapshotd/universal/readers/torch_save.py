"""
Read files of torch.save: a model, or whatever dict a trainer made of model, optimizer and the rest.

The dicts are found by what they are: an optimizer has ``state`` and ``param_groups``; the model is the largest dict of
names to tensors. The optimizer's ids become names (param_ids.py); what shares a storage is tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import CorruptionError, FormatError
from snapshotd.layout.header import decode_json
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.companions import is_companion, is_optimizer_file, optimizer_file, put_companions
from snapshotd.universal.readers.conventions import Model, find_step, is_extra_state, is_rng, step_of_name, unwrapped
from snapshotd.universal.readers.optimizers import Optimizer, name_optimizers
from snapshotd.universal.readers.rank_files import find_ranks
from snapshotd.universal.rules import Rules, join_ranks, rules_of_record
from snapshotd.universal.sources import FileSource, read_bytes
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.torchzip import is_torch_file, load
from snapshotd.universal.views import View

__all__ = ["assemble", "detect", "is_training_state", "read"]

INDEX_NAME: Final = "pytorch_model.bin.index.json"
_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
_MODEL_KEYS: Final = ("model", "state_dict", "model_state_dict", "module", "net", "model_state", "weights")
_MAX_DEPTH: Final = 4

NOTE_KEY: Final = "snapshotd"
"""Our own writer's note of what torch's dicts do not say; see writers/torch_tree.py."""

Path_ = tuple[Any, ...]


def detect(path: Path) -> bool:
    """A torch.save file, or a folder with one, with one for each tensor rank, or with ``pytorch_model.bin``."""
    if path.is_file():
        if path.name == INDEX_NAME:
            return True
        try:
            return is_torch_file(FileSource(path))
        except (OSError, FormatError):
            return False
    return (path / INDEX_NAME).is_file() or _only_file(path) is not None or bool(find_ranks(path))


def is_training_state(file: Path) -> bool:
    """Whether ``file`` holds a model and its optimizer; one that cannot be read holds nothing."""
    try:
        value = load(FileSource(file)) if is_torch_file(FileSource(file)) else None
        if not isinstance(value, Mapping):
            return False
        optimizers = [place for place, _ in _find_optimizers(value)]
        return bool(optimizers) and bool(_find_model(value, str(file), optimizers))
    except (OSError, CorruptionError):
        return False


def read(path: Path, rules: Rules | None = None) -> State:
    """Return the state at ``path``. ``rules``: for files of tensor ranks that do not record how they make a whole."""
    if path.name == INDEX_NAME:
        path = path.parent
    if path.is_dir() and (files := find_ranks(path)):
        return _read_ranks(files, rules)
    if path.is_dir() and (path / INDEX_NAME).is_file():
        value = _indexed(path)
    else:
        file = path if path.is_file() else _only_file(path)
        if file is None:
            raise FormatError(f"{path} has no file of torch.save, or several: name the one")
        value = load(FileSource(file))
    if path.is_dir():
        value = _with_optimizer(value, path)
    state = assemble(value, str(path))
    if path.is_dir():
        put_companions(state, path)
    if state.step is None:
        state.step = step_of_name(path.name)
    return state


def _with_optimizer(value: Any, folder: Path) -> Any:
    """Trainer and accelerate put the optimizer into a file beside the weights."""
    file = optimizer_file(folder)
    if file is None or not isinstance(value, Mapping) or any(_find_optimizers(value)):
        return value
    return {"model": value, "optimizer": load(FileSource(file))}


def _read_ranks(files: Sequence[Path], rules: Rules | None) -> State:
    values = [load(FileSource(file)) for file in files]
    labels = [str(file) for file in files]
    states = [assemble(value, label) for value, label in zip(values, labels, strict=True)]
    note = _note(values[0])
    record = note.get("shares") if note is not None else None
    if isinstance(record, list):
        count = len(files) if note is None else note.get("ranks")
        if count != len(files):
            raise FormatError(f"{files[0].parent} has files of {len(files)} ranks, {files[0].name} says {count}")
        rules = rules_of_record(record, labels[0])
    return join_ranks(states, rules, labels)


def assemble(value: Any, label: str) -> State:
    """Return the state that a loaded object is; FormatError when there is no model in it."""
    state = State(format="torch", tensors=[])
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, Mapping):
        raise FormatError(f"{label} holds a {type(value).__name__}, not a dict: save state dicts")
    note = _note(value)
    optimizers = [found for found in _find_optimizers(value) if note is None or found[0] == ("optimizer",)]
    if note is not None and isinstance(value.get("model"), Mapping):
        path, weights = ("model",), _weights_in(value["model"])
    else:
        path, weights = _find_model(value, label, [place for place, _ in optimizers])
    others = list(_others(value, path, weights))
    plain = unwrapped(weights)
    weights = {plain[name]: tensor for name, tensor in weights.items()}
    tied = _tied(weights)
    views: dict[str, View] = {name: tensor.view for name, tensor in weights.items()}
    found = [Optimizer(list(map(dict, item["param_groups"])), item["state"]) for _, item in optimizers]
    for optimizer in found:
        optimizer.rename(plain)
    try:
        warning = name_optimizers(found, views, tied)
    except FormatError as error:  # of another model beside this one, or of a kind that has no state for each parameter
        where = ", ".join("extra." + ".".join(map(str, place)) for place, _ in optimizers)
        warning = f"the optimizer is kept in {where}, without the model's names: {error}"
        found, optimizers = [], []
    if warning:
        state.warnings.append(warning)
    listed = {name for optimizer in found for name in optimizer.names} if found else None
    parameters = [name for name, tensor in weights.items() if tensor.parameter or tensor.requires_grad]
    noted = note is not None
    masters = _masters(value) if noted else {}
    taken = {path, *(place for place, _ in optimizers)} | ({(NOTE_KEY,), ("fp32",)} if noted else set())
    if note is not None and isinstance(note.get("rng"), list):
        taken |= {("rng_state",)}
        state.tensors += [Tensor("rng", name, tensor.view) for name, tensor in _generators(value, note["rng"]).items()]
    _put_rest(state, value, taken, note)
    idle = [name for optimizer in found for name in optimizer.idle]
    if note is not None:
        Model.put_noted(state, views, note)
        state.tensors += [Tensor("fp32", name, tensor.view) for name, tensor in masters.items()]
    else:
        Model(views, listed=listed, idle=idle, parameters=parameters, tied=tied).put(state)
    for name, item in others:
        state.extra.setdefault("model_state", {})[name] = to_json(item, f"model_state.{name}", state.tensors)
    for optimizer in found:
        optimizer.put(state)
    state.step = find_step(state)
    if note is not None:
        state.step = note.get("step")
        if not note.get("step_in_extra"):
            state.extra.pop("step", None)
    return state


def _note(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    note = value.get(NOTE_KEY)
    return note if isinstance(note, Mapping) and note.get("version") == 1 else None


def _masters(value: Mapping[str, Any]) -> dict[str, TensorRef]:
    found = value.get("fp32", {})
    return {name: item for name, item in found.items() if isinstance(item, TensorRef)}


def _generators(value: Mapping[str, Any], names: Sequence[str]) -> dict[str, TensorRef]:
    found = value.get("rng_state", {})
    return {name: found[name] for name in names if isinstance(found.get(name), TensorRef)}


def _only_file(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    files = [entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file()]
    files = [entry for entry in files if not is_companion(entry.name) and not is_optimizer_file(entry.name)]
    model = [entry for entry in files if entry.name in ("pytorch_model.bin", "model.pt", "checkpoint.pt")]
    chosen = model if len(model) == 1 else files
    if len(chosen) != 1:
        return None
    try:
        return chosen[0] if is_torch_file(FileSource(chosen[0])) else None
    except FormatError:
        return None


def _indexed(path: Path) -> dict[str, Any]:
    source = FileSource(path / INDEX_NAME)
    weights = decode_json(read_bytes(source, 0, source.size), source.label).get("weight_map")
    if not isinstance(weights, dict):
        raise FormatError(f"{source.label} has no weight_map")
    loaded: dict[str, Any] = {}
    result: dict[str, Any] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or "/" in file:
            raise FormatError(f"{source.label}: {file!r:.80} is not a file of this folder")
        if file not in loaded:
            if not (path / file).is_file():
                raise FormatError(f"{path / file} is missing; {source.label} says that it holds {name}")
            loaded[file] = load(FileSource(path / file))
        if name not in loaded[file]:
            raise FormatError(f"{path / file} lacks {name}, which {source.label} says it holds")
        result[name] = loaded[file][name]
    return result


def _nodes(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Mapping[Any, Any]]]:
    """All dicts near the top, outer ones first."""
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        yield path, value
        for key, item in value.items():
            if isinstance(item, (Mapping, list, tuple)):
                yield from _nodes(item, (*path, key))
    elif isinstance(value, (list, tuple)) and len(value) <= 64:
        for i, item in enumerate(value):
            yield from _nodes(item, (*path, i))


def _find_optimizers(value: Any) -> Iterator[tuple[Path_, Mapping[str, Any]]]:
    for path, node in _nodes(value):
        state, groups = node.get("state"), node.get("param_groups")
        if isinstance(state, Mapping) and isinstance(groups, list) and all(isinstance(g, Mapping) for g in groups):
            yield path, node


def _find_model(
    value: Mapping[str, Any], label: str, optimizers: Sequence[Path_]
) -> tuple[Path_, dict[str, TensorRef]]:
    best: tuple[tuple[int, int], Path_, dict[str, TensorRef]] | None = None
    for path, node in _nodes(value):
        if any(path[: len(place)] == place for place in optimizers if place or path):
            continue
        tensors = _weights_in(node)
        if not tensors or (not path and any(isinstance(item, Mapping) and item for item in node.values())):
            continue
        named = bool(path) and path[-1] in _MODEL_KEYS
        rank = (2 * named - len(path), sum(tensor.view.nbytes for tensor in tensors.values()))
        if best is None or rank > best[0]:
            best = (rank, path, tensors)
    if best is None:
        raise FormatError(f"{label} holds no dict of names to tensors: there is no model in it")
    return best[1], best[2]


def _weights_in(node: Mapping[Any, Any]) -> dict[str, TensorRef]:
    return {
        name: item
        for name, item in node.items()
        if isinstance(item, TensorRef) and isinstance(name, str) and not is_extra_state(name)
    }


def _tied(weights: Mapping[str, TensorRef]) -> dict[str, str]:
    """Names of one and the same part of a storage are tied to the first of them."""
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in weights.items():
        if tensor.numel:
            other = first.setdefault(tensor.identity, name)
            if other != name:
                tied[name] = other
    return tied


def _others(value: Mapping[str, Any], path: Path_, weights: Mapping[str, TensorRef]) -> Iterator[tuple[str, Any]]:
    """What stands in the model's dict without being a tensor: extra states of modules."""
    node: Any = value
    for key in path:
        node = node[key]
    for name, item in node.items():
        if name not in weights and path and item is not None:
            yield str(name), item


def _put_rest(state: State, value: Mapping[str, Any], taken: set[Path_], note: Mapping[str, Any] | None) -> None:
    """Put all that is not ``taken`` into ``extra``, but for generators, which only our own writer's note can name."""
    renamed = note.get("renamed") if note is not None else None
    renamed = renamed if isinstance(renamed, Mapping) else {}
    if () in taken and all(isinstance(item, TensorRef) for item in value.values()):
        return
    for key, item in value.items():
        rest = _without((key,), item, taken)
        if rest is not _TAKEN and not (() in taken and isinstance(rest, TensorRef)):
            rest = _take_rng(state, (key,), rest) if note is None else rest
            if rest is not _TAKEN:
                name = renamed.get(str(key), str(key))
                state.extra[name] = to_json(rest, name, state.tensors)


_TAKEN: Final = object()


def _without(path: Path_, item: Any, taken: set[Path_]) -> Any:
    if path in taken:
        return _TAKEN
    if not any(place[: len(path)] == path for place in taken):
        return item
    if isinstance(item, Mapping):
        rest = {key: _without((*path, key), inner, taken) for key, inner in item.items()}
        rest = {key: inner for key, inner in rest.items() if inner is not _TAKEN}
        return rest or _TAKEN
    items = [_without((*path, i), inner, taken) for i, inner in enumerate(item)]
    items = [inner for inner in items if inner is not _TAKEN]
    return items or _TAKEN


def _take_rng(state: State, path: Path_, item: Any) -> Any:
    """Take the random generators' tensors out of ``item``; returns what is left."""
    if isinstance(item, TensorRef):
        name = is_rng(path, item.view)
        if name is None or any(tensor.key == ("rng", name) for tensor in state.tensors):
            return item
        state.tensors.append(Tensor("rng", name, item.view))
        return _TAKEN
    if isinstance(item, Mapping) and item and len(path) <= _MAX_DEPTH:
        rest = {key: _take_rng(state, (*path, key), inner) for key, inner in item.items()}
        rest = {key: inner for key, inner in rest.items() if inner is not _TAKEN}
        return rest or _TAKEN
    if isinstance(item, list) and any(isinstance(inner, TensorRef) for inner in item):
        left = [inner for i, inner in enumerate(item) if _take_rng(state, (*path, i), inner) is not _TAKEN]
        return left or _TAKEN
    return item
