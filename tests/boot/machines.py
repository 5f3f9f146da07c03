"""A Debian of its own: as a root file system, and on a disk that QEMU boots for one phase of ``guest.sh``."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard.lab import kernels, vm
from uffdguard.lab.kernels import Apt

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: What booting and our package need.
BOOT = (
    *("systemd", "systemd-sysv", "udev", "kmod", "procps", "dbus", "initramfs-tools", "linux-image-amd64", "zstd"),
    *("python3", "python3-click", "libbpf1"),
)
SECONDS = 1800


def base(suite: str, packages: Sequence[str]) -> Path:
    """Return a fresh Debian below the user's cache; make it when it is not there."""
    key = hashlib.sha256(repr((suite, packages)).encode()).hexdigest()[:8]
    root = kernels.cache() / "roots" / f"{suite}-{key}"
    if not root.exists():
        partial = root.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        uri = Apt((suite,)).uris()["Debian"]
        argv = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(partial), uri]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        partial.rename(root)
    return root


def make_disk(folder: Path, base: Path, packages: dict[str, Path]) -> None:
    """Make in FOLDER a disk of BASE, with PACKAGES below /root, and the kernel to boot it with."""
    root = folder / "root"
    subprocess.run(["cp", "-a", base, root], check=True)
    for user in ("user", "stranger"):
        subprocess.run(["chroot", root, "useradd", "-m", "-s", "/bin/bash", user], check=True)
    subprocess.run(["chroot", root, "usermod", "-a", "-G", "kvm", "user"], check=True)
    for name, package in packages.items():
        shutil.copy(package, root / "root" / name)
    shutil.copy(ROOT / "build/actor", root / "root/actor")
    shutil.copy(HERE / "guest.sh", root / "root/guest.sh")
    (root / "root").chmod(0o755)
    shutil.rmtree(root / "var/log/journal", ignore_errors=True)  # of each boot alone
    units = {
        "told": "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/bin/bash /root/guest.sh\n",
        "before": "[Unit]\nDefaultDependencies=no\nAfter=systemd-remount-fs.service\n"
        "Before=systemd-modules-load.service systemd-sysctl.service uffdguard.service\n"
        "[Service]\nType=oneshot\nExecStart=/bin/bash /root/guest.sh before\n",
    }
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    for name, unit in units.items():
        (wants.parent / f"{name}.service").write_text(unit)
        (wants / f"{name}.service").symlink_to(f"../{name}.service")
    (root / "etc/modules-load.d/kvm.conf").write_text("kvm_amd\n")
    for name in ("image", "initrd"):
        (file,) = root.glob("boot/vmlinuz-*" if name == "image" else "boot/initrd.img-*")
        shutil.copy(file, folder / name)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, folder / "disk", "3G"], check=True)
    shutil.rmtree(root)


def boot(machine: Path, name: str, parameters: Sequence[str] = ()) -> dict[str, str]:
    """Boot the disk in MACHINE for the phase NAME, with PARAMETERS for the kernel, and return what was told."""
    told = machine / f"{name}.told"
    argv = ["qemu-system-x86_64", "-machine", "q35", "-cpu", "qemu64,+svm,+npt", "-m", "2G", "-smp", "2"]
    argv += [*vm.ONE_THREAD, "-nodefaults", "-display", "none", "-no-reboot"]
    # A package manager waits for the disk after each file; this one need not survive the machine.
    argv += ["-drive", f"file={machine}/disk,format=raw,if=virtio,cache=unsafe"]
    argv += ["-kernel", f"{machine}/image", "-initrd", f"{machine}/initrd"]
    argv += ["-append", " ".join(["root=/dev/vda", "rw", "console=ttyS0", "panic=-1", f"phase={name}", *parameters])]
    for file in (f"{name}.console", told.name, f"{name}.log"):
        argv += ["-serial", f"file:{machine}/{file}"]
    began = time.monotonic()
    subprocess.run(argv, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    lines = told.read_text().replace("\r", "").splitlines()
    print(f"{name}, {time.monotonic() - began:.0f} s, {machine}:", *lines, sep="\n  ")
    facts = dict(line.split("=", 1) for line in lines)
    assert facts.pop("end") == "1"
    return facts
