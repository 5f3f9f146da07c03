"""Which real programs get a userfaultfd: the table that tests/clients is run from and docs/programs.md shows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from uffdguard.policy import Mode


class Outcome(StrEnum):
    """What becomes of the program."""

    WORKS = "works"
    REFUSED = "refused"


class Program(StrEnum):
    """What is run."""

    POSTCOPY = "QEMU 7.2: postcopy migration"
    SNAPSHOT = "QEMU 7.2: background snapshot"
    DEVICE = "QEMU 10: postcopy migration through /dev/userfaultfd"
    CONTAINER = "QEMU 7.2 in a podman container with /dev/kvm"
    NO_KVM = "QEMU 7.2 in a podman container without it"
    SECCOMP = "QEMU 7.2 in a podman container with /dev/kvm and podman's own seccomp profile"
    DEVICE_CONTAINER = "QEMU 10 in such a container with /dev/userfaultfd as well"
    CRIU = "CRIU: lazy-pages restore"
    STRESS_NG = "stress-ng --userfaultfd"
    UNIT_TESTS = "the kernel's uffd-unit-tests"
    STRESS = "the kernel's uffd-stress"


class User(StrEnum):
    """Who runs it; in a container, who it is there, with podman's own set of capabilities."""

    ROOT = "root"
    USER = "user"


@dataclass(frozen=True)
class Row:
    """What PROGRAM gets as USER in each mode."""

    program: Program
    user: User
    disabled: Outcome
    enabled: Outcome
    kvm: Outcome
    #: The modes in which it takes too long for every run: tried by `make test-clients-long`.
    long: tuple[Mode, ...] = ()

    def outcome(self, mode: Mode) -> Outcome:
        """Return what it gets in MODE."""
        return {Mode.DISABLED: self.disabled, Mode.ENABLED: self.enabled, Mode.KVM: self.kvm}[mode]


WORKS, REFUSED = Outcome.WORKS, Outcome.REFUSED
ROOT, USER = User.ROOT, User.USER
ALL = tuple(Mode)

TABLE = (
    Row(Program.POSTCOPY, ROOT, WORKS, WORKS, WORKS, long=(Mode.ENABLED, Mode.KVM)),
    Row(Program.POSTCOPY, USER, REFUSED, WORKS, WORKS),
    Row(Program.SNAPSHOT, ROOT, WORKS, WORKS, WORKS, long=(Mode.ENABLED, Mode.KVM)),
    Row(Program.SNAPSHOT, USER, REFUSED, WORKS, WORKS),
    Row(Program.DEVICE, ROOT, WORKS, WORKS, WORKS, long=ALL),
    Row(Program.DEVICE, USER, REFUSED, WORKS, WORKS),
    Row(Program.CONTAINER, ROOT, REFUSED, WORKS, WORKS, long=ALL),
    Row(Program.CONTAINER, USER, REFUSED, WORKS, WORKS),
    Row(Program.NO_KVM, USER, REFUSED, WORKS, REFUSED),
    Row(Program.SECCOMP, USER, REFUSED, REFUSED, REFUSED),
    Row(Program.DEVICE_CONTAINER, USER, REFUSED, WORKS, WORKS),
    Row(Program.CRIU, ROOT, WORKS, WORKS, WORKS),
    Row(Program.STRESS_NG, ROOT, WORKS, WORKS, WORKS),
    Row(Program.STRESS_NG, USER, REFUSED, WORKS, REFUSED),
    Row(Program.UNIT_TESTS, ROOT, WORKS, WORKS, WORKS, long=ALL),
    Row(Program.UNIT_TESTS, USER, REFUSED, WORKS, REFUSED),
    Row(Program.STRESS, ROOT, WORKS, WORKS, WORKS),
    Row(Program.STRESS, USER, REFUSED, WORKS, REFUSED),
)


def markdown() -> str:
    """Return the table as docs/programs.md shows it; an asterisk marks what only the long run tries."""
    lines = [f"| program | user | {' | '.join(Mode)} |", "|---|---|" + "---|" * len(Mode)]
    for row in TABLE:
        cells = [row.outcome(mode) + (r" \*" if mode in row.long else "") for mode in Mode]
        lines.append(f"| {row.program} | {row.user} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
