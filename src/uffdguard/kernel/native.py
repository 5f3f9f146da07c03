"""Mainline's own side: its knob ``vm.unprivileged_userfaultfd``, and the procfs mount by which we reach it.

The knob is read and written through a procfs mount of our own, in a directory only root may enter. Another
file system may cover the file in /proc; and a covered file there makes the kernel refuse new procfs mounts in
user namespaces (fs/namespace.c, mnt_already_visible) unless an uncovered procfs exists somewhere: ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
from pathlib import Path

from uffdguard.errors import Failure
from uffdguard.policy import Mode

#: Where the state of this boot is; only root may enter.
RUN = Path("/run/uffdguard")
PROC = RUN / "proc"
KNOB = "sys/vm/unprivileged_userfaultfd"
#: The file of the native knob as everybody sees it, and what the mount table calls a file of ours that covers it.
FILE = Path("/proc", KNOB)
COVER = "fuse.uffdguard"
FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
BPFFS = Path("/sys/fs/bpf")
MOUNTS = Path("/proc/self/mountinfo")

DEV_KVM = Path("/dev/kvm")
KVM_NUMBER = os.makedev(10, 232)  # MISC_MAJOR, KVM_MINOR
DEV_USERFAULTFD = Path("/dev/userfaultfd")
#: The module that has the driver of /dev/kvm; there too when it is built in.
LOADED_KVM = Path("/sys/module/kvm")
MODULES = Path("/lib/modules")

#: include/linux/proc_ns.h: the initial namespaces have fixed inode numbers.
INITIAL_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mount(kind: str, where: Path) -> None:
    """Mount a pseudo file system, mount(2).

    :raises OSError: with the kernel's errno.
    """
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    # A bpffs lets everybody make directories unless told otherwise.
    options = b"mode=0700" if kind == "bpf" else None
    if _libc().mount(kind.encode(), bytes(where), kind.encode(), flags, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(where))


def detached(kind: str) -> int:
    """Return a descriptor of a pseudo file system that is mounted nowhere, fsopen(2), fsmount(2).

    :raises OSError: with the kernel's errno.
    """
    fsopen, fsconfig, fsmount = 430, 431, 432  # on every architecture
    cloexec, config_create = 1, 6  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC, FSCONFIG_CMD_CREATE
    context = _libc().syscall(fsopen, kind.encode(), cloexec)
    if context < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), kind)
    try:
        # MOUNT_ATTR_NOSUID, _NODEV and _NOEXEC have the values of MS_NOSUID and the others.
        root: int = -1
        if not _libc().syscall(fsconfig, context, config_create, None, None, 0):
            root = _libc().syscall(fsmount, context, cloexec, MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if root < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), kind)
        return root
    finally:
        os.close(context)


def remount(where: Path, *, read_only: bool) -> None:
    """Change whether a pseudo file system can be written, mount(2).

    :raises OSError: with the kernel's errno.
    """
    flags = MS_REMOUNT | (MS_RDONLY if read_only else 0) | MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc().mount(None, bytes(where), None, flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(where))


def unmount(where: Path) -> None:
    """Unmount what is mounted there, lazily if it is busy, umount2(2); nothing there is no error."""
    mnt_detach, umount_nofollow = 2, 8
    while _libc().umount2(bytes(where), mnt_detach | umount_nofollow) == 0:
        pass
    # What is there is no mount, or nothing is.
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(where))


def cover(fuse: int) -> None:
    """Mount on the native knob's file the regular file that is served by a descriptor of /dev/fuse, mount(2).

    :raises OSError: with the kernel's errno.
    """
    # Who may write is for the kernel to decide, by the file's mode; all may look.
    options = f"fd={fuse},rootmode=100644,user_id=0,group_id=0,allow_other,default_permissions"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc().mount(b"uffdguard", bytes(FILE), COVER.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(FILE))


def cover_device() -> str | None:
    """Return the device number, as "0:53", of the file of ours that covers the native one, or None where none does.

    Does not ask its server, who may be dead or stopped.
    """
    # In the names that others gave, the kernel escapes only newline, blank, tab and backslash.
    rows = (line.split(b" ") for line in MOUNTS.read_bytes().split(b"\n")[:-1])
    found = [row[2] for row in rows if (row[4], row[row.index(b"-", 6) + 1]) == (bytes(FILE), COVER.encode())]
    return found[-1].decode() if found else None


def is_covered() -> bool:
    """Tell whether a file of ours covers the native one."""
    return cover_device() is not None


def is_deserted() -> bool:
    """Tell whether what covers the native file will not answer any more: nobody has its connection, fuse(4).

    While its server is away, and a service manager has it, a call waits, and so do we: a second at most.
    """
    failures: list[OSError] = []

    def ask() -> None:
        try:
            os.statvfs(FILE)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(1)
    return bool(failures)


def uncover() -> None:
    """Have the native file seen again; do nothing where it is.

    :raises OSError: with the kernel's errno.
    """
    if is_covered():
        unmount(FILE)


def is_bpffs(where: Path) -> bool:
    """Tell whether a bpffs is mounted there, statfs(2)."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs: f_type is the first word
    return not _libc().statfs(bytes(where), buffer) and ctypes.c_long.from_buffer(buffer).value == BPF_FS_MAGIC


