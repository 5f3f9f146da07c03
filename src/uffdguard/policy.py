"""What is decided: the modes, the options, and the decision table. Pure data, no I/O.

:func:`decide` is the reference model; ``decide`` in ``kernel/guard.bpf.c`` is its twin in the kernel, and the
tests hold the two against each other on live kernels. To add a way to be allowed, add one row to both.

No dataclasses: to import what makes them takes longer than all that ``uffdguard mode`` does. And the annotations are
no strings, which NamedTuple would compile.
"""

from enum import StrEnum
from typing import Literal, NamedTuple

#: The ways to ask: userfaultfd(2), the same by a 32-bit program or of x32, and ioctl(2) on /dev/userfaultfd.
Way = Literal["syscall", "compat", "x32", "device"]


class Mode(StrEnum):
    """Who may create a userfaultfd without privilege. The order is that of the interface file."""

    DISABLED = "disabled"
    ENABLED = "enabled"
    KVM = "kvm"

    @property
    def native_value(self) -> int:
        """The native knob's value that fits: 0 refuses by itself, 1 leaves it to the policy above."""
        return 0 if self is Mode.DISABLED else 1


class Backend(StrEnum):
    """What carries the policy out."""

    #: An eBPF program on the LSM hook: exact.
    LSM = "lsm"
    #: The kernel's own knob and the permissions of /dev/userfaultfd: weaker, see WEAKER.
    NATIVE = "native"


#: What the backend ``native`` does not do of what ``lsm`` does.
WEAKER = (
    "UFFD_USER_MODE_ONLY passes in every mode",
    "mode kvm goes by the group of /dev/kvm, which gets /dev/userfaultfd: the permission counts, not the open",
    "whoever has /dev/userfaultfd open keeps it, and a node of it elsewhere has permissions of its own",
    "nothing is counted or logged; there is no audit, and no interface file",
    "no guard: what root writes to the native knob or changes of the device stays until the next start",
)


class Reason(StrEnum):
    """Why a decision fell as it did: the row of the table that took it. The order is that of guard.bpf.c."""

    CAPABILITY = "capability"
    ENABLED = "enabled"
    USER_MODE_ONLY = "user-mode-only"
    KVM = "kvm"
    DISABLED = "disabled"
    NO_KVM = "no-kvm"

    @property
    def allowed(self) -> bool:
        """Whether this reason allows."""
        return self not in (Reason.DISABLED, Reason.NO_KVM)


class Policy(NamedTuple):
    """The mode and the options in force, always written and read as one."""

    mode: Mode = Mode.DISABLED
    #: Whether UFFD_USER_MODE_ONLY suffices in every mode (``user-mode-only = "allow"``).
    user_mode_only: bool = False
    #: Whether refusals are counted and told, and let pass (``enforce = false``); the decision is the same.
    audit: bool = False


class Request(NamedTuple):
    """A creation of a userfaultfd, as the kernel sees it: what the caller is and what it asks for."""

    #: CAP_SYS_PTRACE is effective, and the caller's user namespace is the initial one.
    capability: bool = False
    #: The flags ask for UFFD_USER_MODE_ONLY, read where the calling ABI puts them.
    user_mode_only: bool = False
    #: The caller's address space has opened /dev/kvm since its exec.
    kvm: bool = False


def decide(policy: Policy, request: Request) -> Reason:
    """Return the reason of the verdict on REQUEST under POLICY; its ``allowed`` is the verdict.

    A refusal is EPERM to the caller. A fork event that hands on an existing userfaultfd is no creation and is
    never asked about.
    """
    if request.capability:
        return Reason.CAPABILITY
    if policy.mode is Mode.ENABLED:
        return Reason.ENABLED
    if policy.user_mode_only and request.user_mode_only:
        return Reason.USER_MODE_ONLY
    if policy.mode is Mode.KVM:
        return Reason.KVM if request.kvm else Reason.NO_KVM
    return Reason.DISABLED


def interface_line(mode: Mode, words: tuple[Mode, ...]) -> str:
    """Return the interface file's line: the WORDS that exist, MODE in brackets, e.g. ``[disabled] enabled kvm``."""
    return " ".join(f"[{word}]" if word is mode else word for word in words)
