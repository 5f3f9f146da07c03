"""Real programs, unedited: each gets what the table in tests/programs.py says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import criu
import postcopy
import pytest
from inside import KVM_GROUP, force_knob
from inside import USER as UID
from postcopy import Machine, Refused
from programs import TABLE, Outcome, Program, Row, User

from uffdguard.kernel import native
from uffdguard.policy import Mode
from uffdguard.state import status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

if os.uname().machine != "x86_64":
    pytest.skip("the programs are built for x86-64 here", allow_module_level=True)

BUILD = Path(__file__).parents[2] / "build"
NEWER = BUILD / "newer"
LIBRARIES = NEWER / "usr/lib/x86_64-linux-gnu"
#: Runs a newer program with the libraries that it was built with: the machine's are older.
LOADER = (str(LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", str(LIBRARIES))
QEMU_10 = (
    *(*LOADER, str(NEWER / "usr/bin/qemu-system-x86_64")),
    *("-L", str(NEWER / "usr/share/seabios"), "-L", str(NEWER / "usr/share/qemu")),
)

#: Of containers: the machine's own files, below which podman puts what a container writes.
ROOT_FILES = Path("/run/containers/root")
PODMAN = ("podman", "--root", "/run/containers/storage", "--runroot", "/run/containers/run", "--storage-driver", "vfs")
DEV_KVM = ("--device", str(native.DEV_KVM))
DEV_USERFAULTFD = ("--device", str(native.DEV_USERFAULTFD))
#: podman's own profile refuses the system call to everybody.
NO_SECCOMP = ("--security-opt", "seccomp=unconfined")


def uid(user: User) -> int:
    return 0 if user is User.ROOT else UID


def as_user(user: User, command: tuple[str, ...] = postcopy.QEMU) -> Machine:
    return Machine(uid(user), [KVM_GROUP], command)


def in_container(
    user: User, *options: str, command: tuple[str, ...] = postcopy.QEMU, accelerator: str = "kvm"
) -> Machine:
    ROOT_FILES.mkdir(parents=True, exist_ok=True)
    if not ROOT_FILES.is_mount():
        subprocess.run(["mount", "--bind", "/", ROOT_FILES], check=True)
    argv = [*PODMAN, "--cgroup-manager", "cgroupfs", "--runtime", "crun", "run", "--rm", "--cgroups", "disabled"]
    argv += ["--network", "none", "--user", f"{uid(user)}:{KVM_GROUP}"]
    argv += ["--volume", f"{postcopy.WORK}:{postcopy.WORK}", "--volume", f"{BUILD}:{BUILD}:ro"]
    argv += [*options, "--rootfs", f"{ROOT_FILES}:O", *command]
    return Machine(command=argv, accelerator=accelerator)


def migrates(machine: Machine) -> None:
    migration = postcopy.migrate(machine)
    assert migration.requests > 0
    assert all(map(int.__lt__, migration.before, migration.after))


def migrates_by_the_device(machine: Machine) -> None:
    """Closed by hand, the native knob refuses the system call to an ordinary user; it does not govern the device."""
    force_knob(0)
    migrates(machine)


def migrates_past_seccomp(machine: Machine) -> None:
    try:
        migrates(machine)
    except Refused:
        assert (status().allowed, status().refused) == (0, 0), "the policy was asked"
        raise


def takes_a_snapshot(machine: Machine) -> None:
    """The guest's round goes from the first counter to the last: only at one instant do they differ by one at most."""
    snapshot = postcopy.snapshot(machine)
    assert all(map(int.__lt__, snapshot.before, snapshot.after))
    first, last = snapshot.taken
    assert first - last in (0, 1)
    assert snapshot.before[0] <= first < snapshot.after[0]


def restores(user: User) -> None:
    """The process is an ordinary user's; CRIU is root's, and asks before it gives the process away."""
    assert user is User.ROOT
    restored = criu.restore([*LOADER, str(NEWER / "usr/sbin/criu")], UID)
    assert restored.faults > 0
    assert set(restored.said) == {"right"}


def run(argv: list[str | Path], user: User) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv,
        user=uid(user),
        group=uid(user),
        extra_groups=[],
        cwd="/run",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stresses(user: User) -> None:
    done = run(["stress-ng", "--temp-path", "/tmp", "--metrics-brief", "--userfaultfd", "1", *OPERATIONS], user)
    if "skipped, insufficient privilege" in done.stdout:
        raise Refused(done.stdout)
    assert done.returncode == 0, done.stdout
    operations = re.search(r"metrc: .* userfaultfd +(\d+) ", done.stdout)
    assert operations, done.stdout
    assert int(operations[1]) == 50
    assert "successful run completed" in done.stdout


OPERATIONS = ("--userfaultfd-ops", "50", "--userfaultfd-bytes", "256K")


