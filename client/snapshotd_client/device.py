"""
Copies off accelerators: a side stream brings tensors to host memory while the compute stream goes on.

The order that keeps it right: the side stream first waits for a mark that the training thread set on its compute stream
at capture (all updates before it are seen); before the next update the compute stream waits for the mark that ends the
copies (no update can overtake them). The host waits for neither; only the copy thread waits, before it seals.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any, Final, Protocol

import torch

from snapshotd_client.arrays import Array
from snapshotd_client.libraries import loaded
from snapshotd_client.sums import content_sums

__all__ = ["CopyStream", "DeviceStream", "HostStream", "stream_for"]

_BOUNCE_BYTES: Final = 64 * 1024 * 1024
_FOR_ALL_DEVICES: Final = 1
"""cudaHostRegisterPortable: the slot of a worker that uses several devices is pinned for each of them."""

_RELAXED: Final = 2
"""cudaStreamCaptureModeRelaxed."""


class CopyStream(Protocol):
    """The seam: what the capture pipeline needs of an accelerator, so that it can be tested without one."""

    def mark_compute(self) -> Any:
        """Called on the training thread: a mark behind all work that it has issued so far."""

    def recording(self) -> bool:
        """Called on the training thread: whether what it issues now is recorded, to be run later and more than once."""

    def begin(self, mark: Any) -> None:
        """The copies that follow see everything before ``mark``."""

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], pinned: bool) -> None:
        """Issue copies of ``sources`` into host memory of the same shapes and types, which may be ``pinned``."""

    def sums(self, sources: list[torch.Tensor]) -> torch.Tensor:
        """Issue the ``content_sums`` of ``sources``; the memory returned has them once a later mark is reached."""

    def mark_copied(self) -> Any:
        """A mark behind all copies and sums that were issued."""

    def hold_compute(self, mark: Any) -> None:
        """Called on the training thread: what it issues from now on runs after ``mark``. Does not block the host."""

    def wait(self, mark: Any) -> None:
        """Block this thread until ``mark`` is reached: all bytes are in host memory."""

    def pin(self, memory: Array) -> bool:
        """Make host memory known to the device, so that copies into it are asynchronous; False if that can't be."""

    def unpin(self, memory: Array) -> None:
        """Undo ``pin``."""


class DeviceStream:
    """CUDA and everything that has the same stream interface under ``torch.<device>`` (ROCm, XPU)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device=device)
        self._bounce: torch.Tensor | None = None
        # Who waits for the end of the copies shall sleep; by default CUDA's events spin.
        self._asleep = {"blocking": True} if hasattr(self._module, "cudart") else {}

    def mark_compute(self) -> Any:
        event = self._module.Event()
        event.record(self._module.current_stream(self._device))
        return event

    def recording(self) -> bool:
        asks = getattr(self._module, "is_current_stream_capturing", None)
        return asks is not None and bool(asks())

    def begin(self, mark: Any) -> None:
        self._stream.wait_event(mark)

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], pinned: bool) -> None:
        with self._module.stream(self._stream):
            if pinned:
                torch._foreach_copy_(targets, sources, non_blocking=True)
                return
            for target, source in zip(targets, sources, strict=True):
                self._copy_by_bounce(target, source)

    def sums(self, sources: list[torch.Tensor]) -> torch.Tensor:
        with self._module.stream(self._stream):
            found = content_sums(sources)
            return torch.empty(found.shape, dtype=found.dtype, device="cpu", pin_memory=True).copy_(
                found, non_blocking=True
            )

    def mark_copied(self) -> Any:
        event = self._module.Event(**self._asleep)
        event.record(self._stream)
        return event

    def hold_compute(self, mark: Any) -> None:
        streams = {self._module.current_stream(self._device)}
        if default := getattr(self._module, "default_stream", None):
            streams.add(default(self._device))  # memory that is let go of now is mostly its own, and used by it again
        for stream in streams:
            stream.wait_event(mark)

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def pin(self, memory: Array) -> bool:
        cudart = getattr(self._module, "cudart", None)
        if cudart is None:
            return False
        _leave_graphs_alone()
        with self._module.device(self._device):
            pinned = int(cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, _FOR_ALL_DEVICES)) == 0
            if not pinned:
                self._take_error()
        return pinned

    def unpin(self, memory: Array) -> None:
        cudart = getattr(self._module, "cudart", None)
        if cudart is not None and int(cudart().cudaHostUnregister(memory.ctypes.data)) != 0:
            self._take_error()

    def _take_error(self) -> None:
        """CUDA keeps the error of a call that failed, for the next kernel of this thread to raise: let one do so."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)

    def _copy_by_bounce(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.numel() == 0:
            return
        flat_target = target.reshape(-1)  # slot memory is contiguous: this is a view
        flat = source.contiguous().reshape(-1)
        if self._bounce is None:
            self._bounce = torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        room = self._bounce.view(flat.dtype)
        for begin in range(0, flat.numel(), room.numel()):
            part = flat[begin : begin + room.numel()]
            room[: part.numel()].copy_(part, non_blocking=True)
            self._stream.synchronize()
            flat_target[begin : begin + part.numel()].copy_(room[: part.numel()])


class HostStream:
    """For devices without streams: each copy is done when ``copy`` returns."""

    def mark_compute(self) -> Any:
        return None

    def recording(self) -> bool:
        return False

    def begin(self, mark: Any) -> None:
        pass

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor], pinned: bool) -> None:
        torch._foreach_copy_(targets, sources)

    def sums(self, sources: list[torch.Tensor]) -> torch.Tensor:
        return content_sums(sources).cpu()

    def mark_copied(self) -> Any:
        return None

    def hold_compute(self, mark: Any) -> None:
        pass

    def wait(self, mark: Any) -> None:
        pass

    def pin(self, memory: Array) -> bool:
        return False

    def unpin(self, memory: Array) -> None:
        pass


def _leave_graphs_alone() -> None:
    """
    Let this thread pin memory and wait for events while another thread records a CUDA graph, which would fail of it.

    By cudaThreadExchangeStreamCaptureMode of the library that torch has loaded; torch does not pass it on.
    """
    for library in loaded("libcudart"):
        with contextlib.suppress(AttributeError):
            mode = ctypes.c_int(_RELAXED)
            library.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def stream_for(device: torch.device) -> CopyStream:
    """Return the copier for ``device``."""
    module = torch.get_device_module(device)
    if hasattr(module, "Stream") and hasattr(module, "Event") and hasattr(module, "current_stream"):
        return DeviceStream(device)
    return HostStream()
