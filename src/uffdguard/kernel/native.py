"""Mainline's own side: its knob ``vm.unprivileged_userfaultfd``, and the ways to it.

A file system of ours may cover the file in /proc, so the knob is read and written through a procfs that is mounted
nowhere, and that nobody else sees.

A covered file also makes the kernel refuse new procfs mounts in user namespaces (fs/namespace.c, mnt_already_visible())
unless some other procfs is in the mount namespace, with nothing covered in it. So while the file is covered, and only
then, there is one. It stands below a mount that hides it: the kernel counts it all the same, and no path leads to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.policy import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The owner and the group of our directories. No account has this id and no user namespace that others make maps it, so
#: that uid 0 enters by CAP_DAC_OVERRIDE alone. The server of the interface file has no capability, and joins the group.
OWNER = 0xFFFFFE00
#: Where the state of this boot is.
RUN = Path("/run/uffdguard")
PROC = Path("/proc")
KNOB = "sys/vm/unprivileged_userfaultfd"
#: The file of the native knob as everybody sees it, and what the mount table calls a file of ours that covers it.
FILE = PROC / KNOB
COVER = "fuse.uffdguard"
#: The procfs that is there while the native file is covered, below what hides it.
VISIBLE_PROC = Path("/run/uffdguard.proc/proc")
BPFFS = Path("/sys/fs/bpf")
MOUNTS = Path("/proc/self/mountinfo")

DEV_KVM = Path("/dev/kvm")
KVM_NUMBER = os.makedev(10, 232)  # MISC_MAJOR, KVM_MINOR
DEV_USERFAULTFD = Path("/dev/userfaultfd")
CAP_SYS_PTRACE = 19
#: The module that has the driver of /dev/kvm; there too when it is built in.
LOADED_KVM = Path("/sys/module/kvm")
MODULES = Path("/lib/modules")

#: include/linux/proc_ns.h: the initial namespaces have fixed inode numbers.
INITIAL_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC}

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
BPF_FS_MAGIC = 0xCAFE4A11  # include/uapi/linux/magic.h


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _error(name: str | Path | None = None) -> OSError:
    """Return what the last call of the C library failed with."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), *([str(name)] if name else []))


def mount(kind: str, where: Path, options: str = "", flags: int = MS_NOSUID | MS_NODEV | MS_NOEXEC) -> None:
    """Mount a pseudo file system, mount(2).

    :raises OSError: with the kernel's errno.
    """
    if _libc().mount(kind.encode(), bytes(where), kind.encode(), flags, options.encode()):
        raise _error(where)


def detached(kind: str) -> int:
    """Return a descriptor of a pseudo file system that is mounted nowhere, fsopen(2), fsmount(2).

    :raises OSError: with the kernel's errno.
    """
    fsopen, fsconfig, fsmount = 430, 431, 432  # on every architecture
    cloexec, config_create = 1, 6  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC, FSCONFIG_CMD_CREATE
    context = _libc().syscall(fsopen, kind.encode(), cloexec)
    if context < 0:
        raise _error(kind)
    try:
        # MOUNT_ATTR_NOSUID, _NODEV and _NOEXEC have the values of MS_NOSUID and the others.
        root: int = -1
        if not _libc().syscall(fsconfig, context, config_create, None, None, 0):
            root = _libc().syscall(fsmount, context, cloexec, MS_NOSUID | MS_NODEV | MS_NOEXEC)
        if root < 0:
            raise _error(kind)
        return root
    finally:
        os.close(context)


def remount(where: Path, *, read_only: bool) -> None:
    """Change whether a pseudo file system can be written, mount(2).

    :raises OSError: with the kernel's errno.
    """
    flags = MS_REMOUNT | (MS_RDONLY if read_only else 0) | MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc().mount(None, bytes(where), None, flags, None):
        raise _error(where)


def unmount(where: Path) -> None:
    """Unmount what is mounted there, lazily if it is busy, umount2(2); nothing there is no error."""
    mnt_detach, umount_nofollow = 2, 8
    while _libc().umount2(bytes(where), mnt_detach | umount_nofollow) == 0:
        pass
    # What is there is no mount, or nothing is.
    if ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        raise _error(where)


def cover(fuse: int) -> None:
    """Mount on the native knob's file the regular file that is served by a descriptor of /dev/fuse, mount(2).

    There is a procfs already that :func:`show_procfs` has mounted.

    :raises OSError: with the kernel's errno.
    """
    # The kernel decides by the file's mode whether a process may write; every process may read.
    options = f"fd={fuse},rootmode=100644,user_id=0,group_id=0,allow_other,default_permissions"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    if _libc().mount(b"uffdguard", bytes(FILE), COVER.encode(), flags, options.encode()):
        error = _error(FILE)
        _remove_procfs()
        raise error


