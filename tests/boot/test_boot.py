"""The package on a Debian of its own, booted with systemd: from early boot on, and through everything that happens.

Each boot is one phase of ``guest.sh``, which tells what it sees; the tests look at what it told.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffdguard.lab import kernels, vm
from uffdguard.lab.kernels import Apt

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "kmod", "procps", "dbus", "initramfs-tools", "linux-image-amd64", "zstd"),
    *("python3", "python3-click", "libbpf1", "libfuse3-3"),
    *("podman", "netavark", "crun", "uidmap", "slirp4netns", "busybox-static"),
)
SECONDS = 900


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a disk that has the two packages, and the kernel to boot it with."""
    folder = tmp_path_factory.mktemp("machine")
    root = folder / "root"
    subprocess.run(["cp", "-a", base(), root], check=True)
    (first,) = (ROOT / "dist").glob("uffdguard_*.deb")
    shutil.copy(first, root / "root/uffdguard_1_amd64.deb")
    repack(first, root / "root/uffdguard_2_amd64.deb", folder)
    shutil.copy(ROOT / "build/actor", root / "root/actor")
    shutil.copy(HERE / "guest.sh", root / "root/guest.sh")
    (root / "root").chmod(0o755)
    (root / "etc/systemd/system/told.service").write_text(
        "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/bin/bash /root/guest.sh\n"
        "[Install]\nWantedBy=default.target\n"
    )
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "told.service").symlink_to("../told.service")
    (root / "etc/modules-load.d/kvm.conf").write_text("kvm_amd\n")
    for name in ("image", "initrd"):
        (file,) = root.glob("boot/vmlinuz-*" if name == "image" else "boot/initrd.img-*")
        shutil.copy(file, folder / name)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, folder / "disk", "3G"], check=True)
    shutil.rmtree(root)
    return folder


def base() -> Path:
    """Return a fresh Debian below the user's cache; make it when it is not there."""
    root = kernels.cache() / "roots" / SUITE
    if not root.exists():
        partial = root.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        uri = Apt((SUITE,)).uris()["Debian"]
        argv = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(partial), uri]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        for user in ("user", "stranger"):
            subprocess.run(["chroot", partial, "useradd", "-m", "-s", "/bin/bash", user], check=True)
        subprocess.run(["chroot", partial, "usermod", "-a", "-G", "kvm", "user"], check=True)
        partial.rename(root)
    return root


def repack(package: Path, target: Path, folder: Path) -> None:
    """Make of PACKAGE one of a higher version, with another object: compiled without debugging lines, say."""
    tree = folder / "package"
    subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", "Version: 9.0", control.read_text(), flags=re.MULTILINE))
    with (tree / "usr/lib/uffdguard/uffdguard/kernel/guard.bpf.o").open("ab") as file:
        file.write(b"\0" * 16)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, target], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)


