"""Really try to create a userfaultfd, each way there is."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from uffdguard.kernel import arch
from uffdguard.kernel.native import DEV_KVM, DEV_USERFAULTFD

UFFD_USER_MODE_ONLY = 1
USERFAULTFD_IOC_NEW = 0xAA00


def syscall(flags: int = 0) -> int:
    """Try userfaultfd(2) with FLAGS and close the result; return 0 or the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(arch.current().userfaultfd, flags | os.O_CLOEXEC)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def device_ioctl(device: int, flags: int = 0) -> int:
    """Try USERFAULTFD_IOC_NEW on an open /dev/userfaultfd and close the result; return 0 or the errno."""
    try:
        os.close(fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def device() -> int:
    """Try to open /dev/userfaultfd and to create a userfaultfd by it; return 0 or the errno of what failed."""
    try:
        fd = os.open(DEV_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        return device_ioctl(fd)
    finally:
        os.close(fd)


def open_kvm() -> int:
    """Open /dev/kvm and close it again, which grants this address space in mode ``kvm``; return 0 or the errno."""
    try:
        os.close(os.open(DEV_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def word(number: int) -> str:
    """Return ``allowed`` for 0, the errno's name otherwise."""
    return errno.errorcode.get(number, str(number)) if number else "allowed"


def every_way() -> dict[str, str]:
    """Try each way in this very process, then again after opening /dev/kvm; return the word for each."""
    ways = {"syscall": syscall, "syscall-user-mode-only": lambda: syscall(UFFD_USER_MODE_ONLY), "device": device}
    answers = {name: word(way()) for name, way in ways.items()}
    answers["kvm"] = word(open_kvm())
    return answers | {f"{name}-after-kvm": word(way()) for name, way in ways.items()}
