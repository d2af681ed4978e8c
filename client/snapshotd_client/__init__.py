"""
The hook of snapshotd that runs inside a training process.

    from snapshotd_client import Snapshotter

    snap = Snapshotter(model=model, optimizer=opt, scheduler=sched, extra={"data": sampler})
    first = snap.restore()
    for step in range(first, steps):
        ...; opt.step(); opt.zero_grad()
        snap.capture(step)
"""

from __future__ import annotations

from snapshotd_client.codec import register_codec
from snapshotd_client.errors import CannotExpress, RestoreError, StateLost
from snapshotd_client.snapshotter import Snapshotter

__all__ = ["CannotExpress", "RestoreError", "Snapshotter", "StateLost", "register_codec"]
