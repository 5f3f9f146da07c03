"""A file system of an ordinary user's own that stops answering.

A FUSE server of the user's holds a program; an overlay above it, which looks at it with the user's rights, shows it to
everybody. Whoever looks at that file sleeps until the server ends, and cannot be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from inside import USER, forked, until

if TYPE_CHECKING:
    from collections.abc import Iterator

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_NOSUID_NODEV = 6
#: Opcodes of include/uapi/linux/fuse.h.
LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT, OPENDIR, RELEASEDIR, BATCH_FORGET = (
    1, 2, 3, 14, 15, 17, 18, 25, 26, 27, 29, 42,
)  # fmt: skip
ENOENT, ENOSYS = 2, 38
ROOT, PROGRAM = 1, 2

#: In what processes share: whether the server has fallen silent, and that somebody waits for it.
SILENT, AWAITED = 0, 1


@dataclass
class Running:
    """A program that runs from there."""

    pid: int
    shared: mmap.mmap
    stdin: int

    def fall_silent(self) -> None:
        """Have no question about attributes answered any more."""
        self.shared[SILENT] = 1

    @property
    def awaited(self) -> bool:
        """Whether somebody has asked since, and waits."""
        return bool(self.shared[AWAITED])

    def go_on(self) -> None:
        """Let the program go on that waits for a line."""
        os.write(self.stdin, b"\n")


@contextlib.contextmanager
def running(program: Path, *arguments: str) -> Iterator[Running]:
    """Have USER run PROGRAM from such a file system, which goes on answering at first."""
    fuse = Path("/dev/fuse")
    subprocess.run(["modprobe", "-qa", "fuse", "overlay"])  # where they are modules
    mode = fuse.stat().st_mode
    fuse.chmod(0o666)
    content = program.read_bytes()
    shared = mmap.mmap(-1, 2)
    theirs, stdin = os.pipe()
    named, names = os.pipe()

    def job() -> None:
        os.dup2(theirs, 0)
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        os.write(names, b"%d\n" % mount(content, shared))
        os.execv("/mnt/over/program", ["program", *arguments])

    pid = forked(job)
    os.close(names)
    with open(named, "rb") as told:
        server = int(told.readline())
    try:
        until(lambda: Path(f"/proc/{pid}/comm").read_text() == "program\n")
        yield Running(pid, shared, stdin)
    finally:
        for process in (server, pid):
            os.kill(process, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (theirs, stdin):
            os.close(fd)
        fuse.chmod(mode)


def mount(content: bytes, shared: mmap.mmap) -> int:
    """Mount both in namespaces of one's own; return the pid of the server."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.prctl(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE: to write the maps below
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    for name in ("uid_map", "gid_map"):
        Path("/proc/self", name).write_text(f"0 {USER} 1")
    check(libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None))
    for folder in ("fuse", "empty", "over"):
        Path("/mnt", folder).mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    check(libc.mount(b"x", b"/mnt/fuse", b"fuse", MS_NOSUID_NODEV, options.encode()))
    server = forked(lambda: serve(fd, content, shared))
    os.close(fd)
    check(libc.mount(b"x", b"/mnt/over", b"overlay", 0, b"lowerdir=/mnt/fuse:/mnt/empty"))
    return server


def serve(fd: int, content: bytes, shared: mmap.mmap) -> NoReturn:
    """Answer the kernel: a directory with one program."""

    def attributes(node: int) -> bytes:
        size, mode = (len(content), 0o100755) if node == PROGRAM else (4096, 0o40755)
        return struct.pack("<6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 512, 0)

    while True:
        request = os.read(fd, 1 << 17)
        _, operation, unique, node = struct.unpack_from("<IIQQ", request)
        body = request[40:]
        error, data = 0, b""
        if operation in (FORGET, BATCH_FORGET):
            continue
        if operation == GETATTR and shared[SILENT]:
            shared[AWAITED] = 1
            continue
        if operation == GETATTR:
            data = struct.pack("<QII", 0, 0, 0) + attributes(node)
        elif operation == LOOKUP and body == b"program\0":
            data = struct.pack("<4QII", PROGRAM, 0, 0, 0, 0, 0) + attributes(PROGRAM)
        elif operation == LOOKUP:
            error = ENOENT
        elif operation == INIT:
            data = struct.pack("<IIIIHHI", 7, 31, 1 << 16, 0, 12, 10, 1 << 16).ljust(64, b"\0")
        elif operation in (OPEN, OPENDIR):
            data = bytes(16)
        elif operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = content[offset : offset + size]
        elif operation == STATFS:
            data = bytes(80)
        elif operation not in (FLUSH, RELEASE, RELEASEDIR):
            error = ENOSYS
        os.write(fd, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)
