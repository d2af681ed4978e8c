"""
Compiles snapshotd/native for the machine that the package is built on.

What it has is only faster than what is there without it: where it cannot be compiled, the package is built without it,
and says so.
"""

import contextlib
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

SOURCE = Path("snapshotd/native/copy_digest.c")
FLAGS = ("-O3", "-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden")


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root) / SOURCE
        library, made = source.with_suffix(".so"), source.with_suffix(".so.new")
        compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
        try:
            command = [*shlex.split(compiler), *FLAGS, "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            with contextlib.suppress(OSError):  # where nothing can be written
                library.unlink()  # of another source, or another machine
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"{SOURCE} was not compiled; copies and digests will be slower: {reason}")
            return
        made.replace(library)  # programs that use the old one go on with it
        build_data["artifacts"].append(SOURCE.with_suffix(".so").as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(iter(platform_tags()))}"