def passes_stress(user: User) -> None:
    done = run([BUILD / "selftests/uffd-stress", "anon", "1", "1"], user)
    if "errno=1," in done.stdout:
        raise Refused(done.stdout)
    assert done.returncode == 0, done.stdout
    # It draws what each round does, so that there may be no missing pages but writes to protected ones.
    assert re.search(r"userfaults: [1-9]", done.stdout)


def unit_tests(user: User, *options: str) -> list[str]:
    """Run the kernel's unit tests; return what became of each."""
    done = run([BUILD / "selftests/uffd-unit-tests", *options], user)
    if "unprivileged, skip all tests" in done.stdout:
        assert done.returncode == 4
        raise Refused(done.stdout)
    return done.stdout.splitlines()


RUN: dict[Program, Callable[[User], None]] = {
    Program.POSTCOPY: lambda user: migrates(as_user(user)),
    Program.SNAPSHOT: lambda user: takes_a_snapshot(as_user(user)),
    Program.DEVICE: lambda user: migrates_by_the_device(as_user(user, QEMU_10)),
    Program.CONTAINER: lambda user: migrates(in_container(user, *NO_SECCOMP, *DEV_KVM)),
    Program.NO_KVM: lambda user: migrates(in_container(user, *NO_SECCOMP, accelerator="tcg")),
    Program.SECCOMP: lambda user: migrates_past_seccomp(in_container(user, *DEV_KVM)),
    Program.DEVICE_CONTAINER: lambda user: migrates(in_container(user, *DEV_KVM, *DEV_USERFAULTFD, command=QEMU_10)),
    Program.CRIU: restores,
    Program.STRESS_NG: stresses,
    Program.STRESS: passes_stress,
}

#: What it says itself when it is refused.
COMPLAINT = {
    Program.POSTCOPY: "userfaultfd not available: Operation not permitted",
    Program.SNAPSHOT: "Background-snapshot is not supported by host kernel",
    Program.DEVICE: "Userfaultfd not available: Operation not permitted",
    Program.CONTAINER: "userfaultfd not available: Operation not permitted",
    Program.NO_KVM: "userfaultfd not available: Operation not permitted",
    Program.SECCOMP: "userfaultfd not available: Operation not permitted",
    Program.DEVICE_CONTAINER: "Userfaultfd not available: Operation not permitted",
    Program.STRESS_NG: "userfaultfd: stressor will be skipped, insufficient privilege",
    Program.STRESS: "failed to get available features",
}


def cases(*programs: Program) -> Iterator[object]:
    """Give the cells of the table's rows for PROGRAMS."""
    for row in TABLE:
        for mode in Mode if row.program in programs else ():
            name = f"{row.program.name.lower()}-{row.user}-{mode}-{row.outcome(mode)}"
            yield pytest.param(row, mode, id=name, marks=[pytest.mark.long] if mode in row.long else [])


@pytest.fixture(autouse=True)
def kvm_has_a_group() -> None:
    """Have /dev/kvm as Debian has it: for a group, not for everybody."""
    native.DEV_KVM.chmod(0o660)


@pytest.mark.parametrize(("row", "mode"), [*cases(*RUN)])
def test_a_program_gets_what_the_table_says(row: Row, mode: Mode, in_force: Callable[..., None]) -> None:
    in_force(mode)
    if row.outcome(mode) is Outcome.WORKS:
        RUN[row.program](row.user)
    else:
        with pytest.raises(Refused, match=COMPLAINT[row.program]):
            RUN[row.program](row.user)


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Have what the kernel's tests need of them."""
    knob = Path("/proc/sys/vm/nr_hugepages")
    knob.write_text("64\n")
    yield
    knob.write_text("0\n")


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize(("row", "mode"), [*cases(Program.UNIT_TESTS)])
def test_the_kernels_unit_tests_end_as_without_a_policy(row: Row, mode: Mode, in_force: Callable[..., None]) -> None:
    if row.outcome(mode) is Outcome.REFUSED:
        in_force(mode)
        with pytest.raises(Refused):
            unit_tests(row.user)
        return
    Path("/proc", native.KNOB).write_text("1\n")
    without = unit_tests(row.user)
    assert "done" in without[0]
    in_force(mode)
    assert unit_tests(row.user) == without


@pytest.mark.parametrize("mode", Mode)
def test_the_kernels_unit_tests_of_forks_end_for_root_as_without_a_policy(
    mode: Mode, in_force: Callable[..., None]
) -> None:
    without = unit_tests(User.ROOT, "-f", "wp-fork-with-event")
    assert any("done" in line for line in without)
    in_force(mode)
    assert unit_tests(User.ROOT, "-f", "wp-fork-with-event") == without


def test_a_newer_qemu_makes_the_system_call_where_it_may_not_open_the_device(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    native.DEV_USERFAULTFD.chmod(0o600)
    migrates(as_user(User.USER, QEMU_10))
    force_knob(0)
    with pytest.raises(Refused, match="Operation not permitted"):
        migrates(as_user(User.USER, QEMU_10))