def cover_device() -> str | None:
    """Return the device number, as "0:53", of the file of ours that covers the native one, or None where none does.

    Does not ask its server, which may be dead or stopped.
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
    """Uncover the native file and remove the procfs besides /proc; do nothing where neither is there.

    :raises OSError: with the kernel's errno.
    """
    if is_covered():
        unmount(FILE)
    _remove_procfs()


def show_procfs() -> None:
    """Mount the least procfs that lets others be mounted in user namespaces while the native file is covered.

    One without anything but processes suffices up to some kernel between 6.12 and 7.3; which kernel is not asked but
    tried.

    :raises OSError: with the kernel's errno.
    """
    _remove_procfs()  # what a kill has left
    hidden = VISIBLE_PROC.parent
    make_own(hidden, 0)
    VISIBLE_PROC.mkdir()
    mount("proc", VISIBLE_PROC, "subset=pid")
    if not _admits_procfs():
        unmount(VISIBLE_PROC)
        mount("proc", VISIBLE_PROC)
    mount("tmpfs", hidden, "size=4k,mode=0", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)


def shows_procfs() -> bool:
    """Tell whether a procfs of ours is mounted besides /proc."""
    return b" %b " % bytes(VISIBLE_PROC) in MOUNTS.read_bytes()


def _remove_procfs() -> None:
    if not VISIBLE_PROC.parent.exists():
        return
    for path in (VISIBLE_PROC.parent, VISIBLE_PROC):
        unmount(path)
    for path in (VISIBLE_PROC, VISIBLE_PROC.parent):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()


def _admits_procfs() -> bool:
    """Try whether a process in new user and pid namespaces can mount a procfs where the native file is covered.

    It is covered for the child alone, which has a mount namespace of its own. True too where a user namespace cannot be
    made, for example with user.max_user_namespaces = 0: nobody is there to need more, and more would help an attacker
    once the limit is raised.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            _unshare(CLONE_NEWNS)
            for source, where, flags in ((None, b"/", MS_REC | MS_PRIVATE), (b"/dev/null", bytes(FILE), MS_BIND)):
                if _libc().mount(source, where, None, flags, None):
                    raise _error()
            try:
                _unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID)
            except OSError:
                os.write(theirs, b"x")
                os._exit(0)
            if os.fork() == 0:  # the first process in the pid namespace
                mount("proc", PROC)
                os.write(theirs, b"x")
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as answer, contextlib.suppress(ChildProcessError):  # who ignores SIGCHLD has none to wait for
        mounted = bool(answer.read())
        os.waitpid(pid, 0)
    return mounted


def _unshare(flags: int) -> None:
    if _libc().unshare(flags):
        raise _error()


def is_bpffs(where: Path) -> bool:
    """Tell whether a bpffs is mounted there, statfs(2)."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs: f_type is the first word
    return not _libc().statfs(bytes(where), buffer) and ctypes.c_long.from_buffer(buffer).value == BPF_FS_MAGIC


def is_read_only(where: Path) -> bool:
    """Tell whether what is mounted there cannot be written, statvfs(3)."""
    return bool(os.statvfs(where).f_flag & os.ST_RDONLY)


class Knob:
    """The native knob, open: whoever has given up all capabilities can still use it. A context manager.

    The file is that of a procfs that is mounted nowhere. Without CAP_SYS_ADMIN it is the one in /proc, where nothing of
    ours covers that.

    :param fd: a descriptor of the file, from a process that could open it.
    :raises OSError: it cannot be opened.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._fd = _open_knob(os.O_RDWR) if fd is None else fd

    def __enter__(self) -> Knob:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def read(self) -> int:
        """Return its value, 0 or 1."""
        return int(os.pread(self._fd, 16, 0))

    def write(self, value: int | str) -> None:
        """Set it.

        :raises OSError: the kernel refused (EINVAL), or the guard of sysctls did (EPERM).
        """
        os.pwrite(self._fd, f"{value}\n".encode(), 0)


def _open_knob(access: int) -> int:
    try:
        procfs = detached("proc")
    except PermissionError:
        if is_covered():
            raise
        return os.open(FILE, access | os.O_CLOEXEC)
    try:
        return os.open(KNOB, access | os.O_CLOEXEC, dir_fd=procfs)
    finally:
        os.close(procfs)


def read_knob() -> int:
    """Return the native knob's value, 0 or 1.

    :raises Failure: this kernel has no such knob (before 5.2, or built without userfaultfd), or it cannot be reached.
    """
    try:
        with Knob(_open_knob(os.O_RDONLY)) as knob:
            return knob.read()
    except (OSError, ValueError) as error:
        raise Failure(
            f"cannot read vm.unprivileged_userfaultfd: {error}", "the kernel must be built with CONFIG_USERFAULTFD"
        ) from error


