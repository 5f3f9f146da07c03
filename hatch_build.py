"""Compile the kernel side. Used by the wheel's build and by ``make``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by make, outside of a build
    BuildHookInterface = object  # type: ignore[assignment, misc]

SOURCES = ("src/uffdguard/kernel/guard.bpf.c", "src/uffdguard/kernel/inspect.bpf.c")


def compile_bpf(source: Path, target: Path) -> None:
    """Compile SOURCE to the BPF object TARGET; warnings are errors."""
    machine = os.uname().machine
    headers = Path(__file__).parent / "src/uffdguard/kernel"
    command = ["clang", "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unused-parameter", f"-I/usr/include/{machine}-linux-gnu", f"-I{headers}"]
    command += ["-c", str(source), "-o", str(target)]
    # Otherwise the path of the source tree would be in the object, and no two builds alike.
    command += [f"-ffile-prefix-map={Path.cwd()}=."]
    subprocess.run(command, check=True)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the objects into the wheel, and the machines' names on it: on others nothing knows the registers."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files are collected."""
        if self.target_name == "wheel":
            for name in SOURCES:
                source = Path(self.root, name)
                compile_bpf(source, source.with_suffix(".o"))
            build_data["tag"] = "py3-none-linux_aarch64.linux_x86_64"


if __name__ == "__main__":
    compile_bpf(Path(sys.argv[1]), Path(sys.argv[2]))
