"""The package on a Debian of its own, booted with systemd: from early boot on, and through everything that happens.

Each boot is one phase of ``guest.sh``, which tells what it sees; the tests look at what it told.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from boot import machines

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: `make deb` makes the package of this machine's own.
SUITE = platform.freedesktop_os_release()["VERSION_CODENAME"]
PACKAGES = (
    *machines.BOOT,
    *(() if SUITE == "bookworm" else ("python3-msgspec",)),
    *("podman", "netavark", "crun", "uidmap", "slirp4netns", "busybox-static"),
)
#: The phases of guest.sh, with what the kernel's command line has for each.
WITHOUT_LSM = "lsm=lockdown,yama,integrity"
PHASES = {
    "incapable": [WITHOUT_LSM],
    "off": ["uffdguard=off"],
    "without_lsm": [WITHOUT_LSM],
    "native": [WITHOUT_LSM],
    "without_python": [],
    "typo": [],
    "hardened": [],
    "without_jit": [],
    "on": [],
}
#: At these, the start at boot has failed.
FAILED = ["without_lsm", "without_python", "typo"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a disk that has the two packages, and the kernel to boot it with."""
    folder = tmp_path_factory.mktemp("machine")
    (first,) = (machines.ROOT / "dist").glob("uffdguard_*_amd64.deb")
    second = folder / "second.deb"
    repack(first, second, folder)
    packages = {"uffdguard_1_amd64.deb": first, "uffdguard_2_amd64.deb": second}
    machines.make_disk(folder, machines.base(SUITE, PACKAGES), packages)
    return folder


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
def boot(machine: Path) -> Callable[[str], dict[str, str]]:
    """Return a function that boots the machine for one phase, once, and returns what was told."""

    @functools.cache
    def phase(name: str) -> dict[str, str]:
        if name != "incapable":
            phase("incapable")  # which installs the package
        return machines.boot(machine, name, PHASES[name])

    return phase


