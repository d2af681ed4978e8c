"""
Write Megatron-LM's own format (``--ckpt-format torch``) for any tensor, pipeline, virtual and expert size.

The state must have Megatron-core's names, and others only where the user's rules say how tensor ranks share them.
Padding of the vocabulary is made anew, as the target size wants it (zeros), tied embeddings get their copy on the last
stage, groups are laid out by position as Megatron makes them. The optimizer is written as the run had it: distributed
(``distrib_optim.pt``), or whole on each rank. torch is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snapshotd.errors import FormatError, UsageError
from snapshotd.universal.derived import Filled
from snapshotd.universal.pickling import Call, Instance, Name, Ordered, dumps, tensor_call
from snapshotd.universal.plain import from_json
from snapshotd.universal.readers.megatron_dp import rank_parts
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import Part, buffers_of, layouts
from snapshotd.universal.readers.megatron_groups import Member, by_rule
from snapshotd.universal.readers.megatron_names import (
    EMBEDDING,
    OUTPUT,
    is_buffer,
    is_expert,
    layer_of,
    order_of,
    renumbered,
)
from snapshotd.universal.readers.megatron_padding import PADDING_KEY
from snapshotd.universal.readers.megatron_rules import is_fused, rules_for
from snapshotd.universal.rules import Rules, name_list
from snapshotd.universal.state import State
from snapshotd.universal.stream import OutFile, Settings, remove_journal, write_files
from snapshotd.universal.torchfile import lay_out
from snapshotd.universal.views import Joined, Reshaped, View
from snapshotd.universal.writers.megatron_args import target_args
from snapshotd.universal.writers.megatron_custom import Padder, check_names
from snapshotd.universal.writers.torch_tree import NOTE_KEY, plain_value
from snapshotd.universal.writers.universal import write_whole

__all__ = ["check", "losses", "write"]

_NAMESPACE: Final = "argparse.Namespace"
_TUPLES: Final = frozenset({"betas"})
_OWN_KEYS: Final = frozenset(
    {"args", "rng_state", "grad_scaler", "extra_state", "checkpoint_version", "optimizer", "model", PADDING_KEY}
)
_GROUP_DEFAULTS: Final = {"lr_mult": 1.0, "is_decoupled_lr": False}


def losses(state: State) -> list[str]:
    """Return what the format can not hold."""
    lost: list[str] = []
    if state.extra.get("extra_state"):
        lost.append("extra states of modules (Transformer Engine's fp8 scales)")
    if not isinstance(state.extra.get("args"), dict):
        lost.append("args: the source has none, so Megatron-LM can not compare them with the command line")
    if not state.of_kind("rng"):
        lost.append("random generators: the source has none, so Megatron-LM wants --no-load-rng")
    odd = [kind for kind in state.optimizer_kinds if kind != "step" and any(_is_odd(state, kind))]
    if odd:
        lost.append(f"optimizer states that are not of their parameter's shape: {', '.join(odd)}")
    return lost


def check(state: State, options: dict[str, Any]) -> None:
    """UsageError for names that are not Megatron's, nor in rules, and a layout that the model cannot be cut into."""
    _planned(state, options)


def write(state: State, target: Path, settings: Settings, *, identity: str, options: dict[str, Any]) -> None:
    """Write ``state`` into the run's folder ``target``: one iteration, and the tracker file that names it."""
    write_files(target, _planned(state, options), settings, identity=identity)
    write_whole(target / "latest_checkpointed_iteration.txt", str(state.step or 0).encode())
    remove_journal(target)


def _planned(state: State, options: dict[str, Any]) -> list[OutFile]:
    files: list[OutFile] = []
    check_names(state, options.get("rules"))
    try:
        plan = _Plan(state, options.get("layout", {}), options.get("rules"))
        for place in plan.places:
            files += plan.rank_files(place, f"iter_{state.step or 0:07d}/{_rank_name(plan.facts, place)}")
    except FormatError as error:  # sizes that the model can not be cut into
        raise UsageError(f"the layout does not fit the model: {error}") from error
    if left := sorted(plan.parts.keys() - plan.placed):
        raise UsageError(
            f"no pipeline stage has a place for {name_list(left, 5)}: there are more layers than the model's"
        )
    return files


