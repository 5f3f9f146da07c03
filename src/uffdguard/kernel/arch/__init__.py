"""What only one architecture has: numbers of system calls, names of functions, machines of programs.

The C side is in the headers beside this file; one object of it is for all architectures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from uffdguard.errors import Failure


@dataclass(frozen=True)
class Architecture:
    """An architecture on which the kernel side knows how a system call asks."""

    userfaultfd: int  # the system call's number
    entry: str  # the kernel's function that serves it
    entry32: str | None  # the one that serves 32-bit programs, where that is another
    #: The function that a kernel has which can attach programs to functions; None: all can.
    attaches: str | None
    #: The oldest kernel that can, to say what to boot.
    since: str
    programs: tuple[int, ...]  # the machines of ELF files that the kernel itself starts


#: By machine, as ``uname -m`` prints it.
ARCHITECTURES = {
    "x86_64": Architecture(
        userfaultfd=323,
        entry="__x64_sys_userfaultfd",
        entry32="__ia32_sys_userfaultfd",
        attaches=None,
        since="6.1",
        programs=(3, 62),  # EM_386, EM_X86_64
    ),
    "aarch64": Architecture(
        userfaultfd=282,
        entry="__arm64_sys_userfaultfd",
        entry32=None,
        attaches="register_ftrace_direct",  # CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS
        since="6.4",
        programs=(40, 183),  # EM_ARM, EM_AARCH64
    ),
}

KNOWN = " and ".join(ARCHITECTURES)


def current() -> Architecture:
    """Return the architecture of this machine.

    :raises Failure: the table does not have it.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise Failure(f"only {KNOWN} are known here, and this is {machine}")
    return ARCHITECTURES[machine]
