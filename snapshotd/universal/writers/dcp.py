"""
Write a checkpoint of torch.distributed.checkpoint: one file per rank of the layout, readable by plain ``dcp.load``.

Keys are those of torch's own examples: ``model.<fqn>``, ``optim.state.<fqn>.<name>``,
``optim.param_groups.<i>.<field>``, and the rest as it was. What lies in which rank's file, dcp_mesh.py decides. torch
is not needed: ``.metadata`` is pickled with torch's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snapshotd.universal.pickling import Call, Instance, Name, dumps, tensor_call
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.stream import OutFile, Settings, Written, remove_journal, write_files
from snapshotd.universal.torchfile import Archive, lay_out
from snapshotd.universal.views import Cut, View
from snapshotd.universal.writers.dcp_mesh import Mesh
from snapshotd.universal.writers.torch_tree import (
    NOTE_KEY,
    is_plain_step,
    modules_of,
    note_of,
    optimizer_groups,
    plain_value,
    rest_of,
    stand_ins,
)
from snapshotd.universal.writers.universal import write_whole

__all__ = ["check", "flat_items", "losses", "write"]

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_PathOf = tuple[Any, ...]


@dataclass(slots=True)
class _RankFile:
    """One rank's file while it is laid out."""

    name: str
    nbytes: int = 0
    archives: list[Archive] = field(default_factory=list)


def losses(state: State) -> list[str]:
    """Return what the format can not hold: nothing."""
    return []


