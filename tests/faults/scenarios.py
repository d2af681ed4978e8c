"""
The table of disasters. A row: what happens, to which cluster, and how it must end.

Two coordinates of each row are in its name: what is hit, and in which moment. story.py knows the words of the stories.
"""

from __future__ import annotations

from typing import Any

from tests.faults.cluster import Options
from tests.faults.story import Outcome, Scenario

__all__ = ["SCENARIOS"]

SCENARIOS: list[Scenario] = []


def fsdp2(nodes: int, parity: int = 1, *arguments: str, **more: Any) -> Options:
    return Options(nodes=nodes, parity=parity, arguments=arguments, script="fsdp2.py", **more)


def ddp(nodes: int, parity: int = 1, *arguments: str, **more: Any) -> Options:
    return Options(nodes=nodes, parity=parity, arguments=arguments, script="ddp.py", **more)


def add(name: str, options: Options, story: str, outcome: Outcome, says: str = "", **more: Any) -> None:
    """Where the workers hold is taken from the story; a change of their number wants the whole state traced."""
    holds = tuple(int(words[1]) for words in map(str.split, story.split(";")) if words[:1] == ["at"])
    options = Options(**{**vars(options), "holds": holds, "trace": options.trace or bool(more.get("world"))})
    SCENARIOS.append(Scenario(name=name, options=options, story=story, outcome=outcome, says=says, **more))


def stop_at(site: str, hit: int) -> str:
    """A failpoint that touches the file `there` and never goes on, so that the scenario kills the node right there."""
    return f"{site}=touch({{dir}}/there)@{hit};{site}=hang@{hit}"


def worker_stops_at(site: str, hit: int) -> str:
    return f"1:{site}=touch({{dir}}/there)@{hit}|1:{site}=hang@{hit}"


# ---------------------------------------------------------------- a worker

MEMORY = {"outcome": "memory", "says": "from memory", "exact": True}
ONE = "at 6; kill worker n1; go"

add("worker-idle-fsdp2-n3", fsdp2(3), ONE, **MEMORY)
add("worker-idle-ddp-n3", ddp(3), ONE, **MEMORY)
add("worker-idle-fsdp2-n5-m2", fsdp2(5, 2), ONE, **MEMORY)
add("worker-of-rank-0-idle-fsdp2-n2", fsdp2(2), "at 6; kill worker n0; go", **MEMORY)
add("worker-of-rank-0-idle-ddp-n2", ddp(2), "at 6; kill worker n0; go", **MEMORY)
add("worker-twice-fsdp2-n3", fsdp2(3), "at 4; kill worker n1; go; at 9; kill worker n1; go", **MEMORY)
add("workers-of-two-nodes-in-turn-ddp-n4", ddp(4), "at 4; kill worker n1; go; at 9; kill worker n3; go", **MEMORY)
add("two-workers-at-once-fsdp2-n4-m2", fsdp2(4, 2), "at 6; kill worker n1 n2; go", **MEMORY)
add("all-workers-idle-fsdp2-n4", fsdp2(4), "at 6; kill workers; go", **MEMORY)
add("all-workers-idle-ddp-n5-m2", ddp(5, 2), "at 6; kill workers; go", **MEMORY)
add("worker-of-two-on-a-node-fsdp2-n2", fsdp2(2, workers=2), ONE, **MEMORY)
add("worker-stopped-then-killed-fsdp2-n3", fsdp2(3), "at 6; pause worker n1; go; kill worker n1", "memory")
add("worker-stopped-then-goes-on-ddp-n2", ddp(2), "at 6; pause worker n1; go; resume worker n1", "undisturbed")

for moment, site in (
    ("capture", "client.capture=kill@5"),
    ("mid-copy", "client.mid_copy=kill@4"),
    ("before-seal", "client.before_seal=kill@4"),
    ("after-seal", "client.after_seal=kill@4"),
):
    add(f"worker-{moment}-fsdp2-n3", fsdp2(3, arm={"worker n1": f"1:{site}"}), "dies worker n1", "memory")
