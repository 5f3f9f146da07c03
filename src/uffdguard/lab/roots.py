"""The root file system of a VM whose architecture is not this machine's: a Debian of packages that are unpacked only.

It is of this machine's own suite, so that its Python is of the version of ours, and ours finds its modules there.
"""

from __future__ import annotations

import compileall
import fcntl
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.lab.kernels import Apt, cache
from uffdguard.lab.processes import need, output

if TYPE_CHECKING:
    from pathlib import Path

    from uffdguard.lab.architectures import Architecture

#: With all that they depend on, and what Debian cannot be without.
PACKAGES = (
    *("busybox-static", "iproute2", "kmod", "procps", "systemd-sysv", "udev", "util-linux-extra"),
    *("python3", "libbpf1", "prometheus", "stress-ng", "qemu-system-arm"),
    *("clang", "libbpf-dev", "libc6-dev"),  # tests compile variants of the kernel side
)

#: Of the disk. What nothing was written to takes no room.
SIZE = "4G"

#: Debian is in one tree since 12; its packages are not, and would replace these links.
MERGED = ("bin", "sbin", "lib")

#: What scripts of the packages make, which are not run: they are for that architecture, too.
DIRECTORIES = ("home", "media", "mnt", "opt", "root", "srv", "usr/local/bin")
LINKS = {"usr/bin/awk": "mawk", "usr/bin/which": "which.debianutils"}
GROUPS = "kvm:x:36:\nsystemd-journal:x:999:\n"
FILES = {"fstab": "", "hosts": "127.0.0.1 localhost\n", "shadow": ""} | {
    f"pam.d/common-{kind}": f"{kind} required pam_permit.so\n" for kind in ("account", "auth", "password", "session")
}


@dataclass(frozen=True)
class Root:
    """A root file system in the cache. No VM changes it."""

    directory: Path

    @property
    def disk(self) -> Path:
        """The image, of ext4: the guest keeps in its memory what it has read of it, unlike what it reads over 9p."""
        return self.directory / "disk"

    @property
    def busybox(self) -> Path:
        """What mounts the disk in the guest."""
        return self.directory / "busybox"


def get(architecture: Architecture) -> Root:
    """Return the root file system in the cache; without one, make it.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    root = Root(cache() / "disks" / f"{suite}-{architecture.name}")
    if not root.directory.exists():
        apt = Apt((suite, f"{suite}-security"), architecture)
        with (apt.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not root.directory.exists():
                make(root, apt)
    return root


def make(root: Root, apt: Apt) -> None:
    """Fetch the packages by APT and make ROOT of them.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    mke2fs = [need("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-O", "^has_journal"]
    partial = Root(root.directory.with_name(f"{root.directory.name}.partial"))
    tree = partial.directory / "tree"
    shutil.rmtree(partial.directory, ignore_errors=True)
    try:
        for name in MERGED:
            (tree / "usr" / name).mkdir(parents=True)
            (tree / name).symlink_to(f"usr/{name}")
        apt.update()
        for deb in apt.closure(["?essential", *PACKAGES], f"Debian for {apt.architecture.name}"):
            unpack(deb, tree)
        for name in DIRECTORIES:
            (tree / name).mkdir(parents=True, exist_ok=True)
            (tree / name).chmod(0o755)  # /root is on the way to what somebody else may run
        for link, target in LINKS.items():
            (tree / link).symlink_to(target)
        for name in ("passwd", "group"):
            text = (tree / f"usr/share/base-passwd/{name}.master").read_text()
            (tree / "etc" / name).write_text(text + (GROUPS if name == "group" else ""))
        for name, text in FILES.items():
            (tree / "etc" / name).write_text(text)
        # The guest would compile what it imports at each boot. Our Python is of the version of that one.
        for library in (tree / "usr/lib").glob("python3.*"):
            compileall.compile_dir(library, stripdir=tree, prependdir="/", quiet=2, workers=0)
        # To who is not root here, all of it belongs; there, to root.
        as_root = [] if os.geteuid() == 0 else [need("unshare", "util-linux"), "--map-root-user"]
        output([*as_root, *mke2fs, "-d", tree, partial.disk, SIZE])
        shutil.copy(tree / "usr/bin/busybox", partial.busybox)
        shutil.rmtree(tree)
        partial.directory.rename(root.directory)
    finally:
        shutil.rmtree(partial.directory, ignore_errors=True)


def unpack(deb: Path, root: Path) -> None:
    """Unpack a package into ROOT; a directory of it may be a link there.

    Raises:
        Failure: It could not be.
    """
    with subprocess.Popen([need("dpkg-deb", "dpkg"), "--fsys-tarfile", deb], stdout=subprocess.PIPE) as tar:
        done = subprocess.run(["tar", "-xp", "--keep-directory-symlink", "-C", root], stdin=tar.stdout)
    if tar.returncode or done.returncode:
        raise Failure(f"lab: {deb.name} could not be unpacked")
