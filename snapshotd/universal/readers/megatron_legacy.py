"""
Megatron-LM's own format (``--ckpt-format torch``): a file per tensor, pipeline and expert rank.

Layers count from 0 on every stage and in every virtual chunk. The files themselves show how many there are, so that no
formula of Megatron's is needed for that: chunk after chunk, and in each chunk stage after stage, the numbers go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError
from snapshotd.universal import torchzip
from snapshotd.universal.derived import Permuted
from snapshotd.universal.globals import TensorRef
from snapshotd.universal.plain import to_json
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import Part
from snapshotd.universal.readers.megatron_names import layer_of, renumbered
from snapshotd.universal.readers.megatron_optim import Optimizers
from snapshotd.universal.readers.megatron_padding import PADDING_KEY, take_padding
from snapshotd.universal.readers.megatron_whole import Whole, put_rng, put_vocabulary
from snapshotd.universal.rules import Rules
from snapshotd.universal.sources import FileSource
from snapshotd.universal.state import State, Tensor
from snapshotd.universal.views import Reshaped, View

__all__ = ["is_legacy", "read_legacy"]

MODEL_FILE: Final = "model_optim_rng.pt"
OPTIM_FILE: Final = "distrib_optim.pt"
_FILES: Final = (MODEL_FILE, OPTIM_FILE, "model_rng.pt", "optim.pt")
VERSIONS: Final = (0, 1.0, 2.0, 3.0)
_RANK: Final = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?\Z")
_MODEL: Final = re.compile(r"model(\d*)\Z")
NOTE_KEY: Final = "snapshotd"
_TAKEN: Final = frozenset({"optimizer", "rng_state", "iteration", NOTE_KEY})
_WHOLE_LISTS: Final = ("decoder.layers", "encoder.layers", "language_model.encoder.layers")


@dataclass(slots=True)
class _Rank:
    """One rank's file: ``chunks`` are the names and tensors of its model chunks."""

    place: Place
    path: Path
    values: dict[str, Any]
    chunks: list[dict[str, Any]]


def is_legacy(folder: Path) -> bool:
    """Whether ``folder`` has folders of Megatron's model-parallel ranks, and not of somebody else's files in them."""
    ranks = [entry for entry in folder.iterdir() if _RANK.match(entry.name) and entry.is_dir()]
    held = {file.name for rank in ranks for file in rank.iterdir()}
    return bool(ranks) and (not held or not held.isdisjoint(_FILES))


def read_legacy(folder: Path, rules: Rules | None = None) -> State:
    """Return the state in an iteration's folder. ``rules``: for parameters that Megatron-core does not know."""
    folders = _rank_folders(folder)
    first = _load(next(iter(folders.values())) / MODEL_FILE)
    facts = Facts(first.get("args"), str(next(iter(folders.values())) / MODEL_FILE))
    places = _places(folder, folders, facts)
    ranks = [_open(place, path) for place, path in sorted(places.items())]
    _check_same(folder, ranks, facts)
    facts.vp = len(ranks[0].chunks)
    whole = Whole(facts, rules)
    firsts = _first_layers(folder, ranks, facts)
    extra_states: dict[str, Any] = {}
    for rank in ranks:
        chunks = [_parts(rank, chunk, firsts, facts, extra_states) for chunk in range(facts.vp)]
        for parts in chunks:
            for part in parts:
                whole.add(rank.place, part)
        _add_optimizer(rank, chunks, whole, facts)
    _sort(whole, ranks, firsts, facts)
    state = State(format="megatron", tensors=[], step=_iteration(ranks[0]))
    whole.put(state)
    _put_rest(state, ranks, facts)
    if extra_states:
        state.extra["extra_state"] = to_json(extra_states, "extra_state", state.tensors)
    put_vocabulary(state, facts)
    _put_note(state, ranks[0].values.get(NOTE_KEY))
    return state


def _rank_folders(folder: Path) -> dict[tuple[int, ...], Path]:
    found: dict[tuple[int, ...], Path] = {}
    for entry in folder.iterdir():
        match = _RANK.match(entry.name)
        if match and entry.is_dir():
            found[tuple(int(number) for number in match.groups() if number is not None)] = entry
    found = dict(sorted(found.items()))
    for entry in found.values():
        if not (entry / MODEL_FILE).is_file():
            old = next((name for name in ("model_rng.pt", "optim.pt") if (entry / name).is_file()), None)
            if old:
                raise FormatError(
                    f"{entry / old}: model and optimizer in files of their own, as Megatron-LM's first distributed "
                    "optimizer wrote them, are not read here; load and save the checkpoint with a release since 2023"
                )
            raise FormatError(f"{entry / MODEL_FILE} is missing: copy it again, or take an older checkpoint")
    if not found:
        raise FormatError(f"{folder} has no mp_rank_* folders: nothing of a Megatron-LM checkpoint is there")
    return found


