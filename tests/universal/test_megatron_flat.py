"""Megatron's flat gradient buffers: what is told of them by sizes and by the weights beside them."""

from __future__ import annotations

import numpy as np
import pytest

from snapshotd.errors import FormatError
from snapshotd.universal.globals import StorageRef, TensorRef
from snapshotd.universal.readers.megatron_facts import Facts, Place
from snapshotd.universal.readers.megatron_flat import Part, put_coalesced
from snapshotd.universal.sources import BytesSource
from snapshotd.universal.views import read_all, stored_bytes

SHAPES = {"decoder.layers.0.a": (5, 7), "decoder.layers.0.b": (9,), "decoder.layers.1.a": (5, 7), "c": (70,)}


def parts_of(seed: int) -> list[Part]:
    random = np.random.default_rng(seed)
    return [
        Part(name, stored_bytes(random.random(shape, dtype=np.float32).tobytes(), "float32", shape))
        for name, shape in SHAPES.items()
    ]


def buffer_of(parts: list[Part]) -> dict[object, object]:
    """The file's buffer: last parameter first, each at a multiple of 64, the moments 1 and 2 higher."""
    flat = np.zeros(0, np.float32)
    for part in reversed(parts):
        flat = np.concatenate([flat, np.zeros(-len(flat) % 64, np.float32), _numbers(part)])
    kinds = {kind: flat + add for add, kind in enumerate(("param", "exp_avg", "exp_avg_sq"))}
    values = {kind: _ref(array) for kind, array in kinds.items()}
    return {0: {("float32", "float32"): {**values, "numel_unpadded": flat.size}}, "buckets_coalesced": True}


def _numbers(part: Part) -> np.ndarray:
    return read_all(part.view).view(np.float32).reshape(-1)


def _ref(array: np.ndarray) -> TensorRef:
    data = array.astype(np.float32).tobytes()
    storage = StorageRef(BytesSource(data, "distrib_optim.pt"), "0", "float32", len(data), 0, "cpu")
    return TensorRef(storage, "float32", 0, array.shape, (1,))


@pytest.mark.parametrize("frozen", [(), ("c",), ("decoder.layers.0.a",), ("decoder.layers.0.b", "decoder.layers.1.a")])
def test_frozen_parameters_are_in_no_buffer(frozen: tuple[str, ...]) -> None:
    """Their neighbours' moments would be shifted, or the checkpoint refused."""
    parts = parts_of(1)
    trained = [part for part in parts if part.name not in frozen]
    assert None is put_coalesced([parts], buffer_of(trained), Facts({}, "args"), 0, "file")
    assert [part.name for part in trained] == [part.name for part in parts if part.states]
    for part in trained:
        moment = read_all(part.states["exp_avg"]).view(np.float32).reshape(-1)
        assert np.array_equal(_numbers(part) + np.float32(1), moment)


def test_stages_may_be_mapped_before_replicas() -> None:
    """Each rank's generators would go to another rank."""
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "world_size": 8}
    usual, mapped = Facts(sizes, "args"), Facts({**sizes, "use_tp_pp_dp_mapping": True}, "args")
    assert (4, 5, 2) == (usual.rank_of(Place(1, 0, 0)), usual.rank_of(Place(1, 1, 0)), usual.rank_at(0, 0, 1))
    assert (2, 3, 4) == (mapped.rank_of(Place(1, 0, 0)), mapped.rank_of(Place(1, 1, 0)), mapped.rank_at(0, 0, 1))


def test_a_buffer_of_another_model_is_refused() -> None:
    with pytest.raises(FormatError, match="another model or another iteration"):
        put_coalesced([parts_of(1)], buffer_of(parts_of(2)[:-1]), Facts({}, "args"), 0, "file")
