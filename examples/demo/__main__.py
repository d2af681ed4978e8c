"""
Train, kill, recover, compare: `python -m examples.demo --faults all`.

Exit code 0 when every fault struck and was survived and everything is equal, 1 when not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.demo.cluster import JOB, Cluster, reference_run, training_script
from examples.demo.faults import FAULTS, Outcome, Plan, Stage, plan
from examples.demo.processes import Child, DemoFailed, adopt_orphans, end_all, wait_for
from examples.demo.records import Run, Tail
from examples.demo.report import print_faults, print_verdict
from examples.demo.verdict import judge, world_change
from examples.demo.view import View, open_view
from examples.demo.watch import Watcher

_KEPT = Path("demo-out")
_RUN_S = 150.0
_STEP_MS = "300"
"""At least, while there are faults: a machine with a GPU would be done before what was killed is there again."""


class Demo:
    """One run of the demo under `root`."""

    def __init__(self, root: Path, wanted: Plan, *, steps: int, device: str, parallel: str, console: Console) -> None:
        self._root, self._wanted, self._steps, self._console = root, wanted, steps, console
        self._device, self._parallel = device, parallel
        self.outcomes = [
            Outcome(name=name, at_step=steps * (index + 1) // (len(wanted.faults) + 1) - 1)
            for index, name in enumerate(wanted.faults)
        ]

    def run(self) -> bool:
        """Returns whether everything is equal; DemoFailed when it did not come to that."""
        began = time.monotonic()
        with open_view(self._console, steps=self._steps, outcomes=self.outcomes) as view:
            self._disturbed(view)
            self._undisturbed(view)
        if self.outcomes:
            print_faults(self._console, self.outcomes)
        disturbed, undisturbed = Run.read(self._root / "disturbed"), Run.read(self._root / "undisturbed")
        checks = judge(disturbed, undisturbed, steps=self._steps)
        print_verdict(self._console, checks, changed=self._wanted.changes_world)
        self._console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
        if self._wanted.changes_world and world_change(disturbed) is None:
            raise DemoFailed("the number of workers was to change, but did not")
        return all(check.equal for check in checks)

    def _training(self, out: str, *more: str) -> list[str]:
        where = ["--device", self._device, "--backend", "gloo"]  # NCCL does not let workers share a device
        where += ["--parallel", self._parallel]
        return [training_script(), "--steps", str(self._steps), "--out", str(self._root / out), *where, *more]

    def _disturbed(self, view: View) -> None:
        more = ["--digest-restored"] if self._wanted.changes_world else []
        more += ["--step-ms", _STEP_MS] if self.outcomes else []
        cluster = Cluster(
            self._root,
            nnodes=self._wanted.nnodes,
            parity=self._wanted.parity,
            training=self._training("disturbed", *more),
        )
        watcher = Watcher(lambda: cluster.address, JOB, Tail(self._root / "disturbed" / "run.jsonl"))
        stage = Stage(cluster=cluster, watcher=watcher, refresh=lambda: view.show(cluster, watcher))
        spares = f" and {self._wanted.spares} to spare" if self._wanted.spares else ""
        view.phase(f"starting {self._wanted.nodes} nodes{spares}")
        cluster.start_coordinator()
        nodes = [cluster.add_node(f"n{index}") for index in range(self._wanted.nodes + self._wanted.spares)]
        watcher.start()
        try:
            cluster.launch(nodes[: self._wanted.nodes])
            stage.until(lambda: bool(watcher.picture.starts), "the workers to start")
            cluster.launch(nodes[self._wanted.nodes :])
            view.phase("training")
            for outcome in self.outcomes:
                stage.play(outcome)
            wait_for(
                lambda: all(node.launcher.code is not None for node in cluster.running()),
                "the end of the training",
                timeout_s=_RUN_S,
                each=lambda: (stage.refresh(), cluster.check()),
            )
            cluster.check()
        finally:
            watcher.stop()
        watcher.look()
        view.show(cluster, watcher)
        cluster.stop()

    def _undisturbed(self, view: View) -> None:
        view.phase("the same job again, undisturbed")
        more: list[str] = []
        if self._wanted.changes_world:
            change = world_change(Run.read(self._root / "disturbed"))
            more = ["--digest", str(change.first)] if change is not None else []
        child: Child = reference_run(self._root, self._training("undisturbed", *more), workers=self._wanted.nodes)
        watcher = Watcher(lambda: "", JOB, Tail(self._root / "undisturbed" / "run.jsonl"))
        child.start()

        def show() -> None:
            watcher.look()
            view.show(None, watcher)

        wait_for(lambda: child.code is not None, "the undisturbed run", timeout_s=_RUN_S, each=show)
        if child.code != 0:
            raise DemoFailed(f"the undisturbed run ended with code {child.code}")


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    console = Console()
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="snapshotd-demo-", dir=memory if memory.is_dir() else None))
    demo = Demo(
        root,
        options.faults,
        steps=options.steps,
        device=options.device,
        parallel=options.parallel,
        console=console,
    )
    equal = False
    try:
        equal = demo.run()
    except DemoFailed as error:
        console.print(f"The demo failed: {error}", style="bold red", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted; ending all processes")
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # cleaning up takes a moment and must not be interrupted
        end_all()
        if options.keep or not equal:
            _keep(root)
            console.print(f"logs of every process: {_KEPT}/", highlight=False)
        shutil.rmtree(root, ignore_errors=True)
    return 0 if equal else 1


def _keep(root: Path) -> None:
    """Logs, losses and digests, without the bulk."""
    shutil.rmtree(_KEPT, ignore_errors=True)
    _KEPT.mkdir()
    for name in ("logs", "disturbed", "undisturbed"):
        if (root / name).is_dir():
            shutil.copytree(root / name, _KEPT / name, ignore=shutil.ignore_patterns("*.safetensors"))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train a small GPT on four nodes of this machine, kill what can be killed, compare bit by bit.",
    )
    parser.add_argument("--faults", default="all", metavar="LIST", help=f"all, none, or some of {', '.join(FAULTS)}")
    parser.add_argument("--steps", type=int, default=0, help="default: 40, or 24 with fewer than two faults")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: all workers on the first GPUs")
    parser.add_argument("--parallel", choices=("fsdp2", "ddp"), help="default: fsdp2; on CUDA ddp, and nothing else")
    parser.add_argument("--keep", action="store_true", help=f"keep the logs in {_KEPT}/ even when all went well")
    options = parser.parse_args(argv)
    try:
        options.faults = plan(options.faults)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cuda" and options.parallel == "fsdp2":
        parser.error(
            "--device cuda goes with --parallel ddp only: gloo on CUDA tensors has not all that FSDP2 asks for"
        )
    options.parallel = options.parallel or ("ddp" if options.device == "cuda" else "fsdp2")
    options.steps = options.steps or (40 if len(options.faults.faults) > 1 else 24)
    if options.steps < 5 * (len(options.faults.faults) + 1):
        parser.error(f"--steps {options.steps} leaves less than 5 steps between faults")
    return options


if __name__ == "__main__":
    sys.exit(main())