add("worker-mid-copy-ddp-n2", ddp(2, arm={"worker n1": "1:client.mid_copy=kill@4"}), "dies worker n1", "memory")
add("worker-mid-copy-ddp-n4-m2", ddp(4, 2, arm={"worker n0": "1:client.mid_copy=kill@4"}), "dies worker n0", "memory")
for name, options in (("fsdp2-n3", fsdp2(3)), ("ddp-n2", ddp(2))):
    for site in ("mid_restore", "after_restore"):
        armed = Options(**{**vars(options), "arm": {"worker n1": f"2:client.{site}=kill@1"}})
        add(f"worker-{site.replace('_', '-')}-{name}", armed, ONE + "; dies worker n1 2", **MEMORY)
add(
    "all-workers-mid-restore-fsdp2-n3",
    fsdp2(3, arm={f"worker n{i}": "2:client.mid_restore=kill@1" for i in range(3)}),
    ONE + "; dies worker n0 2; dies worker n1 2; dies worker n2 2", **MEMORY,
)  # fmt: skip

# ---------------------------------------------------------------- a launcher

add(
    "launcher-killed-its-worker-lives-on-fsdp2-n3", fsdp2(3, steps=60),
    "at 6; kill launcher n1; start launcher n1; go", "memory",
)  # fmt: skip

# ---------------------------------------------------------------- a daemon

add("daemon-idle-fsdp2-n3", fsdp2(3), "at 6; kill daemon n1; start daemon n1; go", "undisturbed")
add("daemon-idle-ddp-n2", ddp(2), "at 6; kill daemon n0; start daemon n0; go", "undisturbed")
add("daemon-back-after-its-lease-fsdp2-n3", fsdp2(3), "at 6; kill daemon n1; away; start daemon n1; go", "undisturbed")
add(
    "daemon-back-while-training-goes-on-ddp-n3", ddp(3, steps=120),
    "at 6; kill daemon n1; go; away; start daemon n1", "undisturbed",
)  # fmt: skip
add("daemon-never-back-fsdp2-n3", fsdp2(3), "at 6; kill daemon n1; go", "undisturbed")
add("daemon-then-its-worker-fsdp2-n3", fsdp2(3), "at 6; kill daemon n1; start daemon n1; kill worker n1; go", **MEMORY)
add(
    "daemon-and-its-worker-at-once-ddp-n3", ddp(3),
    "at 6; kill worker n1; kill daemon n1; start daemon n1; go", **MEMORY,
)  # fmt: skip
ALL_DAEMONS = "at 6; kill daemon n0 n1 n2; start daemon n0 n1 n2"
add("all-daemons-idle-ddp-n3", ddp(3), ALL_DAEMONS + "; go", "undisturbed")
add("all-daemons-then-all-workers-fsdp2-n3", fsdp2(3), ALL_DAEMONS + "; kill workers; go", **MEMORY)
for moment, site in (
    ("before-hash", "daemon.before_hash=kill@4"),
    ("mid-seal", "daemon.after_hash=kill@4"),
    ("before-seal-record", "arena.before_seal_record=kill@5"),
    ("after-seal-record", "arena.after_seal_record=kill@5"),
    ("before-report", "daemon.before_report=kill@6"),
    ("mid-encode", "daemon.mid_encode=kill@5"),
    ("after-encode", "daemon.after_encode=kill@4"),
    ("before-send", "transfer.before_send=kill@6"),
):
    add(
        f"daemon-{moment}-fsdp2-n3", fsdp2(3, arm={"daemon n1": site}, steps=30),
        "dies daemon n1; start daemon n1", "undisturbed",
    )  # fmt: skip
