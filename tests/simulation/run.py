"""
Run simulated worlds: `python -m tests.simulation.run --seeds 2000 [--start N] [--log]`.

Prints the seeds that broke an invariant, and which rare situations were reached how often.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.checks import InvariantBroken
from tests.simulation.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--log", action="store_true", help="print all that happens (for one seed)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the 20th broken seed")
    options = parser.parse_args()
    began, broken, probes, faults, steps = time.perf_counter(), [], Counter[str](), 0, 0
    for seed in range(options.start, options.start + options.seeds):
        world = World(seed, log=options.log)
        try:
            world.run()
        except InvariantBroken as error:
            broken.append(seed)
            print(error)
        except Exception as error:  # a crash of a core is a broken seed like any other
            broken.append(seed)
            print(f"seed {seed} at {world.clock.now:.3f}: {type(error).__name__}: {error}")
            if options.seeds == 1:
                raise
        finally:
            if options.log and world.clock.log is not None:
                print("\n".join(world.clock.log))
        probes += world.probes
        faults += len(world.faults.done)
        steps += world.clock.steps
        if len(broken) >= 20 and not options.keep_going:
            break
    seconds = time.perf_counter() - began
    print(
        f"{options.seeds} seeds, {len(broken)} broken {broken[:20]}, {faults} faults, {steps} events, {seconds:.1f} s"
    )
    for name, count in sorted(probes.items()):
        print(f"  {name} {count}")
    if options.seeds == 1:
        print(f"trace {world.clock.trace}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
