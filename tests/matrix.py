"""The suites on every kernel line of the lab, two VMs at a time: ``make test-matrix``.

Usage: ``matrix.py [--write FILE] SUITE...``; a SUITE is what pytest is given. Those below REFUSED are for the lines
that are refused, the others for those that are supported. The result is printed; when all passed, --write keeps it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from uffdguard import __version__
from uffdguard.errors import Failure
from uffdguard.lab import kernels
from uffdguard.lab.architectures import AMD64, ARM64, Architecture

REFUSED = "tests/refused"
LOGS = Path("build/matrix")

#: What is tried: all lines and flavours of amd64; of arm64 the oldest that can, the one before it and the newest.
ROWS = (
    *((line, AMD64) for line in (*kernels.LINES, *kernels.FLAVOURS)),
    *((line, ARM64) for line in (kernels.find_line("6.1"), kernels.oldest(ARM64), kernels.NEWEST)),
)

DOCUMENT = """\
# The kernels

What `{command}` found on {date} of uffdguard {version}: for each kernel line of `uffdguard lab kernels`, what
came of each suite of tests, and the minutes and seconds that it took under QEMU's emulation. Where tests were skipped,
the kernel or the machine lacks what they are about; the deselected take long, and are those of
`make test-clients-long`. On a line that is refused, nothing can be put in force; its suite sees that each command says
so, and leaves nothing behind.

{table}
"""


@dataclass(frozen=True)
class Result:
    """How a suite ended on a kernel."""

    passed: bool
    text: str


def summary(status: int, log: str) -> Result:
    """Return the result that pytest's last line tells of.

    It counts only when the exit STATUS agrees, and at least one test passed.
    """
    lines = re.findall(r"^=* ?(\d+ \w+(?:, \d+ \w+)*) in ([\d.]+)s\b.*$", log, re.MULTILINE)
    if not lines:
        return Result(passed=False, text=f"not finished, status {status}")
    counts, seconds = lines[-1]
    passed = status == 0 and re.search(r"\d+ passed", counts) is not None
    minutes, rest = divmod(round(float(seconds)), 60)
    return Result(passed, f"{counts}, {minutes}:{rest:02}")


def run(line: str, architecture: Architecture, suite: str) -> Result:
    """Run SUITE on LINE, as `make test-vm` or `make test-arm64` does; on a failure show all that it printed."""
    target = f"test-{'vm' if architecture == AMD64 else architecture.name}-{line}"
    log = LOGS / f"{target}-{suite.replace('/', '-')}.log"
    with log.open("wb") as file:
        command = ["make", "--no-print-directory", target, f"TESTS={suite}"]
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    result = summary(status, text)
    print(f"{'' if result.passed else text}Linux {line} on {architecture.name}, {suite}: {result.text}", flush=True)
    return result


def debian_version(kernel: kernels.Kernel) -> str:
    """Return the version of the package that an image is of: ``uname -r`` is the same for many.

    Documentation/arch/x86/boot.rst has it that kernel_version, at 0x20e, is where the image's own words are.
    """
    image = kernel.image.read_bytes()
    if kernel.architecture == ARM64:  # not compressed
        words = image[image.index(b"#1 SMP ") :]
    else:
        words = image[0x200 + int.from_bytes(image[0x20E:0x210], "little") :]
    version: str = re.findall(r"Debian (\d\S+)", words.split(b"\0", 1)[0].decode())[0]
    return version


def table(rows: list[list[str]]) -> str:
    """Return ROWS, the heading first, as a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def main() -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("suites", nargs="+", metavar="SUITE")
    arguments = parser.parse_args()
    suites: list[str] = arguments.suites

    found = {row: kernels.get(row[0].name, row[1]) for row in ROWS}
    LOGS.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(2)
    try:
        results = {
            (row, suite): pool.submit(run, kernels.line_name(kernel.release), row[1], suite)
            for row, kernel in found.items()
            for suite in suites
            if suite.startswith(REFUSED) != row[0].supported(row[1])
        }
        passed = all(result.result().passed for result in results.values())
    finally:
        pool.shutdown(cancel_futures=True)

    rows = [["line", "policy", "kernel", "version in Debian", *suites]]
    for row, kernel in found.items():
        name, told = kernels.line_name(kernel.release), "supported" if row[0].supported(row[1]) else "refused"
        cells = [results[row, suite].result().text if (row, suite) in results else "" for suite in suites]
        rows.append([name, told, kernel.release, debian_version(kernel), *cells])
    command = "make test-matrix" if arguments.write else f"make test-matrix TESTS='{' '.join(suites)}'"
    document = DOCUMENT.format(command=command, date=time.strftime("%Y-%m-%d"), version=__version__, table=table(rows))
    print(document, end="")
    if not passed:
        print(f"not all passed; the logs are in {LOGS}", file=sys.stderr)
        return 1
    if arguments.write:
        arguments.write.write_text(document)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as error:
        sys.exit(f"uffdguard: {error}")