LARGE = ("--large", "1500")
add(
    "daemon-mid-send-fsdp2-n3", fsdp2(3, 1, *LARGE, arm={"daemon n1": "transfer.mid_send=kill@3"}),
    "dies daemon n1; start daemon n1", "undisturbed",
)  # fmt: skip
add(
    "daemon-mid-encode-then-its-worker-ddp-n3", ddp(3, arm={"daemon n1": "daemon.mid_encode=kill@5"}, steps=40),
    "dies daemon n1; start daemon n1; kill worker n1", "memory",
)  # fmt: skip
add(
    "daemon-mid-restore-shrink-fsdp2-3-to-2", fsdp2(3, least=2, arm={"daemon n2": "daemon.mid_assemble=kill@1"}),
    "at 6; kill node n1; go; dies daemon n2; start daemon n2", world=2, outcome="memory", exact=True,
)  # fmt: skip

# ---------------------------------------------------------------- the coordinator

add(
    "coordinator-idle-fsdp2-n3", fsdp2(3),
    "at 6; counted unasked_parities; kill coordinator; start coordinator; go", "undisturbed",
)  # fmt: skip
add(
    "coordinator-back-while-training-goes-on-ddp-n2", ddp(2),
    "at 6; kill coordinator; go; start coordinator", "undisturbed",
)  # fmt: skip
for moment, site in (
    ("before-first-epoch", "coordinator.before_epoch=kill@1"),
    ("after-first-epoch", "coordinator.after_epoch=kill@1"),
    ("before-commit", "coordinator.before_commit=kill@4"),
    ("after-commit", "coordinator.after_commit=kill@4"),
):
    add(
        f"coordinator-{moment}-fsdp2-n3", fsdp2(3, arm={"coordinator": site}),
        "dies coordinator; start coordinator", "undisturbed",
    )  # fmt: skip
add(
    "coordinator-and-worker-fsdp2-n3", fsdp2(3),
    "at 6; kill coordinator; kill worker n1; start coordinator; go", **MEMORY,
)  # fmt: skip
add("coordinator-and-worker-ddp-n4", ddp(4), "at 6; kill coordinator; kill worker n0; go; start coordinator", **MEMORY)
add(
    "coordinator-and-daemon-fsdp2-n3", fsdp2(3),
    "at 6; kill coordinator; kill daemon n1; start coordinator; start daemon n1; kill worker n2; go", **MEMORY,
)  # fmt: skip
add(
    "coordinator-and-all-daemons-and-all-workers-ddp-n3", ddp(3),
    "at 6; kill workers; kill coordinator; kill daemon n0 n1 n2; start coordinator; start daemon n0 n1 n2; go",
    **MEMORY,
)  # fmt: skip
for moment, site in (("before", "coordinator.before_epoch=kill@3"), ("after", "coordinator.after_epoch=kill@3")):
    add(
        f"coordinator-{moment}-epoch-of-a-recovery-fsdp2-n3", fsdp2(3, arm={"coordinator": site}),
        ONE + "; dies coordinator; start coordinator", **MEMORY,
    )  # fmt: skip
add(
    "coordinator-and-node-spare-fsdp2-n3", fsdp2(3, spares=1),
    "at 6; kill coordinator; kill node n1; start coordinator; go", **MEMORY,
)  # fmt: skip

# ---------------------------------------------------------------- a node, and a spare takes its place

DECODED = {"outcome": "memory", "says": r"decoded from parity|slot of rank \d+ is rebuilt", "exact": True}
NODE = "at 6; kill node n1; go"