@pytest.fixture(scope="module")
def boot(machine: Path) -> Callable[..., dict[str, str]]:
    """Return a function that boots the machine for one phase and returns what was told."""

    def phase(name: str, *words: str) -> dict[str, str]:
        told = machine / f"{name}.told"
        argv = ["qemu-system-x86_64", "-machine", "q35", "-cpu", "qemu64,+svm,+npt", "-m", "2G", "-smp", "2"]
        argv += [*vm.ONE_THREAD, "-nodefaults", "-display", "none", "-no-reboot"]
        argv += ["-drive", f"file={machine}/disk,format=raw,if=virtio"]
        argv += ["-kernel", f"{machine}/image", "-initrd", f"{machine}/initrd"]
        argv += ["-append", " ".join(["root=/dev/vda", "rw", "console=ttyS0", "panic=-1", f"phase={name}", *words])]
        argv += ["-serial", f"file:{machine}/{name}.console", "-serial", f"file:{told}"]
        subprocess.run(argv, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        lines = told.read_text().replace("\r", "").splitlines()
        print(f"{name}:", *lines, sep="\n  ")
        facts = dict(line.split("=", 1) for line in lines)
        assert facts.pop("end") == "1"
        return facts

    return phase


@pytest.fixture(scope="module")
def incapable(boot: Callable[..., dict[str, str]]) -> dict[str, str]:
    return boot("incapable", "lsm=lockdown,yama,integrity")


@pytest.fixture(scope="module")
def off(boot: Callable[..., dict[str, str]], incapable: dict[str, str]) -> dict[str, str]:
    return boot("off", "uffdguard=off")


@pytest.fixture(scope="module")
def on(boot: Callable[..., dict[str, str]], off: dict[str, str]) -> dict[str, str]:
    return boot("on")


pytestmark = pytest.mark.timeout(4 * SECONDS)
KVM = "disabled enabled [kvm]"


def test_where_it_cannot_enforce_it_installs_and_says_so_in_the_journal(incapable: dict[str, str]) -> None:
    assert incapable["installed"] == "0"
    assert incapable["units"] == "failed;inactive;inactive"
    assert "the policy cannot be put in force here: LSM list: no bpf in lockdown" in incapable["journal"]
    assert "boot with lsm=" in incapable["journal"]
    assert incapable["file"] == "0"


def test_a_switch_on_the_kernel_command_line_keeps_it_out_for_one_boot(off: dict[str, str]) -> None:
    assert off["units"] == "inactive;inactive;inactive"
    # What sysctl.d says then is not for the native file either: it is no number.
    assert off["file"] == "0"


def test_from_early_boot_on_the_mode_is_that_of_sysctl_d(on: dict[str, str]) -> None:
    assert on["units"] == "active;active;active"
    assert on["file"] == KVM
    assert on["status"] == "in force;kvm;served"
    assert on["mode-for-users"] == KVM


def test_a_stranger_is_refused_and_who_opens_kvm_is_allowed(on: dict[str, str]) -> None:
    assert on["refused"] == "EPERM;EPERM"
    assert on["allowed"] == "allowed;allowed;allowed;EPERM"


def test_each_refusal_is_in_the_journal(on: dict[str, str]) -> None:
    refused = "userfaultfd refused (no-kvm): actor, pid N, user"
    assert on["logged"] == ";".join([f"{refused} stranger"] * 2 + [f"{refused} user"])
    assert on["report"].startswith("3 uses of userfaultfd by 1 program, ")


def test_what_needs_a_library_that_is_only_recommended_says_so(on: dict[str, str]) -> None:
    assert on["metrics"] == "uffdguard: prometheus_client is missing; apt install python3-prometheus-client"


def test_the_knobs_service_is_hardened_and_small(on: dict[str, str]) -> None:
    figure = re.search(r"level for uffdguard-knob.service: ([\d.]+)", on["security"])
    assert figure, on["security"]
    assert float(figure[1]) <= 3.0
    assert int(on["resident"].split()[1]) <= 20 * 1024


def test_rootless_containers_and_fresh_procfs_mounts_work(on: dict[str, str]) -> None:
    assert on["fresh-procfs"] == "mounted"
    assert on["container"] == "started"


def test_a_wrong_word_is_refused_and_logged(on: dict[str, str]) -> None:
    assert on["wrong-word"] == "1;1"


def test_a_killed_knob_comes_back(on: dict[str, str]) -> None:
    assert on["killed"] == f"{KVM};active;active;active"


def test_a_reload_keeps_the_mode_that_is_set(on: dict[str, str]) -> None:
    assert on["reloaded"] == "disabled [enabled] kvm"


def test_a_restart_keeps_the_mode_that_is_set(on: dict[str, str]) -> None:
    assert on["restarted"] == "disabled [enabled] kvm;active;active;active"


def test_an_upgrade_has_no_gap_and_keeps_mode_and_grants(on: dict[str, str]) -> None:
    assert on["after-upgrade"] == f"{KVM};active;active;active;9.0"
    assert on["upgrade-refused"] == "EPERM"
    assert on["upgrade-granted"] == "allowed"
    assert all(int(number) > 5 for number in on["upgrade-asked"].split())


def test_stop_and_start_do_what_one_expects(on: dict[str, str]) -> None:
    assert on["stopped"] == "0;inactive;inactive;inactive"
    assert on["started"] == "[disabled] enabled kvm;active;active;active"


def test_a_removed_package_leaves_nothing(on: dict[str, str]) -> None:
    status, file, *left = on["removed"].split(";")
    assert (status, file, left) == ("0", "0", [])
    assert on["pins"] == ""