def is_read_only(where: Path) -> bool:
    """Tell whether what is mounted there cannot be written, statvfs(3)."""
    return bool(os.statvfs(where).f_flag & os.ST_RDONLY)


def read_knob() -> int:
    """Return the native knob's value, 0 or 1.

    :raises Failure: this kernel has no such knob (before 5.2, or built without userfaultfd).
    """
    try:
        try:
            text = (PROC / KNOB).read_text()
        except OSError:
            # Without our mount, where nothing of ours covers the file in /proc.
            text = FILE.read_text()
        return int(text)
    except (OSError, ValueError) as error:
        raise Failure(
            f"cannot read vm.unprivileged_userfaultfd: {error}", "the kernel must be built with CONFIG_USERFAULTFD"
        ) from error


class Knob:
    """The native knob, open: whoever has given up all capabilities can still use it. A context manager.

    :raises OSError: it cannot be opened.
    """

    def __init__(self) -> None:
        self._fd = os.open(PROC / KNOB, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Knob:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def read(self) -> int:
        """Return its value, 0 or 1."""
        return int(os.pread(self._fd, 16, 0))

    def write(self, value: int | str) -> None:
        """Set it.

        :raises OSError: the kernel refused (EINVAL), or the guard of sysctls did (EPERM).
        """
        os.pwrite(self._fd, f"{value}\n".encode(), 0)


def write_knob(value: int) -> None:
    """Set the native knob.

    :raises OSError: it cannot be opened, the kernel refused, or the guard of sysctls did.
    """
    with Knob() as knob:
        knob.write(value)


def need_root(what: str) -> None:
    """Make sure that we are root.

    :param what: the end of the sentence "only root ...".
    :raises Failure: we are not.
    """
    if os.geteuid() != 0:
        raise Failure(f"only root {what}", "run it as root, e.g. with sudo")


def in_initial(kind: str) -> bool:
    """Tell whether this process is in the initial user or pid namespace."""
    return Path(f"/proc/self/ns/{kind}").stat().st_ino == INITIAL_NAMESPACES[kind]


def drop_capabilities() -> None:
    """Give up all capabilities of this process, capset(2), and for good: an exec gives root none back."""
    pr_set_no_new_privs, pr_set_securebits = 38, 28
    noroot_locked = 3  # SECBIT_NOROOT and its lock, capabilities(7)
    # May fail for who has no CAP_SETPCAP: then there is nothing to give back either.
    _libc().prctl(pr_set_securebits, noroot_locked, 0, 0, 0)
    _libc().prctl(pr_set_no_new_privs, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if _libc().capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def restrict_writes(*below: Path) -> None:
    """Let this process make, remove or write no file but those BELOW; do nothing on a kernel without Landlock.

    Modes, owners and attributes of files are not governed by landlock(7).

    :raises OSError: with the kernel's errno.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # on every architecture
    # LANDLOCK_ACCESS_FS_WRITE_FILE, and from _REMOVE_DIR to _MAKE_SYM: the first version's, without reading.
    writes = 1 << 1 | sum(1 << bit for bit in range(4, 13))
    # LANDLOCK_ACCESS_FS_TRUNCATE, for which the first version does not ask.
    if _libc().syscall(create_ruleset, None, 0, 1) >= 3:
        writes |= 1 << 14
    ruleset = _libc().syscall(create_ruleset, ctypes.byref(ctypes.c_uint64(writes)), 8, 0)
    if ruleset < 0:
        return
    try:
        for path in below:
            directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # struct landlock_path_beneath_attr, which is packed
            rule = writes.to_bytes(8, "little") + directory.to_bytes(4, "little")
            failed = _libc().syscall(add_rule, ruleset, 1, rule, 0)
            os.close(directory)
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        if _libc().syscall(restrict_self, ruleset, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(ruleset)


def read_ftrace() -> int | None:
    """Return kernel.ftrace_enabled, without which no BPF trampoline runs; None where the kernel does not have it."""
    try:
        return int(FTRACE.read_text())
    except (OSError, ValueError):
        return None


def has_kvm() -> bool:
    """Tell whether this kernel has KVM, built in or as a module, loaded or not."""
    if LOADED_KVM.exists():
        return True
    for name in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(OSError):
            if b"/kvm.ko" in (MODULES / os.uname().release / name).read_bytes():
                return True
    return False


def wrong_kvm() -> str | None:
    """Tell what is wrong with /dev/kvm; the policy goes by the number of the device, wherever its node is."""
    try:
        found = DEV_KVM.stat()
    except OSError as error:
        return f"{DEV_KVM}: {error.strerror}"
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != KVM_NUMBER:
        return f"{DEV_KVM} is not the character device 10:232"
    return None


def modes() -> tuple[Mode, ...]:
    """Return the modes that exist on this kernel: ``kvm`` only where there is KVM."""
    return tuple(mode for mode in Mode if mode is not Mode.KVM or has_kvm())


def check_mode(mode: Mode) -> None:
    """Make sure that MODE exists on this kernel.

    :raises Failure: it does not.
    """
    if mode not in modes():
        raise Failure("mode kvm does not exist here: this kernel has no KVM", "use disabled or enabled")