add("node-spare-idle-fsdp2-n3", fsdp2(3, spares=1), NODE, **DECODED)
add("node-spare-idle-ddp-n3", ddp(3, spares=1), NODE, **DECODED)
add("node-spare-idle-fsdp2-n2", fsdp2(2, spares=1), NODE, **DECODED)
add("node-spare-idle-ddp-n5-m2", ddp(5, 2, spares=1), NODE, **DECODED)
add("node-of-rank-0-spare-idle-fsdp2-n4", fsdp2(4, spares=1), "at 6; kill node n0; go", **DECODED)
add("node-of-two-workers-spare-fsdp2-n2", fsdp2(2, workers=2, spares=1), NODE, **DECODED)
add("node-comes-back-empty-ddp-n2", ddp(2), "at 6; kill node n1; start node n1; go", **DECODED)
add("two-nodes-at-once-spares-fsdp2-n4-m2", fsdp2(4, 2, spares=2), "at 6; kill node n1 n2; go", **DECODED)
add("two-nodes-at-once-spares-ddp-n5-m2", ddp(5, 2, spares=2), "at 6; kill node n0 n4; go", **DECODED)
add(
    "two-nodes-in-turn-redundancy-rebuilt-fsdp2-n3", fsdp2(3, spares=2),
    "at 4; kill node n1; go; at 9; redundant; kill node n2; go", **DECODED,
)  # fmt: skip
add(
    "node-then-another-before-any-step-fsdp2-n4-m2", fsdp2(4, 2, spares=2),
    "at 6; kill node n1; kill node n2; go", **DECODED,
)  # fmt: skip
add(
    "node-then-redundancy-comes-back-before-any-step-ddp-n3", ddp(3, spares=2),
    "at 6; kill node n1; away; redundant; kill node n2; go", **DECODED,
)  # fmt: skip
for moment, site in (
    ("mid-seal", "daemon.after_hash"),
    ("mid-encode", "daemon.mid_encode"),
    ("between-data-and-commit", "daemon.before_report"),
):
    add(
        f"node-spare-{moment}-fsdp2-n3", fsdp2(3, spares=1, arm={"daemon n1": stop_at(site, 6)}, steps=30),
        "reached there; kill node n1", "memory",
    )  # fmt: skip
add(
    "node-spare-mid-send-ddp-n3", ddp(3, 1, *LARGE, spares=1, arm={"daemon n1": stop_at("transfer.mid_send", 12)}),
    "reached there; kill node n1", "memory",
)  # fmt: skip
add(
    "node-spare-mid-copy-ddp-n3", ddp(3, spares=1, arm={"worker n1": worker_stops_at("client.mid_copy", 5)}, steps=30),
    "reached there; kill node n1", "memory",
)  # fmt: skip
MID_REBUILD = "daemon.mid_rebuild=touch({dir}/there)@1;daemon.mid_rebuild=delay(200)@1"
REBUILDING = {f"daemon n{i}": MID_REBUILD for i in range(6)}
add(
    "node-while-another-is-rebuilt-fsdp2-n4-m2", fsdp2(4, 2, spares=2, arm=REBUILDING),
    "at 6; kill node n1; go; reached there; kill node n2", **DECODED,
)  # fmt: skip

# ---------------------------------------------------------------- fewer nodes, more nodes

add("node-gone-shrink-fsdp2-3-to-2", fsdp2(3, least=2), NODE, world=2, **DECODED)
add("node-gone-shrink-fsdp2-2-to-1", fsdp2(2, least=1), NODE, world=1, **DECODED)
add("node-of-rank-0-gone-shrink-ddp-4-to-3", ddp(4, least=2), "at 6; kill node n0; go", world=3, **DECODED)
add("two-nodes-gone-shrink-fsdp2-5-to-3-m2", fsdp2(5, 2, least=3), "at 6; kill node n1 n3; go", world=3, **DECODED)
add("node-gone-shrink-orthogonal-4-to-3", fsdp2(4, 1, "--optimizer", "orthogonal", least=3), NODE, world=3, **DECODED)
add(
    "node-added-grow-fsdp2-2-to-3", fsdp2(2, least=2, most=3),
    "at 6; start node n2; restarted; go", world=3, outcome="memory",
)  # fmt: skip
add(
    "node-added-grow-ddp-2-to-3", ddp(2, least=2, most=3),
    "at 6; start node n2; restarted; go", world=3, outcome="memory",
)  # fmt: skip
add(
    "node-gone-then-added-fsdp2-3-to-2-to-3", fsdp2(3, least=2),
    "at 4; kill node n1; go; at 9; start node n3; restarted; go", world=3, outcome="memory",
)  # fmt: skip

# ---------------------------------------------------------------- another parallelism, on another number of ranks

