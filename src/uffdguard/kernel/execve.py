"""Which capabilities a program has once it is started: what the kernel computes in execve(2), in Python.

Mirrors ``cap_bprm_creds_from_file`` of security/commoncap.c and ``bprm_fill_uid`` of fs/exec.c for a program that is
started by a fork and an exec, which nobody traces, in the initial user namespace.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from uffdguard.errors import Failure
from uffdguard.kernel import arch

SECBIT_NOROOT = 1
#: include/uapi/linux/capability.h: where a file's capabilities are, and what is in them.
XATTR = "security.capability"
REVISIONS = {0x01000000: 1, 0x02000000: 2}
FLAG_EFFECTIVE = 1


@dataclass(frozen=True)
class FileCapabilities:
    """The capabilities of a file, as masks."""

    permitted: int
    inheritable: int
    effective: bool

    @classmethod
    def decode(cls, data: bytes) -> FileCapabilities | None:
        """Return what the attribute says, or None when the kernel takes it for no capabilities.

        To who is in the initial user namespace the kernel shows as revision 3 only those of another's root.
        """
        if len(data) < 4:
            return None
        (magic,) = struct.unpack_from("<I", data)
        words = REVISIONS.get(magic & 0xFF000000)
        if words is None or len(data) != 4 + 8 * words:
            return None
        numbers = struct.unpack_from(f"<{2 * words}I", data, 4)
        permitted, inheritable = (sum(n << 32 * i for i, n in enumerate(numbers[kind::2])) for kind in (0, 1))
        return cls(permitted, inheritable, bool(magic & FLAG_EFFECTIVE))


@dataclass(frozen=True)
class Program:
    """What of a program's file matters: the interpreter's, of a script."""

    user: int | None = None  # whose it becomes: setuid
    group: int | None = None
    capabilities: FileCapabilities | None = None


@dataclass(frozen=True)
class Caller:
    """Who starts the program."""

    users: tuple[int, int]  # real, effective
    groups: tuple[int, int]
    others: frozenset[int]  # supplementary groups
    inheritable: int
    permitted: int
    bounding: int
    ambient: int
    no_new_privileges: bool
    securebits: int

    @classmethod
    def current(cls) -> Caller:
        """Return this process as the caller."""
        pr_get_securebits = 27
        fields = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
        inheritable, permitted, bounding, ambient = (
            int(fields[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Bnd", "Amb")
        )
        return cls(
            users=os.getresuid()[:2],
            groups=os.getresgid()[:2],
            others=frozenset(os.getgroups()),
            inheritable=inheritable,
            permitted=permitted,
            bounding=bounding,
            ambient=ambient,
            no_new_privileges=fields["NoNewPrivs"] == "1",
            securebits=ctypes.CDLL(None).prctl(pr_get_securebits, 0, 0, 0, 0),
        )


def effective(caller: Caller, program: Program) -> int:
    """Return the effective capabilities of PROGRAM once CALLER has started it, as a mask.

    :raises Failure: the kernel would not start it, or it depends on the kernel's version.
    """
    (real, user), group = caller.users, caller.groups[1]
    if not caller.no_new_privileges:
        user = user if program.user is None else program.user
        group = group if program.group is None else program.group
    permitted, is_effective = 0, False
    if file := program.capabilities:
        permitted = (caller.bounding & file.permitted) | (caller.inheritable & file.inheritable)
        is_effective = file.effective
        if is_effective and file.permitted & ~permitted:
            raise Failure("the kernel would not start it: it demands capabilities outside of the bounding set")
    # With capabilities of its own, a program that is setuid to root gets those alone.
    if not caller.securebits & SECBIT_NOROOT and not (file and user == 0 != real):
        if 0 in (real, user):
            permitted = caller.bounding | caller.inheritable
        is_effective |= user == 0
    if caller.no_new_privileges:
        permitted &= caller.permitted
    changed = (user, group) != (real, caller.groups[0])
    # Since 6.16 the kernel compares with the effective ids, and with every group.
    since_6_16 = user != caller.users[1] or group not in {caller.groups[1], *caller.others}
    if caller.ambient and not file and changed != since_6_16:
        raise Failure("cannot be told: whether it keeps the caller's ambient capabilities depends on the kernel")
    ambient = 0 if file or changed else caller.ambient
    permitted |= ambient
    return permitted if is_effective else ambient


def find(name: str) -> Program:
    """Find the program as execvp(3) does, and read what matters.

    :raises Failure: there is none, or what the kernel would make of it cannot be told.
    """
    where = shutil.which(name)
    if where is None:
        raise Failure(f"{name}: no such program", "give a program as a shell would be given it")
    path = _interpreter(Path(where))
    found = path.stat()
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return Program()
    setgid = stat.S_ISGID | stat.S_IXGRP  # without the second it once meant mandatory locking
    return Program(
        user=found.st_uid if found.st_mode & stat.S_ISUID else None,
        group=found.st_gid if found.st_mode & setgid == setgid else None,
        capabilities=_capabilities(path),
    )


def _interpreter(path: Path) -> Path:
    """Return what the kernel starts for PATH in the end: for a script, its interpreter, and so on."""
    for _ in range(5):
        try:
            with path.open("rb") as file:
                head = file.read(256)
        except OSError as error:
            raise Failure(f"cannot be told: {path}: {error.strerror}", "run it as who may read the program") from None
        if head[:4] == b"\x7fELF" and int.from_bytes(head[18:20], "little") in arch.current().programs:
            return path
        words = head[2:].split(b"\n")[0].split()
        if head[:2] != b"#!" or not words:
            raise Failure(f"cannot be told: {path} is neither a program of this machine nor a script with #!")
        path = Path(os.fsdecode(words[0]))
    raise Failure(f"cannot be told: the interpreters of {path} are scripts themselves")


def _capabilities(path: Path) -> FileCapabilities | None:
    if "no_file_caps" in Path("/proc/cmdline").read_text().split():
        return None
    try:
        return FileCapabilities.decode(os.getxattr(path, XATTR))
    except OSError:
        return None