def _rank_name(facts: Facts, place: Place) -> str:
    name = f"mp_rank_{place.tp:02d}"
    name += f"_{place.pp:03d}" if facts.pp > 1 else ""
    return name + (f"_{place.ep:03d}" if facts.ep > 1 else "")


def _is_odd(state: State, kind: str) -> Iterable[bool]:
    weights = state.of_kind("model")
    return (t.name not in weights or t.shape not in ((), weights[t.name].shape) for t in state.of_kind(kind).values())


@dataclass(slots=True)
class _File:
    """A torch.save file while it is put together: its storages so far."""

    storages: list[tuple[str, str, View]] = field(default_factory=list)

    def put(self, view: View) -> Call:
        key = str(len(self.storages))
        self.storages.append((key, key, view))
        return tensor_call(key, view.dtype, view.shape, view.nbytes)

    def finish(self, name: str, tree: Any) -> OutFile:
        archive = lay_out(dumps(tree), self.storages, prefix=Path(name).stem)
        return OutFile(
            name=name,
            nbytes=archive.nbytes,
            blocks=archive.blocks,
            tensors=archive.tensors,
            crc=True,
            finish=archive.finish,
        )


class _Plan:
    """The whole model's parts with the target's padding, and what each rank's files hold of them."""

    def __init__(self, state: State, layout: Mapping[str, int], rules: Rules | None) -> None:
        self.state = state
        self.extra = {name: tensor.view for name, tensor in state.of_kind("extra").items()}
        self.scalars: dict[str, Any] = {}
        saved = state.extra.get("args")
        fields = saved.get("fields", {}) if isinstance(saved, dict) else {}
        self.kinds = [kind for kind in (*state.optimizer_kinds, "fp32") if state.of_kind(kind)]
        self.old_args = fields
        self.args = target_args(state, fields, layout)
        self.facts = Facts({key: _thin(value) for key, value in self.args.items()}, "the target's args")
        if self.facts.ep > 1 and not self.facts.num_experts:
            raise UsageError(f"--layout ep={self.facts.ep}: the model has no experts to spread")
        self.rules = rules_for(self.facts, rules)
        self.padder = Padder(state, self.facts, self.rules)
        self.places = sorted(self.facts.places())
        self.parts = self._parts()
        self.order = order_of(self.parts)
        self.placed: set[str] = set()
        self.chains = self._chains()
        self.flat = self.facts.flag("use_distributed_optimizer")

    def _parts(self) -> dict[str, Part]:
        states: dict[str, dict[str, View]] = {}
        for kind in self.kinds:
            for name, tensor in self.state.of_kind(kind).items():
                states.setdefault(name, {})[kind] = tensor.view
        parts: dict[str, Part] = {}
        for kind in ("model", "buffer"):
            for name, tensor in self.state.of_kind(kind).items():
                part = Part(name, tensor.view, name, states.get(name, {}))
                if self.padder.pads(kind, name):
                    padded = {key: self.padder.padded(key, name, v) for key, v in part.states.items()}
                    part = Part(name, self.padder.padded("model", name, part.view), name, padded)
                elif is_fused(name) and self.facts.etp * self.facts.ep > 1:
                    raise UsageError(f"{name} holds all experts in one matrix; it is not cut for other expert ranks")
                parts[name] = part
        return parts

    def _chains(self) -> list[list[dict[str, Any]]]:
        """The groups of each chained optimizer: dense ones, and those of experts where expert ranks share them."""
        spread = self.facts.ep > 1 and any(map(is_expert, self.parts))
        chains: list[list[dict[str, Any]]] = [[], []] if spread else [[]]
        for group in self.state.param_groups:
            plain = group.get("wd_mult", 1.0 if group.get("weight_decay", 0.0) else 0.0)
            for experts in (False, True) if spread else (False,):
                names = [name for name in group["names"] if not spread or is_expert(name) == experts]
                values = {"wd_mult": plain, **_GROUP_DEFAULTS, **group, "is_expert_parallel": experts, "names": names}
                chain = chains[int(experts)]
                twin = next((g for g in chain if _values(g) == _values(values)), None)
                if twin is not None:
                    twin["names"] = [*twin["names"], *names]
                elif names or experts == group.get("is_expert_parallel", False):
                    chain.append(values)
        for i, chain in enumerate(chains):
            self._check_chain(chain, i == 1, spread)
        return chains if self.state.param_groups else []

    def _check_chain(self, chain: Sequence[Mapping[str, Any]], experts: bool, spread: bool) -> None:
        """Positions are all that ties the optimizer to parameters, so groups must be those that Megatron makes."""
        listed = {name for group in chain for name in group["names"]}
        members = [
            Member(name, self._shape_on_rank(name, part.view))
            for name, part in self.parts.items()
            if name in listed and (not spread or is_expert(name) == experts)
        ]
        found = by_rule(members, chain, self.facts) if chain else []
        if found is None or any(
            {member.name for member in mine} != set(group["names"]) for mine, group in zip(found, chain, strict=True)
        ):
            raise UsageError(
                "the parameter groups are not those that Megatron-LM makes (matrices with weight decay, vectors and "
                "biases without): it could not load them; convert with --only model"
            )

    def _shape_on_rank(self, name: str, view: View) -> tuple[int, ...]:
        """As many dimensions as tensor ranks have of it; a group goes by that."""
        ranks = self.facts.etp if is_expert(name) else self.facts.tp
        rule = self.rules.find("model", name)
        return (view.numel,) if rule is not None and rule.how == "flattened" and ranks > 1 else view.shape

    def rank_files(self, place: Place, folder: str) -> list[OutFile]:
        """Return the files of one rank."""
        facts = self.facts
        file = _File()
        number = facts.rank_of(place)
        chunks = rank_parts(self.parts, facts, self.rules, place, buffers=True, order=self.order)
        self.placed.update(part.name for chunk in chunks for part in chunk)
        tree: dict[str, Any] = {"args": self._pickled({"$object": _NAMESPACE, "fields": self.args}, file)}
        version = self.state.extra.get("checkpoint_version")
        tree["checkpoint_version"] = version if isinstance(version, (int, float)) and version >= 2 else 3.0
        tree["iteration"] = self.state.step or 0
        layers = facts.layers_of()
        for i, chunk in enumerate(chunks):
            first = sum(map(sum, layers[:i])) + sum(layers[i][: place.pp])
            tree["model" if len(chunks) == 1 else f"model{i}"] = self._model(chunk, first, place, file)
        trained = [[part for part in chunk if not is_buffer(part.name, part.view)] for chunk in chunks]
        flat: list[Any] = []
        if self.chains:
            optimizers = []
            for i, groups in enumerate(self.chains):
                mine = [self._of_chain(chunk, i) for chunk in trained]
                optimizers.append(self._optimizer(groups, mine, file))
                flat.append(mine if i or not place.ep else None)
            tree["optimizer"] = optimizers if len(optimizers) > 1 else optimizers[0]
        tree["rng_state"] = [self._rng(number, file)]
        for key, value in self.state.extra.items():
            if key not in _OWN_KEYS:
                tree[key] = self._pickled(value, file)
        if place == self.places[0]:
            tree[NOTE_KEY] = self._note(file)
        files = [file.finish(f"{folder}/model_optim_rng.pt", tree)]
        if self.flat and self.chains:
            files.append(self._flat_file(flat, place, f"{folder}/distrib_optim.pt"))
        return files

    def _of_chain(self, chunk: Sequence[Part], chain: int) -> list[Part]:
        listed = {name for group in self.chains[chain] for name in group["names"]}
        return [part for part in chunk if part.name in listed or (part.name == OUTPUT and EMBEDDING in listed)]

    def _model(self, chunk: Sequence[Part], first: int, place: Place, file: _File) -> Ordered:
        items: dict[str, Any] = {}
        experts = place.ep * self.facts.experts_per_rank
        for i, part in enumerate(chunk):
            at = layer_of(part.name)
            local = renumbered(part.name, {at[0]: -first} if at else {}, -experts)
            items[local] = file.put(part.view)
            module = local.rpartition(".")[0]
            following = chunk[i + 1].name if i + 1 < len(chunk) else ""
            if module.rpartition(".")[2].startswith(("linear_", "output_layer")) and (
                part.name.rpartition(".")[0] != following.rpartition(".")[0]
            ):
                items[f"{module}._extra_state"] = None
        last = place.pp == self.facts.pp - 1 and any(name.startswith("decoder.final") for name in items)
        if last and self.facts.tied and OUTPUT not in items:
            items["output_layer._extra_state"] = None
        return Ordered(items)

    def _optimizer(self, groups: Sequence[Mapping[str, Any]], chunks: Sequence[Sequence[Part]], file: _File) -> Any:
        parts = {part.name: part for chunk in chunks for part in chunk}
        scaler = self.state.extra.get("grad_scaler")
        wrapper = {} if scaler is None else {"grad_scaler": self._pickled(scaler, file)}
        members = self._members(groups, parts)
        pickled: list[dict[str, Any]] = []
        states: dict[int, dict[str, Any]] = {}
        masters: list[list[Any]] = []
        count = 0
        for group, mine in zip(groups, members, strict=True):
            values = self._hyperparameters(group, file)
            step = self._group_step(group["names"])
            if step is not None:
                values["step"] = step
            if not self.flat:
                values["params"] = list(range(count, count + len(mine)))
                masters.append([file.put(part.states["fp32"]) for part in mine if "fp32" in part.states])
                for part in mine:
                    fields = {
                        kind: file.put(view)
                        for kind, view in part.states.items()
                        if kind != "fp32" and not (kind == "step" and step is not None)
                    }
                    if fields:
                        states[count] = fields
                    count += 1
            pickled.append(values)
        inner: dict[str, Any] = {"param_groups": pickled} if self.flat else {"state": states, "param_groups": pickled}
        if self.flat:
            return {"optimizer": inner, **wrapper}
        if self.state.of_kind("fp32"):
            return {"optimizer": inner, "fp32_from_fp16_params": masters, **wrapper}
        return {"optimizer": inner, **wrapper} if wrapper else inner

    def _members(self, groups: Sequence[Mapping[str, Any]], parts: Mapping[str, Part]) -> list[list[Part]]:
        result: list[list[Part]] = []
        for group in groups:
            names = set(group["names"])
            names |= {OUTPUT} if EMBEDDING in names and OUTPUT in self.state.tied else set()
            result.append([part for name, part in parts.items() if name in names])
        return result

    def _hyperparameters(self, group: Mapping[str, Any], file: _File) -> dict[str, Any]:
        values = {key: self._pickled(value, file) for key, value in group.items() if key != "names"}
        return {key: tuple(v) if key in _TUPLES and isinstance(v, list) else v for key, v in values.items()}

    def _group_step(self, names: Sequence[str]) -> Any:
        """FusedAdam and the distributed optimizer keep the step in the group; torch's AdamW in each state."""
        steps = self.state.of_kind("step")
        mine = [steps[name] for name in names if name in steps] or list(steps.values())
        if not mine or not (self.flat or all(step.dtype == "int64" for step in mine)):
            return None
        values = {self._value(step.view, step.name) for step in mine}
        if len(values) > 1:
            raise UsageError("parameters of one group have different steps, which Megatron's optimizer can not hold")
        return values.pop()

    def _value(self, view: View, name: str) -> Any:
        if name not in self.scalars:
            self.scalars[name] = plain_value(view)
        return self.scalars[name]

    def _rng(self, rank: int, file: _File) -> dict[str, Any]:
        """Generators of ``rank``; a rank that the source did not have takes those of one that it had."""
        known = self._ranks_with_generators()
        owner = str(rank if rank in known or not known else known[rank % len(known)])
        result: dict[str, Any] = {}
        for key, value in self._other_generators().get(owner, {}).items():
            pickled = self._pickled(value, file)
            result[key] = _tuples(pickled) if key in ("random_rng_state", "np_rng_state") else pickled
        for name, tensor in self.state.of_kind("rng").items():
            mine, _, device = name.partition("/")
            if mine == owner and not device:
                result["torch_rng_state"] = file.put(tensor.view)
            elif mine == owner and device == "cuda":
                result["cuda_rng_state"] = file.put(tensor.view)
            elif mine == owner and device.startswith("cuda/"):
                result.setdefault("rng_tracker_states", {})[device[5:]] = file.put(tensor.view)
        return result

    def _ranks_with_generators(self) -> list[int]:
        owners = {name.partition("/")[0] for name in self.state.of_kind("rng")} | set(self._other_generators())
        return sorted(int(owner) for owner in owners if owner.isdigit())

    def _other_generators(self) -> dict[str, Any]:
        kept = self.state.extra.get("rng_state")
        return kept if isinstance(kept, dict) else {}

    def _note(self, file: _File) -> dict[str, Any]:
        """What Megatron has no place for: generators of ranks that the target has not, and args that were changed."""
        ranks = {str(self.facts.rank_of(place)) for place in self.places}
        generators: dict[str, Any] = {}
        for name, tensor in self.state.of_kind("rng").items():
            owner, _, device = name.partition("/")
            if owner not in ranks or not (device in ("", "cuda") or device.startswith("cuda/")):
                generators[name] = file.put(tensor.view)
        others = {key: self._pickled(v, file) for key, v in self._other_generators().items() if key not in ranks}
        old = self.old_args
        note: dict[str, Any] = {}
        if not self.padder.keeps_all():
            note[PADDING_KEY] = self._pickled(self.state.extra.get(PADDING_KEY), file)
        return {
            **note,
            "version": 1,
            "step": self.state.step,
            "rng": generators,
            "rng_added": sorted(ranks - set(map(str, self._ranks_with_generators()))),
            "rng_state": others,
            "args": {key: self._pickled(old[key], file) for key in old if old[key] != self.args[key]},
            "args_added": [key for key in self.args if key not in old],
            "param_groups": [
                {k: self._pickled(v, file) for k, v in group.items()} for group in self.state.param_groups
            ],
            "source": self._pickled(self.state.source, file),
        }

    def _flat_file(self, chains: Sequence[Any], place: Place, name: str) -> OutFile:
        file = _File()
        trees = [None if chunks is None else self._flat(chunks, place, file) for chunks in chains]
        return file.finish(name, trees if len(trees) > 1 else trees[0])

    def _flat(self, chunks: Sequence[Sequence[Part]], place: Place, file: _File) -> dict[Any, Any]:
        tree: dict[Any, Any] = {"buckets_coalesced": True}
        for i, parts in enumerate(buffers_of(chunks)):
            offsets, total = next(layouts(parts, self.facts, place.pp))
            dtype = parts[0].view.dtype
            grads = "float32" if self.facts.flag("accumulate_allreduce_grads_in_fp32") else dtype
            values: dict[str, Any] = {}
            for saved, kind in (("param", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
                flats = [part.states.get(kind, part.view) if kind == "fp32" else part.states[kind] for part in parts]
                values[saved] = file.put(_flat_view(flats[::-1], offsets, total))
            values["numel_unpadded"] = total
            tree[i] = {(Name("torch", dtype), Name("torch", grads)): values}
        return tree

    def _pickled(self, value: Any, file: _File) -> Any:
        """JSON of plain.py as values for a pickle; frameworks' objects under their own names again."""
        if isinstance(value, list):
            return [self._pickled(item, file) for item in value]
        if not isinstance(value, dict):
            return value
        if "$object" in value:
            return self._object(value, file)
        if len(value) == 1:
            ((key, item),) = value.items()
            if key == "$tensor":
                return file.put(self.extra[item])
            if key == "$dtype":
                return Name("torch", item)
            if key == "$items":
                return {_key(self._pickled(k, file)): self._pickled(v, file) for k, v in item}
            if key.startswith("$"):
                return from_json(value, {})
        return {key: self._pickled(item, file) for key, item in value.items()}

    def _object(self, value: Mapping[str, Any], file: _File) -> Any:
        module, _, name = str(value["$object"]).rpartition(".")
        target = Name(module, name)
        if "fields" in value or name == "Namespace":
            fields = value.get("fields", {})
            return Instance(target, {key: self._pickled(item, file) for key, item in fields.items()})
        if "member" in value:  # of an enum, as Python 3.11.0 to 3.11.3 save them; any reads that
            return Call(Name("builtins", "getattr"), (target, value["member"]))
        return Call(target, tuple(self._pickled(item, file) for item in value["args"])) if "args" in value else target


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "names"}


def _thin(value: Any) -> Any:
    return None if isinstance(value, (dict, list)) else value


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: Any) -> Any:
    """random.setstate wants tuples where JSON has lists."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _flat_view(flats: Sequence[View], offsets: Sequence[int], total: int) -> View:
    pieces: list[tuple[Sequence[int], View]] = []
    at = 0
    for view, begin in zip(flats, offsets, strict=True):
        if begin > at:
            pieces.append(((at,), Filled(view.dtype, (begin - at,))))
        pieces.append(((begin,), Reshaped(view, (view.numel,))))
        at = begin + view.numel
    if total > at:
        pieces.append(((at,), Filled(flats[0].dtype, (total - at,))))
    return Joined(flats[0].dtype, (total,), pieces)