for script, ranks in (("ddp.py", 1), ("fsdp2.py", 3), ("tp_fsdp2.py", 4)):
    name = f"fsdp2-4-to-{script.removesuffix('.py').replace('_', '-')}-{ranks}"
    add(
        f"whole-job-changes-from-memory-{name}", fsdp2(4),
        f"at 6; kill launcher n0 n1 n2 n3; kill workers; go; relaunch {script} {ranks}", world=ranks, **MEMORY,
    )  # fmt: skip
    add(
        f"whole-job-changes-from-disk-{name}", fsdp2(4, persist_every=1),
        f"at 6; persisted held; kill node n0 n1 n2 n3; go; relaunch {script} {ranks}",
        "durable", r"steps? (is|are) lost|durable", world=ranks, exact=True,
    )  # fmt: skip

add(
    "new-job-starts-from-universal-fsdp2-4-to-tp-fsdp2-4", fsdp2(4, persist_every=1),
    "at 6; persisted held; kill launcher n0 n1 n2 n3; kill workers; go; universal; relaunch tp_fsdp2.py 4; "
    "at 9; kill worker n1; go",
    world=4, **MEMORY,
)  # fmt: skip

# ---------------------------------------------------------------- more nodes than parity covers

LOST = r"steps? (is|are) lost"
GONE = "the state is lost, and nothing is on the durable tier"
PERSIST = {"persist_every": 4}
"""One step before the sixth, where a scenario stands still, and the next behind it, even where a step is left out."""

add(
    "two-nodes-durable-fsdp2-n4-m1", fsdp2(4, spares=2, **PERSIST),
    "at 6; persisted; kill node n1 n2; go", "durable", LOST,
)  # fmt: skip
add(
    "three-nodes-durable-ddp-n5-m2", ddp(5, 2, least=2, **PERSIST),
    "at 6; persisted; kill node n0 n1 n2; go", "durable", LOST, world=2,
)  # fmt: skip
add(
    "two-nodes-durable-shrink-fsdp2-3-to-1", fsdp2(3, least=1, **PERSIST),
    "at 6; persisted; kill node n1 n2; go", "durable", LOST, world=1,
)  # fmt: skip
add(
    "whole-cluster-durable-fsdp2-n2", fsdp2(2, **PERSIST),
    "at 6; persisted; kill node n0 n1; start node n0 n1; go", "durable", LOST,
)  # fmt: skip
add("two-nodes-refused-fsdp2-n4-m1", fsdp2(4, spares=2), "at 6; kill node n1 n2; go", "refused", GONE)
add("three-nodes-refused-ddp-n5-m2", ddp(5, 2, least=2), "at 6; kill node n0 n1 n2; go", "refused", GONE)
add("node-without-parity-refused-ddp-n2-m0", ddp(2, 0, least=1), NODE, "refused", GONE)
for moment, site in (("mid-persist", "persist.before_rename"), ("after-rename", "persist.after_rename")):
    add(
        f"daemon-{moment}-fsdp2-n3", fsdp2(3, arm={"daemon n1": f"{site}=kill@1"}, steps=30, **PERSIST),
        "dies daemon n1; start daemon n1", "undisturbed",
    )  # fmt: skip
BEFORE_MARKER = "persist.before_marker=touch({dir}/there)@1;persist.before_marker=delay(1000)@1"
add(
    "node-before-durable-marker-spare-fsdp2-n3",
    fsdp2(3, spares=1, arm={f"daemon n{i}": BEFORE_MARKER for i in range(3)}, steps=30, **PERSIST),
    "reached there; kill node n1", "memory",
)  # fmt: skip

# ---------------------------------------------------------------- rotten bytes

