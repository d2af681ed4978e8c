"""Plans against brute force: fill global arrays, cut them up, reshard, and compare each element."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapshotd.errors import LayoutError, Unrecoverable
from snapshotd.layout import Box, Shard, TensorBox
from snapshotd.reshard import Copy, Key, Planner, TargetShard, apply_copy, merge_neighbours

NUMPY = {"float32": np.uint32, "bfloat16": np.uint16, "int64": np.uint64, "uint8": np.uint8}


def tensor(
    name: str, shape: tuple[int, ...], box: Box | None = None, *, dtype: str = "float32", scope: str = "global"
) -> TensorBox:
    return TensorBox(
        name=name,
        dtype=dtype,
        global_shape=shape,
        box=box or Box.whole(shape),
        scope=scope,  # type: ignore[arg-type]
        kind="param",
    )


class SourceShard(NamedTuple):
    """A tensor box that is there: at byte offset ``begin`` of the file ``source``."""

    source: int
    tensor: TensorBox
    begin: int


class Listed(list[tuple[int, Shard]]):
    """The sources of a tensor."""

    @property
    def likeness(self) -> Hashable:
        return tuple((rank, box.dtype, box.global_shape, box.box) for rank, (box, *_) in self)

    @classmethod
    def of(cls, shards: Iterable[SourceShard]) -> Listed | None:
        found = cls((rank, Shard(box, box.name, begin, begin + box.nbytes)) for rank, box, begin in shards)
        return found or None


def source(rank: int, box: TensorBox, begin: int = 0) -> SourceShard:
    return SourceShard(source=rank, tensor=box, begin=begin)


def target(rank: int, box: TensorBox, begin: int = 0) -> TargetShard:
    return TargetShard(target=rank, tensor=box, box=box.box, begin=begin)


def rows(name: str, size: int, begin: int, end: int) -> TensorBox:
    return tensor(name, (size, 2), Box((begin, 0), (end - begin, 2)))


def plan(
    sources: Iterable[SourceShard],
    targets: Sequence[TargetShard],
    *,
    prefer: Callable[[int], int] | None = None,
    rank_source: Mapping[int, int] | None = None,
) -> list[Copy]:
    """All at once, by a planner of its own."""
    groups: dict[Key, list[SourceShard]] = {}
    for shard in sources:
        key = (shard.tensor.name, shard.source if shard.tensor.scope == "rank" else None)
        groups.setdefault(key, []).append(shard)
    planner = Planner(lambda key: Listed.of(groups.get(key, ())), prefer or (lambda source: 0))
    return planner.plan(targets, rank_source)


def read(copies: Iterable[Copy]) -> set[int]:
    """The sources that are read."""
    return {copy.source for copy in copies}


# --- brute force ---


@dataclass
class World:
    """One file per rank, filled as a capture would; ``wanted`` cuts the same tensors for a restore."""

    arrays: dict[str, np.ndarray]
    tensors: dict[str, TensorBox]
    files: dict[int, bytearray] = field(default_factory=dict)

    def part(self, name: str, box: Box) -> bytes:
        index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))
        return np.ascontiguousarray(self.arrays[name][index]).tobytes()

    def captured(self, cuts: list[tuple[int, str, Box]]) -> list[SourceShard]:
        shards = []
        for rank, name, box in cuts:
            file = self.files.setdefault(rank, bytearray(random.Random(rank).randbytes(rank % 5)))
            shards.append(source(rank, replace(self.tensors[name], box=box), len(file)))
            file += self.part(name, box)
        return shards

    def wanted(self, cuts: list[tuple[int, str, Box]]) -> tuple[list[TargetShard], dict[int, bytearray]]:
        shards, ends = [], {}
        for rank, name, box in cuts:
            begin = ends.setdefault(rank, 3)
            shards.append(target(rank, replace(self.tensors[name], box=box), begin))
            ends[rank] = begin + shards[-1].nbytes
        return shards, {rank: bytearray(b"\xee" * end) for rank, end in ends.items()}

    def check(self, made: list[Copy], targets: list[TargetShard], files: dict[int, bytearray]) -> None:
        written = {rank: np.zeros(len(file), np.uint8) for rank, file in files.items()}
        for copy in made:
            for _, dst, size in copy.runs():
                written[copy.target][dst : dst + size] += 1
            apply_copy(copy, self.files[copy.source], files[copy.target])
        for shard in targets:
            end = shard.begin + shard.tensor.nbytes
            assert bytes(files[shard.target][shard.begin : end]) == self.part(shard.tensor.name, shard.tensor.box)
            assert (written[shard.target][shard.begin : end] == 1).all()
            written[shard.target][shard.begin : end] = 0
        assert not any(counts.any() for counts in written.values())


def random_world(random_: random.Random, num_tensors: int) -> World:
    arrays, tensors = {}, {}
    for i in range(num_tensors):
        shape = tuple(random_.choice([0, 1, 2, 3, 4, 5, 7]) for _ in range(random_.choice([0, 1, 1, 2, 2, 2, 3, 4])))
        dtype = random_.choice(sorted(NUMPY))
        tensors[f"t{i}"] = tensor(f"t{i}", shape, dtype=dtype)
        data = random_.randbytes(tensors[f"t{i}"].nbytes)
        arrays[f"t{i}"] = np.frombuffer(data, NUMPY[dtype]).reshape(shape)
    return World(arrays, tensors)


def split(box: Box, d: int, parts: int, random_: random.Random) -> list[Box]:
    """Cut a box on one dimension: evenly with a short or empty rest as torch does, or anywhere."""
    size = box.lengths[d]
    if random_.random() < 0.5:
        chunk = -(-size // parts)
        edges = [min(i * chunk, size) for i in range(parts + 1)]
    else:
        edges = [0, *sorted(random_.randint(0, size) for _ in range(parts - 1)), size]
    return [
        Box(
            (*box.offsets[:d], box.offsets[d] + a, *box.offsets[d + 1 :]),
            (*box.lengths[:d], b - a, *box.lengths[d + 1 :]),
        )
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def mesh_cut(box: Box, mesh: list[int], random_: random.Random) -> list[Box]:
    """Shard over each mesh dimension in turn, the same tensor dimension perhaps twice, or replicate over it."""
    boxes = [box]
    for size in mesh:
        if not box.ndim or random_.random() < 0.25:
            boxes = [b for b in boxes for _ in range(size)]
        else:
            d = random_.randrange(box.ndim)
            boxes = [part for b in boxes for part in split(b, d, size, random_)]
    return boxes


def mesh_cuts(world: World, random_: random.Random) -> list[tuple[int, str, Box]]:
    mesh = random_.choice([[1], [2], [3], [4], [2, 2], [2, 3], [3, 2], [2, 2, 2]])
    cuts = []
    for name, whole in world.tensors.items():
        cuts += [(rank, name, box) for rank, box in enumerate(mesh_cut(whole.box, mesh, random_))]
    return sorted(cuts, key=lambda cut: cut[0])


@pytest.mark.parametrize("seed", range(10))
def test_random_meshes(seed: int) -> None:
    """Any parallel layout to any other: what users buy an elastic restore for."""
    random_ = random.Random(seed)
    for _ in range(150):
        world = random_world(random_, random_.randint(1, 3))
        sources = world.captured(mesh_cuts(world, random_))
        targets, files = world.wanted(mesh_cuts(world, random_))
        random_.shuffle(sources)
        local = random_.randint(0, 4)
        made = plan(
            sources,
            targets,
            prefer=random_.choice([None, lambda rank, local=local: int(rank != local)]),
        )
        if random_.random() < 0.5:  # as if each target were one file
            made = merge_neighbours(made)
        world.check(made, targets, files)
        assert sum(copy.nbytes for copy in made) == sum(shard.tensor.nbytes for shard in targets)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_heap_of_boxes(data: st.DataObject) -> None:
    """Boxes that no mesh would give, overlapping in any way: covered exactly, or refused and rightly so."""
    ndim = data.draw(st.integers(0, 3))
    shape = tuple(data.draw(st.integers(1, 5)) for _ in range(ndim))
    random_ = random.Random(data.draw(st.integers(0, 2**32)))
    whole = tensor("t", shape)
    world = World({"t": np.frombuffer(random_.randbytes(whole.nbytes), np.uint32).reshape(shape)}, {"t": whole})

    def any_box() -> Box:
        offsets = tuple(random_.randint(0, size) for size in shape)
        return Box(offsets, tuple(random_.randint(0, n - o) for n, o in zip(shape, offsets, strict=True)))

    cuts = [(rank, "t", any_box()) for rank in range(data.draw(st.integers(1, 9)))]
    if data.draw(st.booleans()):
        cuts.append((9, "t", Box.whole(shape)))
    sources = world.captured(cuts)
    targets, files = world.wanted([(rank, "t", any_box()) for rank in range(3)])
    there = np.zeros(shape, int)
    for _, _, box in cuts:
        there[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))] += 1
    covered = all(
        there[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))].all()
        for box in (shard.tensor.box for shard in targets)
    )
    try:
        made = plan(sources, targets, prefer=lambda rank: rank % 3)
    except Unrecoverable:
        assert not covered
    else:
        assert covered
        world.check(made, targets, files)


# --- choices ---


def test_local_bytes_are_preferred_and_the_rest_is_split() -> None:
    """Each byte that is taken from a peer without need delays the restart."""
    sources = [source(0, rows("w", 8, 0, 8)), source(1, rows("w", 8, 2, 5), 100)]
    made = plan(sources, [target(1, rows("w", 8, 0, 8))], prefer=lambda rank: int(rank != 1))
    assert [(copy.source, copy.src_begin, copy.dst_begin, copy.run_bytes) for copy in made] == [
        (0, 0, 0, 16), (1, 100, 16, 24), (0, 40, 40, 24)
    ]  # fmt: skip
    assert read(made) == {0, 1}
    assert read(plan(sources, [target(1, rows("w", 8, 0, 8))])) == {0}


def test_equal_replicas_do_not_depend_on_order() -> None:
    sources = [source(rank, rows("w", 4, 0, 4)) for rank in (3, 1, 2)]
    assert read(plan(sources, [target(9, rows("w", 4, 0, 4))])) == {1}
    assert read(plan(sources[::-1], [target(9, rows("w", 4, 0, 4))])) == {1}


def test_pieces_of_one_source_are_joined_again() -> None:
    sources = [source(0, rows("w", 8, 0, 3), 0), source(0, rows("w", 8, 3, 8), 24)]
    assert len(plan(sources, [target(0, rows("w", 8, 1, 7))])) == 1


def test_same_world_is_one_copy_per_file() -> None:
    shards = [rows("a", 4, 0, 2), rows("b", 4, 0, 2), tensor("step", (), dtype="int64")]
    begins = [0, 16, 32]
    sources = [source(0, shard, begin) for shard, begin in zip(shards, begins, strict=True)]
    targets = [target(5, shard, begin) for shard, begin in zip(shards, begins, strict=True)]
    assert len(plan(sources, targets)) == 3
    (copy,) = merge_neighbours(plan(sources, targets))
    assert (copy.src_begin, copy.dst_begin, copy.run_bytes, copy.dims) == (0, 0, 40, ())


def test_many_tensors_at_once_are_planned_as_each_alone() -> None:
    """What is planned once for tensors alike must differ where they do: element size, sources, order, places, holes."""
    dice = random.Random(8)
    sources: list[SourceShard] = []
    targets: list[TargetShard] = []
    for number in range(300):
        shape = dice.choice([(8, 4), (8, 4), (12,), (6, 2, 2)])
        dtype, scope = dice.choice(["float32", "float32", "int64", "uint8"]), dice.choice(["global", "global", "rank"])
        cuts = dice.choice([(0, 1.0), (0, 0.5, 1.0), (0, 0.25, 0.5, 1.0)])
        ranks = dice.sample(range(4), len(cuts) - 1) + [dice.randrange(4)]
        for rank, low, high in zip(ranks, cuts, cuts[1:], strict=False):
            begin, end = int(low * shape[0]), int(high * shape[0])
            box = Box((begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:]))
            part = tensor(f"t{number}", shape, box, dtype=dtype, scope=scope)
            sources.append(source(rank, part, dice.randrange(1000) * 8))
            if dice.random() < 0.3:
                sources.append(source(dice.randrange(4), part, dice.randrange(1000) * 8))  # a replica
            if dice.random() < 0.8:
                targets.append(target(rank, part, dice.randrange(1000) * 8))
        if scope == "global":
            middle = Box((shape[0] // 3, *(0 for _ in shape[1:])), (shape[0] // 2, *shape[1:]))
            targets.append(target(5, tensor(f"t{number}", shape, middle, dtype=dtype), dice.randrange(1000) * 8))
    dice.shuffle(sources)

    def made(some: list[TargetShard]) -> list[Copy]:
        return plan(sources, some, prefer=lambda rank: int(rank == 2))

    assert len(targets) > 500
    assert made(targets) == [copy for one in targets for copy in made([one])]

    def find(key: Key) -> Listed | None:
        name, rank = key
        there = [shard for shard in sources if shard.tensor.name == name]
        return Listed.of(shard for shard in there if rank in (None, shard.source))

    planner = Planner(find, lambda rank: int(rank == 2))
    for _ in range(2):  # what is known by now gives the same
        assert made(targets) == [copy for one in targets for copy in planner.plan([one])]


def test_rank_private_tensors_come_from_their_own_rank() -> None:
    """Two ranks with the same RNG state would draw the same dropout masks."""
    sources = [
        source(rank, tensor("rng", (4 + rank, *[1] * rank), dtype="uint8", scope="rank"), rank) for rank in range(4)
    ]
    targets = [target(rank, replace(sources[rank].tensor)) for rank in (2, 3)]
    assert [(copy.source, copy.target) for copy in plan(sources, targets)] == [(2, 2), (3, 3)]
    moved = [target(10, sources[1].tensor), target(11, sources[0].tensor)]
    assert [copy.source for copy in plan(sources, moved, rank_source={10: 1, 11: 0})] == [1, 0]
    with pytest.raises(LayoutError, match="rank_source names no source for target 11, which wants rng"):
        plan(sources, moved, rank_source={10: 1})
    with pytest.raises(LayoutError, match=r"rng \(private to source 7\)"):
        plan(sources, [target(7, sources[0].tensor)])
    with pytest.raises(LayoutError, match="in no source: rng"):
        plan(sources, [target(0, tensor("rng", (4,), dtype="uint8"))])


def test_nothing_wanted_needs_nothing() -> None:
    """Uneven sharding leaves ranks without a part, and a capture may leave out what has no bytes."""
    assert plan([], []) == []
    assert plan([], [target(0, rows("w", 4, 4, 4))]) == []
    assert plan([source(0, rows("w", 4, 0, 4))], [target(0, rows("w", 4, 4, 4))]) == []
    assert plan([source(0, tensor("e", (0, 3)))], [target(0, tensor("e", (0, 3)))]) == []


# --- refusals ---


def test_absent_tensors_are_named_but_not_all() -> None:
    targets = [target(0, rows(f"w{i}", 4, 0, 4)) for i in range(13)]
    with pytest.raises(LayoutError, match=r"13 wanted tensors are in no source: w0, .*, w9 and 3 more$"):
        plan([source(0, rows("v", 4, 0, 4))], targets)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            tensor("w", (4, 2), dtype="bfloat16"),
            r"w is float32 \[4, 2\] in target 3, but bfloat16 \[4, 2\] in source 7",
        ),
        (tensor("w", (4, 3)), r"but float32 \[4, 3\] in source 7"),
        (tensor("w", (8,)), r"but float32 \[8\] in source 7"),
    ],
)
def test_different_tensors_are_refused(there: TensorBox, message: str) -> None:
    """The right bytes at the wrong shape are wrong bytes."""
    with pytest.raises(LayoutError, match=message):
        plan([source(7, there)], [target(3, rows("w", 4, 0, 4))])
    with pytest.raises(LayoutError, match=message):
        plan([source(6, rows("w", 4, 0, 4)), source(7, there)], [target(3, rows("w", 4, 0, 4))])


def test_uncovered_regions_are_named() -> None:
    with pytest.raises(Unrecoverable, match=r"w \[9, 2\] in target 0 lacks \[2:4, 0:2\], \[6:8, 0:2\] \(8 elements\)"):
        plan(
            [source(0, rows("w", 9, 0, 2)), source(1, rows("w", 9, 4, 6)), source(2, rows("w", 9, 8, 9))],
            [target(0, rows("w", 9, 1, 9))],
        )


# --- size ---


@pytest.mark.timeout(60)
def test_six_hundred_tensors_from_sixty_four_sources_are_planned_in_seconds() -> None:
    """Planning is part of the pause that users see; what grows with the square of the tensors takes minutes."""

    def world(size: int, dim: int) -> list[tuple[int, TensorBox]]:
        shards = []
        for rank in range(size):
            edges = [1000 * i // size for i in (rank, rank + 1)]
            offsets, lengths = [0, 0], [1000, 1000]
            offsets[dim], lengths[dim] = edges[0], edges[1] - edges[0]
            box = Box(tuple(offsets), tuple(lengths))
            shards += [(rank, tensor(f"layers.{i}.weight", (1000, 1000), box)) for i in range(600)]
        return shards

    sources = [source(rank, box) for rank, box in world(64, 0)]
    one = [target(rank, box) for rank, box in world(48, 0) if rank == 5]
    made = plan(sources, one)
    assert sum(copy.nbytes for copy in made) == sum(shard.tensor.nbytes for shard in one)
    whole = [target(0, box) for _, box in world(1, 1)]
    assert len(plan(sources, whole)) == 600 * 64
