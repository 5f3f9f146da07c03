"""The whole benchmark, ``make bench``: boot the VMs, keep the figures in docs/performance.json, write the report.

With names of parts of guest.py, only these are measured anew; with ``report``, none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import report
from uffdguard import __version__

UFFDGUARD = Path(sys.executable).with_name("uffdguard")
COUNT = "--count-instructions"

#: What is measured together, in one VM: the parts, and the options of the lab.
BOOTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("versions", "calls"), (COUNT,)),
    (("grants", "threads", "refusals"), (COUNT,)),
    (("commands", "memory"), (COUNT,)),
    (("bare",), (COUNT, "--append", "lsm=landlock,lockdown,yama,bpf")),
    (("selinux",), (COUNT, "--append", "apparmor=0")),
    *(((f"cpus_{cpus}",), ("--cpus", str(cpus))) for cpus in (1, 2, 4)),
)


def lab(parts: tuple[str, ...], options: tuple[str, ...]) -> dict[str, Any]:
    """Measure PARTS in a VM."""
    print(f"{', '.join(parts)} ...", file=sys.stderr)
    command: list[str | Path] = [UFFDGUARD, "lab", "--kernel", "6.12", "--memory", "2G", "--timeout", "3600", *options]
    command += ["--", sys.executable, "-m", "bench.guest", *parts]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {name: result for line in done.stdout.splitlines() for name, result in json.loads(line).items()}


def host() -> dict[str, Any]:
    """Return what is the same on any machine, and what the figures depend on beside the kernel."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", "build/wheel"], check=True, stdout=2)
    (wheel,) = Path("build/wheel").glob(f"uffdguard-{__version__}-*.whl")

    def first_line(*command: str) -> str:
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]

    return {
        "wheel": wheel.stat().st_size,
        "uffdguard": __version__,
        "qemu": re.findall(r"version (\S+)", first_line("qemu-system-x86_64", "--version"))[0],
        "clang": re.findall(r"version (\S+)", first_line("clang", "--version"))[0],
    }


def main() -> None:
    """Measure what the arguments name, all by default, and write the report."""
    wanted = set(sys.argv[1:]) or {name for parts, _ in BOOTS for name in parts} | {"host"}
    found: dict[str, Any] = json.loads(report.FIGURES.read_text()) if sys.argv[1:] else {}
    if "host" in wanted:
        found["host"] = host()
    for parts, options in BOOTS:
        if chosen := tuple(name for name in parts if name in wanted):
            found |= lab(chosen, options)
    report.FIGURES.write_text(json.dumps(found, indent=1) + "\n")
    report.write(found)


if __name__ == "__main__":
    main()
