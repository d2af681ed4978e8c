"""
`python tool.py NAME ARGUMENT...`: run a converter as its command does, and print how long it took behind its imports.

One process for both figures: the whole command is timed outside, by whoever starts this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def snapshotd(source: str, target: str, to: str) -> Callable[[], object]:
    from snapshotd.cli import convert, main

    assert convert.configure
    def run() -> None:
        if code := main(["convert", source, target, "--to", to]):
            sys.exit(code)

    return run


def ds_to_universal(source: str, target: str) -> Callable[[], object]:
    from deepspeed.checkpoint import ds_to_universal as tool

    sys.argv = ["ds_to_universal", "--input_folder", f"{source}/global_step1", "--output_folder", target]
    return lambda: tool.main(tool.parse_arguments())


def zero_to_fp32(source: str, target: str) -> Callable[[], object]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as tool

    return lambda: tool(source, target)


def dcp_to_torch_save(source: str, target: str) -> Callable[[], object]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as tool

    return lambda: tool(source, target)


def dcp_load(source: str, ranks: str, port: str) -> Callable[[], object]:
    """`dcp.load` of what `ranks` processes of FSDP2 hold of the same model; its own start is not counted."""
    import dcp

    return lambda: dcp.load_on(source, int(ranks), int(port))


if __name__ == "__main__":
    run = globals()[sys.argv[1]](*sys.argv[2:])
    began = time.perf_counter()
    found = run()
    seconds = found if isinstance(found, float) else time.perf_counter() - began
    print(f"\nseconds={seconds}", flush=True)