@pytest.fixture(scope="module")
def on(boot: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return boot("on")


@pytest.fixture(scope="module")
def typo(boot: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return boot("typo")


pytestmark = pytest.mark.timeout(4 * machines.SECONDS)
KVM = "disabled enabled [kvm]"
CLOSED = (
    "uffdguard.service has failed and no policy is in force: vm.unprivileged_userfaultfd is 0 now (before: 1), so "
    "that nobody without CAP_SYS_PTRACE gets a userfaultfd for faults of the kernel by userfaultfd(2). See "
    "journalctl -u uffdguard.service, correct what it names, and run systemctl restart uffdguard.service."
)
WHY = {
    "without_lsm": "uffdguard: the policy cannot be put in force here: LSM list: no bpf in lockdown",
    "without_python": "/usr/bin/uffdguard: No such file or directory",
    "typo": "uffdguard: /etc/uffdguard.toml, line 1: mode: must be one of disabled, enabled, kvm, in quotes",
}


def test_where_it_cannot_enforce_it_installs_and_says_so_in_the_journal(
    boot: Callable[[str], dict[str, str]],
) -> None:
    incapable = boot("incapable")
    assert incapable["installed"] == "0"
    assert incapable["units"] == "failed;inactive;inactive"
    assert WHY["without_lsm"] in incapable["journal"]
    assert "boot with lsm=" in incapable["journal"]
    assert incapable["file"] == "0"
    assert incapable["fallback"].startswith(CLOSED)


def test_a_switch_on_the_kernel_command_line_keeps_it_out_for_one_boot(boot: Callable[[str], dict[str, str]]) -> None:
    off = boot("off")
    assert off["units"] == "inactive;inactive;inactive"
    # It has not failed: what sysctl.d says is the native knob's.
    assert (off["file"], off["failed"], off["fallback"]) == ("1", "", "")


@pytest.mark.parametrize("phase", FAILED)
def test_a_boot_at_which_the_start_fails_ends_with_the_knob_closed_and_says_so(
    boot: Callable[[str], dict[str, str]], phase: str
) -> None:
    facts = boot(phase)
    assert facts["units"] == "failed;inactive;inactive"
    assert facts["failed"] == "uffdguard.service"
    assert facts["file"] == "0"
    assert facts["refused"] == "EPERM"
    assert WHY[phase] in facts["journal"]
    assert facts["fallback"] == CLOSED
    order = [int(instant) for instant in facts["order"].split()]
    assert 0 not in order
    assert order == sorted(order)


def test_a_start_by_hand_that_fails_closes_it_too_and_one_that_does_not_opens_it(typo: dict[str, str]) -> None:
    assert typo["again"] == "1;0"
    assert typo["corrected"] == f"{KVM};active;active;active"


def test_a_reload_that_fails_leaves_the_policy_and_the_knob(typo: dict[str, str]) -> None:
    assert typo["reload"] == f"1;{KVM};1;active;active;active;2"


def test_a_restart_that_fails_leaves_the_policy_and_the_knob_and_says_so(typo: dict[str, str]) -> None:
    assert typo["restart"] == "1;1;1;failed;inactive;inactive;uffdguard.service"
    assert typo["restart-decides"] == "EPERM allowed;allowed"
    assert typo["restart-fallback"].startswith(
        "uffdguard.service has failed. The policy that was in force before stays in force, and the native knob as it is"
    )


def test_so_does_a_stop_that_fails(typo: dict[str, str]) -> None:
    assert typo["stop"] == "1;1;uffdguard.service"
    assert typo["stop-decides"] == "EPERM allowed;allowed"


def test_where_the_pins_are_gone_a_start_that_fails_closes_the_knob(typo: dict[str, str]) -> None:
    assert typo["gone"] == "1;0"


def test_the_backend_native_lasts_over_a_boot_and_what_udev_and_sysctl_d_apply(
    boot: Callable[[str], dict[str, str]],
) -> None:
    """The group of /dev/kvm is known when udev has given it, after the start; a rule and a sysctl would open both."""
    facts = boot("native")
    denied = "actor: /dev/userfaultfd: Permission denied"
    kvm = f"0;root:kvm 660;EPERM EPERM;{denied};allowed"
    assert (facts["units"], facts["failed"]) == ("active;inactive;inactive", "")
    assert facts["status"] == "0;in force;native, which is weaker than lsm: see below;root:kvm 0660"
    for when in ("at-boot", "applied", "reloaded"):
        assert facts[when] == kvm, when
    assert facts["reload"] == "0"
    for when in ("disabled", "restarted"):
        assert facts[when] == f"0;root:root 600;EPERM EPERM;{denied};{denied}", when
    # As it was found early in the boot, before or after udev; then what the machine's own files say is applied again.
    assert facts["stopped"] in ("0;root:root 600", "0;root:root 666")
    assert facts["given-back"] == "1;root:root 666"


@pytest.mark.parametrize("phase", ["hardened", "without_jit"])
def test_a_hardened_machine_is_enforced_on(boot: Callable[[str], dict[str, str]], phase: str) -> None:
    """All that hardening guides set, in sysctl.d, which is applied after the start."""
    facts = boot(phase)
    assert facts["units"] == "active;active;active"
    # The policy would be gone with ftrace; all else is as it was asked for.
    assert set(facts["sysctl"].split(";")) - {"net.core.bpf_jit_enable = 0"} == {
        "kernel.ftrace_enabled = 1",
        "net.core.bpf_jit_harden = 2",
        "kernel.unprivileged_bpf_disabled = 1",
        "kernel.kptr_restrict = 2",
        "kernel.perf_event_paranoid = 3",
        "kernel.yama.ptrace_scope = 3",
        "user.max_user_namespaces = 0",
        "kernel.modules_disabled = 1",
    }
    assert "sysctl kernel.ftrace_enabled = 0 refused: systemd-sysctl, pid N, user root; " in facts["journal"]
    assert "take it out of sysctl.d" in facts["journal"]
    for when in ("at-boot", "reloaded"):
        assert facts[when] == "EPERM;EPERM allowed;allowed;allowed"
        assert facts[f"{when}-status"].startswith("0;in force;kvm;1;served")
    assert facts["reload"] == "0"
    assert "kernel.ftrace_enabled" in facts["journal"]


def test_a_start_without_the_jit_compiler_works(boot: Callable[[str], dict[str, str]]) -> None:
    facts = boot("without_jit")
    assert "net.core.bpf_jit_enable = 0" in facts["sysctl"]
    assert facts["start"] == "0;active;active;active"
    assert facts["started"] == "EPERM;EPERM allowed;allowed;allowed"


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
    # What a program is called is the word of its user: the same of two users counts as two.
    assert on["report"].startswith("3 uses of userfaultfd by 2 programs, ")


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


def test_a_copy_of_the_file_in_another_mount_namespace_reads_on(on: dict[str, str]) -> None:
    """After a kill and a restart of its server, a reload, a restart and an upgrade."""
    enabled = "disabled [enabled] kvm"
    assert on["copied"].split(";") == [KVM, KVM, enabled, enabled, KVM]


def test_an_upgrade_has_no_gap_and_keeps_mode_and_grants(on: dict[str, str]) -> None:
    assert on["after-upgrade"] == f"{KVM};active;active;active;9.0"
    assert on["upgrade-refused"] == "EPERM"
    assert on["upgrade-granted"] == "allowed"
    assert all(int(number) > 5 for number in on["upgrade-asked"].split())


def test_stop_and_start_do_what_one_expects(on: dict[str, str]) -> None:
    assert on["stopped"] == "0;inactive;inactive;inactive"
    assert on["started"] == "[disabled] enabled kvm;active;active;active"


def test_a_server_that_is_stopped_while_systemd_is_about_to_restart_it_leaves_no_dead_file(on: dict[str, str]) -> None:
    assert on["crashed-stopped"] == "0;;active;inactive;active"


def test_a_server_that_cannot_begin_any_more_lets_nobody_wait_for_ever(on: dict[str, str]) -> None:
    assert on["waited"] == "1"
    assert on["given-up"] == "0;;active;failed;active"
    assert on["begun-again"] == "[disabled] enabled kvm;active;active;active"


def test_a_removed_package_leaves_nothing(on: dict[str, str]) -> None:
    status, file, *left = on["removed"].split(";")
    assert (status, file, left) == ("0", "0", [])
    assert on["pins"] == ""