def _places(folder: Path, folders: Mapping[tuple[int, ...], Path], facts: Facts) -> dict[Place, Path]:
    """Which rank each folder is. ``mp_rank_00_001`` is a stage, or an expert rank where there is one stage."""
    lengths = {len(numbers) for numbers in folders}
    if len(lengths) > 1:
        names = ", ".join(next(p.name for n, p in folders.items() if len(n) == length) for length in sorted(lengths))
        raise FormatError(f"{folder} has folders of different runs ({names}); move away those that are not of this one")
    (length,) = lengths
    staged = facts.pp > 1 if facts.known else length > 1
    spread = facts.ep > 1 if facts.known else length > 2
    if length != 1 + staged + spread:
        raise FormatError(
            f"{folder}: folders like {next(iter(folders.values())).name} do not fit args, which say tensor size "
            f"{facts.tp}, pipeline size {facts.pp}, expert size {facts.ep}: they are of another run"
        )
    found = {
        Place(numbers[1] if staged else 0, numbers[0], numbers[-1] if spread else 0): path
        for numbers, path in folders.items()
    }
    if not facts.known:
        facts.tp, facts.pp = max(p.tp for p in found) + 1, max(p.pp for p in found) + 1
        facts.ep, facts.etp = max(p.ep for p in found) + 1, max(p.tp for p in found) + 1
    expected = set(facts.places())
    sizes = f"tensor size {facts.tp}, pipeline size {facts.pp}" + (f", expert size {facts.ep}" if spread else "")
    for place in sorted(expected - set(found)):
        name = f"mp_rank_{place.tp:02d}" + (f"_{place.pp:03d}" if staged else "")
        name += f"_{place.ep:03d}" if spread else ""
        raise FormatError(
            f"{folder / name / MODEL_FILE} is missing: the run had {sizes}, so there are {len(expected)} ranks, but "
            f"{len(expected & set(found))} of them are here. Copy it from where the checkpoint was written"
        )
    for place in sorted(set(found) - expected):
        raise FormatError(f"{found[place]} is too much: the run had {sizes}. It is of another run; move it away")
    return found


def _load(path: Path) -> dict[str, Any]:
    values = torchzip.load(FileSource(path))
    if not isinstance(values, dict):
        raise FormatError(f"{path} holds a {type(values).__name__}, expected a dict: not a file that Megatron-LM wrote")
    return values