add("slot-bit-then-worker-fsdp2-n3", fsdp2(3), "at 6; flip slot n1; kill worker n1; go; counted corrupt", **MEMORY)
add("slot-bit-then-worker-ddp-n2", ddp(2), "at 6; flip slot n0; kill worker n1; go; counted corrupt", **MEMORY)
add(
    "slot-bit-then-daemon-then-worker-fsdp2-n3", fsdp2(3),
    "at 6; flip slot n1; kill daemon n1; start daemon n1; kill worker n1; go", **MEMORY,
)  # fmt: skip
add(
    "slot-bit-and-node-spare-fsdp2-n4-m2", fsdp2(4, 2, spares=1),
    "at 6; flip slot n0; kill node n1; go; counted corrupt", **DECODED,
)  # fmt: skip
add(
    "slot-bit-and-node-refused-fsdp2-n3-m1", fsdp2(3, spares=1),
    "at 6; flip slot n0; kill node n1; go", "refused", GONE,
)  # fmt: skip
add(
    "slot-bit-and-node-durable-ddp-n3-m1", ddp(3, spares=1, **PERSIST),
    "at 6; persisted; flip slot n0; kill node n1; go", "durable", LOST,
)  # fmt: skip
add("parity-bit-then-worker-fsdp2-n3", fsdp2(3), "at 6; flip parity n0; kill worker n1; go", **MEMORY)
add("parity-bit-and-node-spare-ddp-n4-m2", ddp(4, 2, spares=1), "at 6; flip parity n0; kill node n1; go", **DECODED)
add(
    "parity-bit-and-node-refused-fsdp2-n3-m1", fsdp2(3, spares=1),
    "at 6; flip parity n0; kill node n1; go", "refused", GONE,
)  # fmt: skip
add(
    "slot-bit-found-by-the-scrub-fsdp2-n3", fsdp2(3, scrub=True),
    "at 6; flip slot n1; counted corrupt; counted rebuilt_slots; redundant; go", "undisturbed",
)  # fmt: skip
add(
    "parity-bit-found-by-the-scrub-ddp-n3", ddp(3, scrub=True),
    "at 6; flip parity n1; counted corrupt; counted rebuilt_parities; redundant; go", "undisturbed",
)  # fmt: skip
add(
    "wire-bit-while-encoding-fsdp2-n3", fsdp2(3, arm={"daemon n1": "transfer.corrupt_send=corrupt@4"}),
    "at 6; cli; go", "undisturbed",
)  # fmt: skip
add(
    "wire-bits-while-decoding-ddp-n3",
    ddp(3, spares=1, arm={"daemon n0": "".join(f"transfer.corrupt_send=corrupt@{i};" for i in range(31, 120, 7))}),
    NODE, "memory",
)  # fmt: skip

# ---------------------------------------------------------------- training scripts of all kinds

for name, arguments in (
    ("sgd", ("--optimizer", "sgd")),
    ("factored", ("--optimizer", "factored")),
    ("orthogonal", ("--optimizer", "orthogonal")),
    ("amp", ("--amp",)),
    ("forked-loader", ("--loader",)),
    ("one-cycle", ("--one-cycle",)),
):
    add(f"node-spare-{name}-fsdp2-n3", fsdp2(3, 1, *arguments, spares=1), NODE, **DECODED)
    add(f"worker-{name}-ddp-n2", ddp(2, 1, *arguments), ONE, **MEMORY)
add("all-workers-zero1-ddp-n2", ddp(2, 1, "--optimizer", "zero1"), "at 6; kill workers; go", **MEMORY)
add("node-spare-zero1-ddp-n3", ddp(3, 1, "--optimizer", "zero1", spares=1), NODE, **DECODED)
add("node-spare-batchnorm-ddp-n3", ddp(3, 1, "--batchnorm", spares=1), NODE, **DECODED)
add("all-workers-batchnorm-ddp-n2", ddp(2, 1, "--batchnorm"), "at 6; kill workers; go", **MEMORY)

# ---------------------------------------------------------------- no tricks: plain `torchrun script.py`

add("plain-torchrun-worker-fsdp2-n2", fsdp2(2, real=True), "at 4; kill worker n1; go", **MEMORY)
add("plain-torchrun-node-spare-ddp-n2", ddp(2, real=True, spares=1), "at 4; kill node n1; go", **DECODED)
add(
    "plain-torchrun-coordinator-and-daemon-fsdp2-n2", fsdp2(2, real=True),
    "at 4; kill coordinator; kill daemon n0; start coordinator; start daemon n0; cli; go", "undisturbed",
)  # fmt: skip
