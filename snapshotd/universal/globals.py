"""
The closed list: every name that a checkpoint's pickle may use, and the stand-in that it becomes.

Frameworks' classes become ``Record``s that remember their name. To read one more class of a framework, add its full
name to ``_RECORDS`` (an enum's to ``_ENUMS``) here; to read one more function, write a stand-in that checks its
arguments.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any, Final

import numpy as np

from snapshotd.errors import FormatError
from snapshotd.layout.box import Box
from snapshotd.layout.dtypes import DTYPES
from snapshotd.universal.sources import Source
from snapshotd.universal.standins import Constant, Global, Record, UnsafePickle
from snapshotd.universal.views import Stored

__all__ = ["GLOBALS", "NumpyArray", "StorageRef", "StorageType", "TensorRef", "TorchDType"]


class TorchDType(str):
    """A torch dtype that stood in a pickle as a value: its name without ``torch.``."""

    __slots__ = ()


class StorageType:
    """``torch.FloatStorage`` and its kin: ``dtype`` is None for the untyped one."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: str | None) -> None:
        self.dtype = dtype


_RANGE_MAX: Final = 1_000_000

_EXPANDED_BYTES_MAX: Final = 1 << 30
"""A tensor larger than its storage (stride 0) may have this much: a file of 1 KB could fill any disk."""


class StorageRef:
    """
    A storage: bytes ``[begin, begin + nbytes)`` of ``source``.

    ``begin`` is -1 while it is not known (the legacy format gives the bytes after the pickle).
    """

    __slots__ = ("begin", "dtype", "key", "location", "nbytes", "source")

    def __init__(self, source: Source, key: str, dtype: str | None, nbytes: int, begin: int, location: str) -> None:
        self.source, self.key, self.dtype, self.nbytes, self.begin = source, key, dtype, nbytes, begin
        self.location = location


