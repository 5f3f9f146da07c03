"""Fetch and build what the tests of programs run and this machine's Debian does not have. Run by ``make``.

The debs stay in the lab's cache; DIRECTORY gets what is unpacked and built out of them.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from pathlib import Path

from uffdguard.lab.kernels import Apt
from uffdguard.lab.processes import output

#: A newer Debian: its QEMU opens /dev/userfaultfd where it may, and its CRIU knows the vDSO of the newest kernels.
NEWER = (("trixie",), ("qemu-system-x86", "criu"))

#: The kernel's own tests. They find out what the running kernel can do and skip the rest.
SOURCE = (("trixie", "trixie-security", "bookworm-security"), "linux-source-6.12")
FILES = (
    "*/tools/testing/selftests/kselftest.h",
    "*/tools/testing/selftests/mm/uffd-*",
    "*/tools/testing/selftests/mm/vm_util.*",
    "*/tools/include/uapi/linux/fs.h",
    "*/tools/include/uapi/linux/userfaultfd.h",
    "*/mm/gup_test.h",
)
UNPACK = """
deb=$1 directory=$2
shift 2
dpkg-deb --fsys-tarfile "$deb" | tar -xO --wildcards '*.tar.xz' | \\
    tar -xJ -C "$directory" --strip-components=1 --wildcards "$@"
"""
TESTS = ("uffd-unit-tests", "uffd-stress")


def newer(directory: Path) -> None:
    """Unpack the newer programs with all that they depend on."""
    suites, packages = NEWER
    apt = Apt(suites)
    with (apt.directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        apt.update()
        for deb in apt.closure(packages, "newer programs"):
            output(["dpkg-deb", "-x", deb, directory])


def selftests(directory: Path) -> None:
    """Build the kernel's tests of userfaultfd."""
    suites, package = SOURCE
    apt = Apt(suites)
    with (apt.directory / "lock").open("w") as file, tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not list(apt.directory.glob(f"{package}_*.deb")):
            apt.update()
            apt.download([package], apt.directory, package)
        (deb,) = apt.directory.glob(f"{package}_*.deb")
        subprocess.run(["sh", "-ec", UNPACK, "sh", deb, folder, *FILES], check=True)
        directory.mkdir()
        sources = Path(folder, "tools/testing/selftests/mm")
        for name in TESTS:
            argv = ["clang", "-O2", "-pthread", "-D_GNU_SOURCE=", "-isystem", f"{folder}/tools/include/uapi"]
            argv += [f"{sources}/{part}.c" for part in (name, "uffd-common", "vm_util")]
            subprocess.run([*argv, "-o", directory / name], check=True)


if __name__ == "__main__":
    {"newer": newer, "selftests": selftests}[sys.argv[1]](Path(sys.argv[2]).absolute())