def check(state: State, options: dict[str, Any]) -> None:
    """UsageError for a layout that the format has not."""
    _mesh(state, options)


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write ``state`` into the directory ``target``, for as many ranks as the layout has."""
    plan = _Plan(_mesh(state, options))
    objects: list[tuple[_PathOf, Any]] = []
    for path, item in flat_items(state):
        if isinstance(item, View):
            plan.tensor(path, item)
        else:
            objects.append((path, item))
    for path, item in objects:
        plan.value(path, item)
    for path, other in _flattened(state):
        plan.again(path, other)
    write_files(target, plan.files(), settings, identity=identity)
    write_whole(target / ".metadata", plan.metadata())
    remove_journal(target)


def flat_items(state: State) -> Iterator[tuple[_PathOf, Any]]:
    """Iterate over (path, view or value) of the tree that a trainer would pass to dcp.save."""
    names = state.of_kind("model") | state.of_kind("buffer")
    for name, tensor in names.items():
        yield ("model", name), tensor.view
    for alias, name in state.tied.items():
        if name in names:
            yield ("model", alias), names[name].view
    kinds = set(state.optimizer_kinds)
    for tensor in state.tensors:
        if tensor.kind in kinds:
            yield ("optim", "state", tensor.name, tensor.kind), _state_value(tensor)
        elif tensor.kind == "fp32":
            yield ("fp32", tensor.name), tensor.view
        elif tensor.kind == "rng":
            yield (f"rng_{tensor.name}",), tensor.view
    extra = {name: tensor.view for name, tensor in state.of_kind("extra").items()}
    for i, group in enumerate(optimizer_groups(state, extra)):
        group["params"] = group.pop("names")
        for key, value in group.items():
            yield ("optim", "param_groups", i, key), value
    for name, value in modules_of(state, extra).items():
        yield from _flatten(("model", name), value)
    for key, value in rest_of(state, extra).items():
        yield from _flatten((key,), value)
    yield (NOTE_KEY,), note_of(state)


def _flattened(state: State) -> Iterator[tuple[_PathOf, _PathOf]]:
    """
    Where the source had hyperparameters under each parameter's name, its trainer asks for them so: (path, and that).

    They are read from the same bytes. Equal groups can't be told apart there: the numbers need not be those of his own.
    """
    if "param_groups" not in state.source:
        return
    extra = {name: tensor.view for name, tensor in state.of_kind("extra").items()}
    for i, group in enumerate(optimizer_groups(state, extra)):
        for key, value in group.items():
            for path, _ in _flatten(("optim", "param_groups", i, key), value) if key != "names" else ():
                for name in group["names"]:
                    yield path, ("optim", f"param_groups.{name}.{key}", *path[4:])


def _owner(path: _PathOf) -> tuple[str, str]:
    """The kind and the name of the parameter that a tensor belongs to; empty for what belongs to none."""
    if path[0] == "optim" and len(path) == 4 and path[1] == "state":
        return path[3], path[2]
    return (path[0], path[1]) if path[0] in ("model", "fp32") and len(path) == 2 else ("", "")


def _mesh(state: State, options: dict[str, Any]) -> Mesh:
    names = [tensor.name for tensor in state.tensors if tensor.kind in ("model", "buffer")]
    names = names or [name for group in state.param_groups for name in group["names"]]
    return Mesh(options.get("layout", {}), options.get("rules"), names)


def _state_value(tensor: Tensor) -> Any:
    return plain_value(tensor.view) if is_plain_step(tensor) else tensor.view


def _flatten(path: _PathOf, value: Any) -> Iterator[tuple[_PathOf, Any]]:
    """As DCP flattens: dicts always, lists only if there are tensors or dicts in them."""
    if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            yield from _flatten((*path, key), item)
    elif isinstance(value, list) and any(isinstance(item, (dict, View)) for item in value):
        for i, item in enumerate(value):
            yield from _flatten((*path, i), item)
    else:
        yield path, value


class _Plan:
    """Collects chunks and objects; gives the files, and what ``.metadata`` says of them."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ranks = [_RankFile(f"__{rank}_0.distcp") for rank in range(mesh.world)]
        self.described: dict[str, Any] = {}
        self.paths: dict[str, _PathOf] = {}
        self.stored: dict[str, list[tuple[Any, Instance]]] = {}
        self.turn = 0

    def tensor(self, path: _PathOf, view: View) -> None:
        key = self._key(path)
        chunks = []
        for rank, (at, lengths) in self.mesh.boxes(*_owner(path), view.shape):
            part = view if lengths == view.shape else Cut(view, at, lengths)
            chunks.append(_instance("ChunkStorageMetadata", offsets=_size(at), sizes=_size(lengths)))
            pickled = dumps(tensor_call("0", view.dtype, lengths, part.nbytes))
            self._append(self.ranks[rank], key, _size(at), pickled, [("0", f"{key}@{at}", part)])
        properties = Instance(
            Name(_METADATA, "TensorProperties"),
            (
                Name("torch", view.dtype),
                Call(Name("torch.serialization", "_get_layout"), ("torch.strided",)),
                *(False, Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,)), False),
            ),
        )
        self.described[key] = _instance(
            "TensorStorageMetadata", properties=properties, size=_size(view.shape), chunks=chunks
        )

    def value(self, path: _PathOf, value: Any) -> None:
        key = self._key(path)
        storages: list[tuple[str, str, View]] = []

        def put(view: View) -> Call:
            number = str(len(storages))
            storages.append((number, f"{key}#{number}", view))
            return tensor_call(number, view.dtype, view.shape, view.nbytes)

        pickled = dumps(stand_ins(value, put))
        self._append(self._next(), key, None, pickled, storages)
        self.described[key] = _instance("BytesStorageMetadata")

    def again(self, path: _PathOf, other: _PathOf) -> None:
        """Say that what is at ``path`` is at ``other`` too."""
        key, new = ".".join(map(str, path)), self._key(other)
        self.described[new], self.stored[new] = self.described[key], self.stored[key]

    def files(self) -> list[OutFile]:
        return [
            OutFile(
                name=rank.name,
                nbytes=rank.nbytes,
                blocks=[block for archive in rank.archives for block in archive.blocks],
                tensors=[placed for archive in rank.archives for placed in archive.tensors],
                crc=True,
                finish=_Finish(rank.archives),
            )
            for rank in self.ranks
        ]

    def metadata(self) -> bytes:
        """Return the bytes of ``.metadata``."""
        pairs = [
            (_instance("MetadataIndex", fqn=key, offset=offset, index=None), place)
            for key, places in self.stored.items()
            for offset, place in places
        ]
        state = {
            "state_dict_metadata": self.described,
            "planner_data": self.paths,
            "storage_data": _Pairs(pairs),
            "storage_meta": None,
            "version": "1.0.0",
        }
        return dumps(Instance(Name(_METADATA, "Metadata"), state))

    def _key(self, path: _PathOf) -> str:
        key = ".".join(map(str, path))
        self.paths[key] = path
        return key

    def _next(self) -> _RankFile:
        self.turn += 1
        return self.ranks[self.turn % len(self.ranks)]

    def _append(
        self, file: _RankFile, key: str, offset: Any, pickled: bytes, tensors: list[tuple[str, str, View]]
    ) -> None:
        archive = lay_out(pickled, tensors, begin=file.nbytes)
        file.archives.append(archive)
        place = Instance(
            Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            {"relative_path": file.name, "offset": file.nbytes, "length": archive.nbytes},
        )
        self.stored.setdefault(key, []).append((offset, place))
        file.nbytes += archive.nbytes


class _Pairs(dict[Any, Any]):
    """A dict for the pickle whose keys are stand-ins: they are not hashable by value, so pairs are kept as they are."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.pairs = pairs

    def items(self) -> Any:
        return self.pairs


class _Finish:
    """Gives the checksums' blocks of all archives of a file."""

    def __init__(self, archives: list[Archive]) -> None:
        self.archives = archives

    def __call__(self, written: dict[str, Written]) -> list[tuple[int, bytes]]:
        return [block for archive in self.archives for block in archive.finish(written)]


def _instance(kind: str, **fields: Any) -> Instance:
    return Instance(Name(_METADATA, kind), fields)


def _size(values: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (values,))
