"""
The script of the restart part: `torchrun ... -m benchmarks.peers.restarted MODE NOTES NBYTES`, FSDP2 on two ranks.

MODE is "ours" (a Snapshotter) or the directory in which torch.distributed.checkpoint keeps each step. A process appends
what it has reached, and when, to its own file in NOTES; `time.time()` is one clock for all processes of a machine.
"""

import json
import os
import sys
import time

BEGAN = time.time()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from ..state import Training  # noqa: E402

STEPS = 1_000_000


class Notes:
    def __init__(self, directory: str) -> None:
        self._file = os.open(f"{directory}/{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.add("python", BEGAN)

    def add(self, what: str, when: float | None = None, **more: int) -> None:
        line = {"what": what, "time": time.time() if when is None else when, **more}
        os.write(self._file, (json.dumps(line) + "\n").encode())


class Ours:
    """Three lines of snapshotd."""

    def __init__(self, training: Training) -> None:
        from snapshotd_client import Snapshotter

        self._snapshots = Snapshotter(training.model, training.optimizer)

    def restore(self) -> int:
        return self._snapshots.restore()

    def keep(self, step: int) -> None:
        self._snapshots.capture(step)


class Dcp:
    """Each step a checkpoint in tmpfs, the newest two kept; the marker names the last that is whole."""

    def __init__(self, training: Training, directory: str) -> None:
        self._training, self._directory = training, directory
        self._marker = f"{directory}/newest"

    def _state(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self._training.model, self._training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def restore(self) -> int:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        if not os.path.exists(self._marker):
            return 0
        with open(self._marker) as file:
            step = int(file.read())
        state = self._state()
        dcp.load(state, checkpoint_id=f"{self._directory}/{step % 2}")
        set_state_dict(
            self._training.model,
            self._training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return step + 1

    def keep(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self._state(), checkpoint_id=f"{self._directory}/{step % 2}")
        if dist.get_rank() == 0:
            with open(f"{self._marker}.new", "w") as file:
                file.write(str(step))
            os.replace(f"{self._marker}.new", self._marker)
        dist.barrier()


def main(mode: str, directory: str, nbytes: str) -> None:
    notes = Notes(directory)
    notes.add("imported")
    dist.init_process_group("gloo")
    notes.add("joined", rank=dist.get_rank())

    def shard(model: torch.nn.Module) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    training = Training(int(nbytes), tensors=592, threads=1, wrap=shard)
    keeper = Ours(training) if mode == "ours" else Dcp(training, mode)
    notes.add("built")
    first = keeper.restore()
    notes.add("restored", step=first)
    for step in range(first, STEPS):
        training.step()
        keeper.keep(step)
        notes.add("step", step=step)


if __name__ == "__main__":
    main(*sys.argv[1:])
