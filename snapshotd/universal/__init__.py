"""
Universal checkpoints: any framework's checkpoint in, any layout out, streamed, verified, with no pickle left.

Reading into universal imports neither torch nor a framework. ``open`` gives any checkpoint as lazy tensors, ``convert``
turns one into another format; state.py is the seam between readers and writers.
"""

from __future__ import annotations

from snapshotd.universal.api import Checkpoint, LazyTensor, open
from snapshotd.universal.convert import Report, convert
from snapshotd.universal.places import Job
from snapshotd.universal.stream import Settings

__all__ = ["Checkpoint", "Job", "LazyTensor", "Report", "Settings", "convert", "open"]