class TensorRef:
    """
    A tensor in a torch file: a strided part of a storage. ``view`` reads it. Two with equal ``identity`` are one.
    """

    __slots__ = ("dtype", "offset", "parameter", "requires_grad", "shape", "storage", "strides")

    def __init__(
        self, storage: StorageRef, dtype: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.dtype, self.offset, self.shape, self.strides = storage, dtype, offset, shape, strides
        self.requires_grad = False
        self.parameter = False

    @property
    def view(self) -> Stored:
        item = DTYPES[self.dtype].itemsize
        begin = self.storage.begin + self.offset * item if self.storage.begin >= 0 else 0
        return Stored(self.storage.source, begin, self.dtype, self.shape, self.strides)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def identity(self) -> tuple[object, ...]:
        return self.storage.source.label, self.storage.key, self.dtype, self.offset, self.shape, self.strides

    def __repr__(self) -> str:
        return f"TensorRef({self.dtype}, {list(self.shape)})"


class NumpyDType:
    """A numpy dtype under construction: plain numbers only."""

    __slots__ = ("value",)

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        value = np.dtype(text) if isinstance(text, str) and len(text) <= 4 else np.dtype("O")
        if value.hasobject or value.kind not in "biufcSUV" or value.itemsize > 1 << 20:
            raise FormatError(f"a numpy array of {text!r:.40} is not numbers")
        self.value = value

    def pickle_state(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.value = self.value.newbyteorder(state[1])


class NumpyArray:
    """A numpy array under construction; ``value`` is the array."""

    __slots__ = ("value",)

    def __init__(self, kind: Any = None, shape: Any = (0,), code: Any = b"b") -> None:
        self.value: np.ndarray[Any, np.dtype[Any]] = np.empty(0, np.uint8)

    def pickle_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        shape = _sizes(shape)
        if not isinstance(dtype, NumpyDType) or not isinstance(data, bytes):
            raise FormatError("a numpy array that is not numbers")
        if prod(shape) * dtype.value.itemsize != len(data):
            raise FormatError(f"a numpy array of shape {shape} with {len(data)} bytes")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise FormatError(f"sizes that are none: {value!r:.80}")
    return Box.whole(tuple(value)).lengths  # checks each


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, dtype: str | None = None
) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise FormatError("a tensor without a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise FormatError("a tensor of unknown dtype")
    label = storage.source.label
    shape, strides = _sizes(size), _sizes(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise FormatError(f"{label}: a tensor of shape {shape}, strides {strides}, offset {offset!r:.40}")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * DTYPES[dtype].itemsize > storage.nbytes:
        raise FormatError(
            f"{label}: a tensor of {dtype} {list(shape)} reaches element {last} of storage {storage.key}, which has "
            f"{storage.nbytes} bytes"
        )
    if (nbytes := prod(shape) * DTYPES[dtype].itemsize) > max(_EXPANDED_BYTES_MAX, storage.nbytes):
        raise FormatError(
            f"{label}: a tensor of {list(shape)} repeats the {storage.nbytes} bytes of its storage until "
            f"they are {nbytes}: save it without expand()"
        )
    tensor = TensorRef(storage, dtype, offset, shape, strides)
    tensor.requires_grad = bool(requires_grad)
    return tensor


def _rebuild_v1(storage: Any, offset: Any, size: Any, stride: Any) -> TensorRef:
    return _tensor(storage, offset, size, stride, False)


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef:
    _refuse_lazy(storage, metadata)
    return _tensor(storage, offset, size, stride, requires_grad)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRef:
    if not isinstance(dtype, TorchDType):
        raise FormatError("a tensor whose dtype is none")
    _refuse_lazy(storage, metadata)
    return _tensor(storage, offset, size, stride, requires_grad, str(dtype))


def _refuse_lazy(storage: Any, metadata: Any) -> None:
    """FormatError for a tensor whose signs are to be turned when it is read: its bytes are not its values."""
    marks = [mark for mark in ("conj", "neg") if isinstance(metadata, dict) and metadata.get(mark)]
    if marks:
        label = storage.source.label if isinstance(storage, StorageRef) else "a file"
        raise FormatError(
            f"{label}: a tensor was saved with the mark {marks[0]!r}, so its bytes are not its values: save it with "
            ".resolve_conj().resolve_neg()"
        )


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise FormatError("a parameter without a tensor")
    data.parameter, data.requires_grad = True, bool(requires_grad)
    return data


def _rebuild_from_type(func: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(func, Global) or not isinstance(args, tuple):
        raise FormatError("a tensor of a type that is not rebuilt by a function of torch")
    return func(args)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise FormatError(f"a text that is encoded as {encoding!r:.40}")
    return text.encode(encoding)


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    if not isinstance(kind, Global):
        raise FormatError("an object of no class")
    return kind(())


def _member(kind: Any, name: Any) -> Record:
    """An enum's member, as Python 3.11.0 to 3.11.3 save it: the only attribute that can be asked for."""
    if not isinstance(kind, Global) or kind.name not in _ENUMS or not isinstance(name, str):
        raise UnsafePickle("refused, because it asks for an attribute of what is no enum that checkpoints have")
    if not name.isidentifier() or name.startswith("_"):
        raise UnsafePickle(f"refused, because it asks for {name[:100]!r} of {kind.name}, which is no member's name")
    values = _ENUMS[kind.name]
    return Record(kind.name, (values[name],)) if name in values else Record(kind.name, member=name)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    return OrderedDict(items)


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return dict(items)


def _plain(kind: type) -> Callable[..., Any]:
    def make(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset, dict, str)):
            raise FormatError(f"a {kind.__name__} of {type(items).__name__}")
        return kind(items)

    return make


def _bytes(text: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(text, str):
        return _encode(text, encoding)
    if not isinstance(text, (bytes, tuple, list)):  # never a number: bytes(10**12) would allocate
        raise FormatError(f"bytes of {type(text).__name__}")
    return bytes(text)


def _number(kind: type) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        if not all(type(arg) in (int, float, bool) for arg in args):
            raise FormatError(f"a {kind.__name__} of {args!r:.80}")
        return kind(*args)

    return make


def _text(text: Any = "") -> str:
    if not isinstance(text, str):
        raise FormatError(f"a text of {type(text).__name__}")
    return text


def _deque(items: Any = (), maxlen: Any = None) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise FormatError("a path of something else than text")
    return "/".join(parts).replace("//", "/")


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    if not isinstance(dtype, NumpyDType) or not isinstance(data, bytes) or len(data) != dtype.value.itemsize:
        raise FormatError("a numpy number that is none")
    return np.frombuffer(data, dtype.value)[0].item()


def _range(*args: Any) -> list[int]:
    found = range(*args)
    if len(found) > _RANGE_MAX:
        raise FormatError(f"a range of {len(found)} numbers")
    return list(found)


def _device(*args: Any) -> str:
    return ":".join(str(arg) for arg in args)[:100]


_STORAGES: Final = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}

_BUILTINS: Final[dict[str, Callable[..., Any]]] = {
    "set": _plain(set),
    "frozenset": _plain(frozenset),
    "list": _plain(list),
    "tuple": _plain(tuple),
    "dict": _plain(dict),
    "bytearray": _bytes,
    "bytes": _bytes,
    "complex": _number(complex),
    "int": _number(int),
    "long": _number(int),
    "float": _number(float),
    "bool": _number(bool),
    "str": _text,
    "unicode": _text,
    "slice": lambda *args: tuple(args),
    "range": _range,
    "xrange": _range,
}

_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": _rebuild_v1,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": lambda items=(): _sizes(items),
    "torch.device": _device,
    "torch.serialization._get_layout": lambda name: str(name)[:100],
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _default_dict,
    "collections.deque": _deque,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,
    "io.BytesIO": lambda data=b"", *rest: _bytes(data),
    "numpy.dtype": NumpyDType,
    "numpy.ndarray": NumpyArray,
    **{f"numpy.{core}.multiarray._reconstruct": NumpyArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{
        f"pathlib{sub}.{kind}": _path
        for sub in ("", "._local")
        for kind in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{
        f"{builtins}.{name}": make
        for builtins in ("builtins", "__builtin__")
        for name, make in _BUILTINS.items()
    },
}

_DCP: Final = "torch.distributed.checkpoint."
_RECORDS: Final[tuple[str, ...]] = (
    *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.strided"),
    *("torch.preserve_format", "torch.contiguous_format", "torch.channels_last"),
    *("builtins.object", "__builtin__.object"),
    *(
        f"{_DCP}metadata.{name}"
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
            *("MetadataIndex", "StorageMeta"),
        )
    ),
    f"{_DCP}filesystem._StorageInfo",
    f"{_DCP}filesystem._StoragePrefix",
    *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")),
    # torch 1.13 and 2.0 described tensors with the classes of ShardedTensor.
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    # values that trainers keep beside the tensors
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *("uuid.UUID", "decimal.Decimal", "fractions.Fraction", "types.SimpleNamespace"),
    *("lightning.fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict"),
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    # DeepSpeed
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    # Megatron-LM
    "argparse.Namespace",
)

_ENUMS: Final[dict[str, dict[str, Any]]] = {
    **{
        f"{_DCP}{name}": {}
        for name in ("metadata._MEM_FORMAT_ENCODING", "filesystem.SerializationFormat", "planner.WriteItemType")
    },
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING": {},
    "deepspeed.runtime.zero.config.ZeroStageEnum": {
        name: stage
        for stage, names in enumerate([["disabled"], ["optimizer_states"], ["gradients"], ["weights", "max_stage"]])
        for name in names
    },
    "deepspeed.runtime.zero.partition_parameters.ZeroParamStatus": {},
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum": {},
    "signal.Signals": {one.name: one.value for one in signal.Signals},
    **{f"megatron.core.transformer.enums.{name}": {} for name in ("AttnBackend", "AttnMaskType", "AttnType")},
    **{f"megatron.core.transformer.enums.{name}": {} for name in ("LayerType", "ModelType")},
    "megatron.core.enums.ModelType": {},
    **{f"megatron.core.rerun_state_machine.Rerun{name}": {} for name in ("Mode", "State", "Diagnostic")},
}
"""Enums, and the values of members where somebody looks at them."""


def _closed_list() -> dict[str, Any]:
    found: dict[str, Any] = {name: Global(name) for name in (*_RECORDS, *_ENUMS)}
    # As Python 3.10 and older save them.
    found.update((f"signal.{name}", Constant("signal.Signals", (n,))) for name, n in _ENUMS["signal.Signals"].items())
    found.update((name, Global(name, make)) for name, make in _FUNCTIONS.items())
    found.update((f"torch.{name}", TorchDType(name)) for name in DTYPES)
    for name, alias in (("half", "float16"), ("float", "float32"), ("double", "float64"), ("long", "int64")):
        found[f"torch.{name}"] = TorchDType(alias)
    for prefix, dtype in _STORAGES.items():
        found[f"torch.{prefix}Storage"] = StorageType(dtype)
        found[f"torch.cuda.{prefix}Storage"] = StorageType(dtype)
    for name in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        found[name] = StorageType(None)
    return found


GLOBALS: Final[dict[str, Any]] = _closed_list()
"""Full name to Global, TorchDType or StorageType."""