def write_knob(value: int) -> None:
    """Set the native knob.

    :raises OSError: it cannot be opened, the kernel refused, or the guard of sysctls did.
    """
    with Knob() as knob:
        knob.write(value)


def make_own(directory: Path, mode: int = 0o770) -> None:
    """Make a directory if it is missing, and let it have our owner and MODE whatever the umask is.

    :raises OSError: with the kernel's errno.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        own(fd, mode)
    finally:
        os.close(fd)


def own(directory: int, mode: int = 0o770) -> None:
    """Let an open directory have our owner and MODE.

    :raises OSError: with the kernel's errno.
    """
    found = os.fstat(directory)
    if (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) != (OWNER, OWNER, mode):
        os.fchown(directory, OWNER, OWNER)
        os.fchmod(directory, mode)


def join_owner() -> None:
    """Be in the group of our directories and in no other, so that they can be entered without a capability.

    :raises Failure: this process is not in it and may not join it.
    """
    try:
        os.setgroups([OWNER])
    except PermissionError:
        if OWNER not in os.getgroups():
            raise Failure(f"cannot enter {RUN}: no CAP_SETGID", "run it as root on the host itself") from None


def need_root(what: str) -> None:
    """Make sure that we are root, and not one without the capability to enter our directories.

    :param what: the end of the sentence "only root ...".
    :raises Failure: we are not.
    """
    if os.geteuid() != 0:
        raise Failure(f"only root {what}", "run it as root, e.g. with sudo")
    if RUN.exists() and not os.access(RUN, os.X_OK):
        raise Failure(f"cannot enter {RUN}: no CAP_DAC_OVERRIDE", "run it as root on the host itself")


def in_initial(kind: str) -> bool:
    """Tell whether this process is in the initial user or pid namespace."""
    return Path(f"/proc/self/ns/{kind}").stat().st_ino == INITIAL_NAMESPACES[kind]


def drop_capabilities() -> None:
    """Give up all capabilities of this process, capset(2), and for good: an exec gives root none back.

    No other process without CAP_SYS_PTRACE may trace it then, nor read its memory, though it has the same user.
    """
    pr_set_no_new_privs, pr_set_securebits, pr_set_dumpable = 38, 28, 4
    noroot_locked = 3  # SECBIT_NOROOT and its lock, capabilities(7)
    # Fails for a process without CAP_SETPCAP, which has no capabilities to get back either.
    _libc().prctl(pr_set_securebits, noroot_locked, 0, 0, 0)
    _libc().prctl(pr_set_no_new_privs, 1, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if _libc().capset(header, (ctypes.c_uint32 * 6)()):
        raise _error()
    if _libc().prctl(pr_set_dumpable, 0, 0, 0, 0):
        raise _error()


class Access(enum.IntFlag):
    """What may be done to files, as landlock(7) has it."""

    WRITE = 1 << 1 | 1 << 14  # LANDLOCK_ACCESS_FS_WRITE_FILE, _TRUNCATE
    REMOVE = 1 << 5  # _REMOVE_FILE
    MAKE = 1 << 8  # _MAKE_REG
    MAKE_DIRECTORY = 1 << 7  # _MAKE_DIR
    #: All but reading: from _REMOVE_DIR to _MAKE_SYM, too.
    ANY = WRITE | 0x1FF0


def restrict_writes(allowed: Mapping[Path, Access]) -> None:
    """Let this process do to files no more than is ALLOWED below these; do nothing on a kernel without Landlock.

    Modes, owners and attributes of files are not governed by landlock(7). What is mounted below a path is below it.

    :raises OSError: with the kernel's errno.
    """
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # on every architecture
    governed = Access.ANY
    # The first two versions do not ask for LANDLOCK_ACCESS_FS_TRUNCATE.
    if _libc().syscall(create_ruleset, None, 0, 1) < 3:
        governed &= ~(1 << 14)
    ruleset = _libc().syscall(create_ruleset, ctypes.byref(ctypes.c_uint64(governed)), 8, 0)
    if ruleset < 0:
        return
    try:
        for path, access in allowed.items():
            directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # struct landlock_path_beneath_attr, which is packed
            rule = (access & governed).to_bytes(8, "little") + directory.to_bytes(4, "little")
            failed = _libc().syscall(add_rule, ruleset, 1, rule, 0)
            os.close(directory)
            if failed:
                raise _error(path)
        if _libc().syscall(restrict_self, ruleset, 0):
            raise _error()
    finally:
        os.close(ruleset)


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
