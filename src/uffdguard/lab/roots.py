"""The root file system of a VM whose architecture is not this machine's: a Debian of packages that are unpacked only.

It is of this machine's own suite, so that its Python is of the version of ours, and ours finds its modules there.
"""

from __future__ import annotations

import compileall
import fcntl
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.lab.kernels import Apt, cache
from uffdguard.lab.processes import need

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdguard.lab.architectures import Architecture

#: With all that they depend on, and what Debian cannot be without.
PACKAGES = (
    *("busybox-static", "iproute2", "kmod", "procps", "systemd-sysv", "udev", "util-linux-extra"),
    *("python3", "libbpf1", "prometheus", "stress-ng", "qemu-system-arm"),
    *("clang", "libbpf-dev", "libc6-dev"),  # tests compile variants of the kernel side
)

#: Debian is in one tree since 12; its packages are not, and would replace these links.
MERGED = ("bin", "sbin", "lib")

#: What scripts of the packages make, which are not run: they are for that architecture, too.
DIRECTORIES = ("home", "media", "mnt", "opt", "root", "srv", "usr/local/bin")
LINKS = {"usr/bin/awk": "mawk", "usr/bin/which": "which.debianutils"}
GROUPS = "kvm:x:36:\nsystemd-journal:x:999:\n"
FILES = {"fstab": "", "hosts": "127.0.0.1 localhost\n", "shadow": ""} | {
    f"pam.d/common-{kind}": f"{kind} required pam_permit.so\n" for kind in ("account", "auth", "password", "session")
}


def get(architecture: Architecture) -> Path:
    """Return the root file system in the cache; without one, make it.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    root = cache() / "roots" / f"{suite}-{architecture.name}"
    if not root.exists():
        apt = Apt((suite, f"{suite}-security"), architecture)
        with (apt.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not root.exists():
                make(root, apt)
    share(root, [Path(sys.base_prefix)], "/usr")
    return root


def make(root: Path, apt: Apt) -> None:
    """Fetch the packages by APT and unpack them to ROOT.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in MERGED:
            (partial / "usr" / name).mkdir(parents=True)
            (partial / name).symlink_to(f"usr/{name}")
        apt.update()
        for deb in apt.closure(["?essential", *PACKAGES], f"Debian for {apt.architecture.name}"):
            unpack(deb, partial)
        for name in DIRECTORIES:
            (partial / name).mkdir(parents=True, exist_ok=True)
        for link, target in LINKS.items():
            (partial / link).symlink_to(target)
        for name in ("passwd", "group"):
            text = (partial / f"usr/share/base-passwd/{name}.master").read_text()
            (partial / "etc" / name).write_text(text + (GROUPS if name == "group" else ""))
        for name, text in FILES.items():
            (partial / "etc" / name).write_text(text)
        # The guest would compile what it imports at each boot. Our Python is of the version of that one.
        for library in (partial / "usr/lib").glob("python3.*"):
            compileall.compile_dir(library, stripdir=partial, prependdir="/", quiet=2, workers=0)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unpack(deb: Path, root: Path) -> None:
    """Unpack a package into ROOT; a directory of it may be a link there.

    Raises:
        Failure: It could not be.
    """
    with subprocess.Popen([need("dpkg-deb", "dpkg"), "--fsys-tarfile", deb], stdout=subprocess.PIPE) as tar:
        done = subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", root], stdin=tar.stdout)
    if tar.returncode or done.returncode:
        raise Failure(f"lab: {deb.name} could not be unpacked")


def share(root: Path, paths: Iterable[Path], target: str | None = None) -> None:
    """Make PATHS in ROOT, for what is mounted there in the guest; or links to TARGET, where they are not there."""
    for path in paths:
        inside = root / path.relative_to("/")
        if target is None:
            inside.mkdir(parents=True, exist_ok=True)
        elif not inside.exists() and not inside.is_symlink():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(target)