def _open(place: Place, folder: Path) -> _Rank:
    path = folder / MODEL_FILE
    values = _load(path)
    keys = {int(match[1] or 0): key for key in values if isinstance(key, str) and (match := _MODEL.match(key))}
    if not keys or sorted(keys) != list(range(len(keys))):
        raise FormatError(f"{path} has no model in it (it has {', '.join(map(str, values))})")
    version = values.get("checkpoint_version", 0)
    if version not in VERSIONS:
        raise FormatError(
            f"{path} has checkpoint_version {version!r:.20}; this program reads 0 to 3.0: update snapshotd"
        )
    chunks: list[dict[str, Any]] = []
    for i in sorted(keys):
        if not isinstance(values[keys[i]], dict):
            raise FormatError(f"{path}: {keys[i]} is a {type(values[keys[i]]).__name__}, expected a state dict")
        chunks.append(dict(_flat(values[keys[i]])))
    return _Rank(place, path, values, chunks)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values; before Megatron-core, models were nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and not str(key).endswith("_extra_state"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            name = f"{prefix}{key}"
            yield ("output_layer.weight" if name == "word_embeddings_for_head.weight" else name), value


def _iteration(rank: _Rank) -> int | None:
    value = rank.values.get("iteration")
    return value if type(value) is int else None


def _check_same(folder: Path, ranks: Sequence[_Rank], facts: Facts) -> None:
    first = ranks[0]
    for rank in ranks[1:]:
        if _iteration(rank) != _iteration(first):
            raise FormatError(
                f"{rank.path} is of iteration {_iteration(rank)}, {first.path} of {_iteration(first)}: the folder was "
                "put together from several saves; take a checkpoint whose ranks are of one iteration"
            )
        if len(rank.chunks) != len(first.chunks):
            raise FormatError(
                f"{rank.path} has {len(rank.chunks)} model chunks, {first.path} has {len(first.chunks)}: they are of "
                "different runs"
            )
        other = Facts(rank.values.get("args"), str(rank.path))
        if other.known and (other.tp, other.pp, other.ep) != (facts.tp, facts.pp, facts.ep):
            raise FormatError(
                f"{rank.path} is of a run with tensor size {other.tp}, pipeline size {other.pp}, expert size "
                f"{other.ep}; {first.path} of one with {facts.tp}, {facts.pp}, {facts.ep}"
            )
    match = re.fullmatch(r"iter_(\d+)", folder.name)
    if match and _iteration(first) is not None and int(match[1]) != _iteration(first):
        raise FormatError(f"{first.path} is of iteration {_iteration(first)}, but lies in {folder.name}: it was moved")
    if facts.known and facts.vp > 1 and len(first.chunks) != facts.vp:
        raise FormatError(f"{first.path} has {len(first.chunks)} model chunks, but args say {facts.vp} per stage")


def _first_layers(folder: Path, ranks: Sequence[_Rank], facts: Facts) -> dict[tuple[int, int], dict[str, int]]:
    """Return, for (stage, chunk), the global number of the first layer of each list of layers."""
    firsts: dict[tuple[int, int], dict[str, int]] = {}
    counts: dict[str, int] = {}
    by_stage = {rank.place.pp: rank for rank in reversed(ranks)}
    for chunk in range(facts.vp):
        for pp in range(facts.pp):
            firsts[pp, chunk] = dict(counts)
            here: dict[str, int] = {}
            for name in by_stage[pp].chunks[chunk]:
                if found := layer_of(name):
                    here[found[0]] = max(here.get(found[0], 0), found[1] + 1)
            for layers, count in here.items():
                counts[layers] = counts.get(layers, 0) + count
    total = facts.count("num_layers") if facts.text("model_type") == "" else None
    found_total = next((counts[name] for name in _WHOLE_LISTS if name in counts), None)
    if total is not None and found_total is not None and "decoder.layers" in counts and found_total != total:
        raise FormatError(f"{folder}: args say {total} layers, but the files of all stages have {found_total}")
    return firsts


def _parts(
    rank: _Rank, chunk: int, firsts: Mapping[tuple[int, int], Mapping[str, int]], facts: Facts, extra: dict[str, Any]
) -> list[Part]:
    offsets = firsts[rank.place.pp, chunk]
    experts = rank.place.ep * facts.experts_per_rank
    version = rank.values.get("checkpoint_version", 0)
    result: list[Part] = []
    for local, value in rank.chunks[chunk].items():
        name = renumbered(local, offsets, experts)
        if isinstance(value, TensorRef) and not local.endswith("_extra_state"):
            result.append(Part(name, _grouped(value.view, name, version, facts), local))
        elif value is not None:
            extra[f"{name}@{facts.rank_of(rank.place)}"] = value
    return result


def _grouped(view: View, name: str, version: float, facts: Facts) -> View:
    """Queries, keys and values head by head, as all versions since 2.0 have them."""
    pieces = 3 if ".query_key_value." in name else 2 if ".key_value." in name else 0
    if version >= 2.0 or not pieces or not view.shape:
        return view
    heads = (facts.count("num_attention_heads") or 0) // facts.tp
    if not heads or view.shape[0] % (heads * pieces):
        raise FormatError(f"{name} is of checkpoint_version {version}, and args do not say its number of heads")
    size, rest = view.shape[0] // (heads * pieces), view.shape[1:]
    last = tuple(range(3, 3 + len(rest)))
    if version == 1.0:
        turned = Permuted(Reshaped(view, (heads, size, pieces, *rest)), (0, 2, 1, *last))
    else:
        turned = Permuted(Reshaped(view, (pieces, heads, size, *rest)), (1, 0, 2, *last))
    return Reshaped(turned, view.shape)


def _add_optimizer(rank: _Rank, chunks: Sequence[Sequence[Part]], whole: Whole, facts: Facts) -> None:
    saved = rank.values.get("optimizer")
    if saved is None:
        return
    flat_path = rank.path.parent / OPTIM_FILE
    optimizers = Optimizers(facts, whole.groups, chunks, rank.place.pp)
    version = rank.values.get("checkpoint_version", 0)
    if version < 2.0 and any(".query_key_value." in part.name for chunk in chunks for part in chunk):
        whole.warnings.append(f"{rank.path}: the optimizer of checkpoint_version {version} is left out")
        return
    optimizers.add(saved, _flat_file(rank, flat_path, facts), str(rank.path), str(flat_path))
    whole.warnings += optimizers.warnings


def _flat_file(rank: _Rank, path: Path, facts: Facts) -> Any:
    if path.is_file():
        return torchzip.load(FileSource(path))
    if facts.flag("use_distributed_optimizer") and not facts.flag("no_save_optim"):
        raise FormatError(
            f"{path} is missing: the run used the distributed optimizer, whose state lies there. Copy it, or convert "
            "the model alone after taking 'optimizer' out"
        )
    return None


def _sort(
    whole: Whole, ranks: Sequence[_Rank], firsts: Mapping[tuple[int, int], Mapping[str, int]], facts: Facts
) -> None:
    """Bring names into the model's order: chunk after chunk, stage after stage, as each file lists them."""
    by_stage: dict[int, list[_Rank]] = {}
    for rank in ranks:
        by_stage.setdefault(rank.place.pp, []).append(rank)
    order: dict[str, None] = {}
    for chunk in range(facts.vp):
        for pp in range(facts.pp):
            for rank in by_stage[pp]:
                experts = rank.place.ep * facts.experts_per_rank
                order.update(dict.fromkeys(renumbered(name, firsts[pp, chunk], experts) for name in rank.chunks[chunk]))
    whole.parts = {name: whole.parts[name] for name in order if name in whole.parts}


def _put_rest(state: State, ranks: Sequence[_Rank], facts: Facts) -> None:
    state.source.update(
        storage="torch",
        layout={"tp": facts.tp, "pp": facts.pp, "vpp": facts.vp, "ep": facts.ep, "dp": facts.data_parallel_size},
    )
    for rank in ranks:
        number = facts.rank_of(rank.place)
        saved = rank.values.get("rng_state")
        for i, item in enumerate(saved if isinstance(saved, list) else []):
            put_rng(state, number + i * facts.tp, item)
    first = ranks[0]
    for key, value in first.values.items():
        if key not in _TAKEN and not _MODEL.match(str(key)):
            state.extra[str(key)] = to_json(value, str(key), state.tensors)
    saved = first.values.get("optimizer")
    for one in saved if isinstance(saved, list) else [saved]:
        if isinstance(one, dict) and one.get("grad_scaler") is not None and "grad_scaler" not in state.extra:
            state.extra["grad_scaler"] = to_json(one["grad_scaler"], "grad_scaler", state.tensors)


def _put_note(state: State, note: Any) -> None:
    """What our own writer noted, because Megatron-LM has no place for it; gone once Megatron has saved again."""
    if not isinstance(note, dict):
        return
    added = {str(rank) for rank in note.get("rng_added") or ()}
    state.tensors = [t for t in state.tensors if t.kind != "rng" or t.name.partition("/")[0] not in added]
    for rank in added:
        state.extra.get("rng_state", {}).pop(rank, None)
    for name, value in (note.get("rng") or {}).items():
        if isinstance(value, TensorRef):
            state.tensors.append(Tensor("rng", str(name), value.view))
    if others := note.get("rng_state"):
        state.extra.setdefault("rng_state", {}).update(to_json(others, "rng_state", state.tensors))
    groups = to_json(note.get("param_groups"), "param_groups")
    named = sorted(name for group in state.param_groups for name in group["names"])
    if groups and sorted(name for group in groups for name in group.get("names", [])) == named:
        state.param_groups = groups
    fields = state.extra.get("args", {}).get("fields", {})
    fields.update(to_json(note.get("args") or {}, "args", state.tensors))
    for name in note.get("args_added") or ():
        fields.pop(name, None)
    if not fields:
        state.extra.pop("args", None)
    if note.get("step") is None:
        state.step = None
    if PADDING_KEY in note:
        take_padding(state)
        if note[PADDING_KEY]:
            state.extra[PADDING_KEY] = to_json(note[PADDING_KEY], PADDING_KEY, state.tensors)
