"""The processes of the model: each runs driver.c, which enters the kernel as it is told.

Here is what each of them is (:class:`Subject`, and the :class:`Process` and :class:`Mm` that it shares with others)
and how the kernel is entered; test_model.py says what happens to them and what must follow.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import select
import signal
import socket
from ctypes import c_int32, c_int64, c_uint8, c_uint32, c_uint64
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REGISTERS = ("ax", "bx", "cx", "dx", "si", "di", "bp", "r10", "r8", "r9")

CLONE_VM, CLONE_VFORK = 0x100, 0x4000
CAP_SYS_PTRACE = 19
CLONE_NEWUSER = 0x10000000


class Abi(StrEnum):
    """How the kernel is entered."""

    NATIVE_64 = "64"
    INT80 = "int80"  # on arm64: svc of a 32-bit program
    X32 = "x32"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The registers of the six arguments."""
        return ("bx", "cx", "dx", "si", "di", "bp") if self is Abi.INT80 else ("di", "si", "dx", "r10", "r8", "r9")

    def number(self, call: str) -> int:
        """Return the system call's number."""
        if self is Abi.X32 and call == "ioctl":
            return 1 << 30 | 514
        number = NUMBERS[call][self is Abi.INT80]
        return 1 << 30 | number if self is Abi.X32 else number


#: The numbers of the 64-bit and of the 32-bit system calls.
NUMBERS = {
    "x86_64": {
        "capget": (125, 184),
        "capset": (126, 185),
        "close": (3, 6),
        "dup": (32, 41),
        "exit": (60, 1),
        "exit_group": (231, 252),
        "getpid": (39, 20),
        "ioctl": (16, 54),
        "open": (2, 5),
        "openat": (257, 295),
        "openat2": (437, 437),
        "ptrace": (101, 26),
        "setresuid": (117, 208),
        "unshare": (272, 310),
        "userfaultfd": (323, 374),
    },
    "aarch64": {
        "capget": (90, 184),
        "capset": (91, 185),
        "close": (57, 6),
        "dup": (23, 41),
        "exit": (93, 1),
        "exit_group": (94, 248),
        "getpid": (172, 20),
        "ioctl": (29, 54),
        "openat": (56, 322),
        "openat2": (437, 437),
        "ptrace": (117, 26),
        "setresuid": (147, 208),
        "unshare": (97, 337),
        "userfaultfd": (282, 388),
    },
}[os.uname().machine]


#: How a 64-bit program can enter the kernel.
ABIS = tuple(Abi) if os.uname().machine == "x86_64" else (Abi.NATIVE_64,)

AT_FDCWD = -100


class Kind(IntEnum):
    """``enum operation`` of driver.c."""

    ENTER = 0
    ENTER_32 = 1
    SPAWN = 2
    EXEC = 3
    URING = 4


class Command(ctypes.Structure):
    """``struct command`` of driver.c."""

    _fields_ = (
        ("operation", c_uint32),
        ("pointers", c_uint32),
        ("registers", c_uint64 * len(REGISTERS)),
        ("data", c_uint8 * 256),
    )


class Answer(ctypes.Structure):
    """``struct answer`` of driver.c."""

    _fields_ = (
        ("result", c_int64),
        ("pid", c_int32),
        ("tid", c_int32),
        ("received", c_int32),
        ("_unused", c_uint32),
        ("data", c_uint8 * 256),
    )


@dataclass(frozen=True)
class At:
    """An argument that points into the command's data."""

    offset: int = 0


class How(StrEnum):
    """How a subject becomes two."""

    FORK = "fork"
    THREAD = "thread"
    VFORK = "vfork"
    CLONE_VM = "clone-vm"

    @property
    def flags(self) -> int:
        """The flags of clone(2); without an exit signal, so that nobody who is traced is stopped by one."""
        # CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND, CLONE_THREAD, CLONE_SYSVSEM
        return {"fork": 0, "thread": 0x50F00, "vfork": CLONE_VM | CLONE_VFORK, "clone-vm": CLONE_VM}[self]


@dataclass(eq=False)
class Mm:
    """An address space."""


@dataclass(eq=False)
class Process:
    """A thread group, and its descriptors; with each descriptor, whether exec closes it."""

    pid: int
    mm: Mm
    bits: int = 64
    parent: Process | None = None
    ended: bool = False
    #: It or a relative below it has opened /dev/kvm, in this address space.
    opened: bool = False
    kvm: dict[int, bool] = field(default_factory=dict)
    paths: dict[int, bool] = field(default_factory=dict)  # O_PATH of /dev/kvm
    devices: dict[str, tuple[int, bool]] = field(default_factory=dict)  # /dev/userfaultfd: "own", "passed"

    def inherit(self, pid: int, mm: Mm) -> Process:
        """Return a child with copies of the descriptors."""
        return Process(pid, mm, self.bits, self, kvm=dict(self.kvm), paths=dict(self.paths), devices=dict(self.devices))

    def relatives(self) -> Iterator[Process]:
        """Yield this process, and those above it that have the same address space, up to one that has ended."""
        process: Process | None = self
        while process and not process.ended and process.mm is self.mm:
            yield process
            process = process.parent

    @property
    def granted(self) -> bool:
        """Whether this process, or one above it in the same address space, has opened /dev/kvm or is taken for that."""
        return any(process.opened for process in self.relatives())

    @granted.setter
    def granted(self, value: bool) -> None:
        for process in self.relatives():
            process.opened = value

    def close_on_exec(self) -> None:
        """Forget the descriptors that exec has closed."""
        self.kvm = {fd: cloexec for fd, cloexec in self.kvm.items() if not cloexec}
        self.paths = {fd: cloexec for fd, cloexec in self.paths.items() if not cloexec}
        self.devices = {kind: (fd, cloexec) for kind, (fd, cloexec) in self.devices.items() if not cloexec}


@dataclass(eq=False)
class Subject:
    """A thread of a process: credentials are a thread's own, and so is the socket that tells it what to do."""

    socket: socket.socket
    process: Process
    tid: int
    root: bool = True
    permitted: bool = True  # CAP_SYS_PTRACE
    effective: bool = True
    initial: bool = True  # in the initial user namespace
    waits_for: Subject | None = None  # a vforked child
    traced_by: Subject | None = None

    def receive(self) -> Answer:
        """Return the next answer."""
        return Answer.from_buffer_copy(self.socket.recv(ctypes.sizeof(Answer)))

    def send(self, kind: Kind, registers: Mapping[str, int | At], *, data: bytes = b"", fd: int | None = None) -> None:
        """Send a command, with descriptor FD."""
        command = Command(operation=kind, data=tuple(data))
        for name, value in registers.items():
            index = REGISTERS.index(name)
            command.registers[index] = value.offset if isinstance(value, At) else value % (1 << 64)
            command.pointers |= isinstance(value, At) << index
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else []
        self.socket.sendmsg([command], rights)

    @property
    def abi(self) -> Abi:
        """How the program itself enters the kernel."""
        return Abi.NATIVE_64 if self.process.bits == 64 else Abi.INT80

    def enter(self, abi: Abi, registers: Mapping[str, int | At], data: bytes = b"") -> Answer:
        """Enter the kernel with these registers."""
        self.send(Kind.ENTER_32 if abi is Abi.INT80 and self.process.bits == 64 else Kind.ENTER, registers, data=data)
        return self.receive()

    def call(self, name: str, *arguments: int | At, data: bytes = b"", abi: Abi | None = None) -> int:
        """Make a system call; return the result, an errno negative."""
        abi = abi or self.abi
        if name not in NUMBERS:  # no open(2) on arm64
            name, arguments = "openat", (AT_FDCWD, *arguments)
        registers = dict(zip(abi.arguments, arguments, strict=False)) | {"ax": abi.number(name)}
        result: int = self.enter(abi, registers, data).result
        return result

    def take(self, fd: int) -> int:
        """Receive a descriptor over the socket; return its number there."""
        self.send(Kind.ENTER, {"ax": self.abi.number("getpid")}, fd=fd)
        received: int = self.receive().received
        return received

    def spawn(self, how: How) -> Subject:
        """Become two; return the new one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.send(Kind.SPAWN, {"bx": how.flags}, fd=theirs.fileno())
        if how is not How.VFORK:
            assert self.receive().result > 0
        hello = Answer.from_buffer_copy(ours.recv(ctypes.sizeof(Answer)))
        if how is How.THREAD:
            process = self.process
        else:
            mm = self.process.mm if how.flags & CLONE_VM else Mm()
            process = self.process.inherit(hello.pid, mm)
        new = Subject(ours, process, hello.tid, self.root, self.permitted, self.effective, self.initial)
        if how is How.VFORK:
            self.waits_for = new
        return new

    def exec(self, bits: int) -> None:
        """Become a new program of BITS; the other threads are gone."""
        self.send(Kind.EXEC, {}, data=b"/run/driver" if bits == 64 else b"/run/driver32")
        assert self.receive().result == 0
        self.process.mm = Mm()
        self.process.opened = False
        self.process.bits = bits
        self.process.close_on_exec()
        self.tid = self.process.pid

    def _capget(self) -> array.array[int]:
        header = (0x20080522).to_bytes(4, "little") + bytes(4)
        registers = dict(zip(self.abi.arguments, (At(0), At(8)), strict=False)) | {"ax": self.abi.number("capget")}
        return array.array("I", bytes(self.enter(self.abi, registers, header).data[:32]))

    def capabilities(self) -> tuple[bool, bool]:
        """Return whether CAP_SYS_PTRACE is permitted and effective, as capget(2) says."""
        effective, permitted = (bool(word & 1 << CAP_SYS_PTRACE) for word in self._capget()[2:4])
        return permitted, effective

    def set_capability(self, permitted: bool, effective: bool) -> int:
        """Set CAP_SYS_PTRACE as capset(2) does and leave the others; return its result."""
        words = self._capget()
        for index, wanted in ((2, effective), (3, permitted)):
            words[index] = words[index] | 1 << CAP_SYS_PTRACE if wanted else words[index] & ~(1 << CAP_SYS_PTRACE)
        return self.call("capset", At(0), At(8), data=words.tobytes())

    def leave(self) -> None:
        """End this thread alone."""
        self.send(Kind.ENTER, {"ax": self.abi.number("exit")})
        stat = Path(f"/proc/{self.process.pid}/task/{self.tid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while ") Z " not in stat.read_text():
                pass


def await_end(process: Process) -> None:
    """Wait until all of a process has ended, its address space let go."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            assert select.select([fd], [], [], 60)[0], f"process {process.pid} does not end"
        finally:
            os.close(fd)


def kill(process: Process) -> None:
    """End a process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    await_end(process)


@contextlib.contextmanager
def first_subject() -> Iterator[Subject]:
    """Give a subject that is root, to fork others from; what these leave behind are children of ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        file_actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 100)]
        pid = os.posix_spawn("/run/driver", ["/run/driver", "100"], {}, file_actions=file_actions)
        try:
            yield Subject(ours, Process(pid, Mm()), Answer.from_buffer_copy(ours.recv(ctypes.sizeof(Answer))).tid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextlib.contextmanager
def descriptor_of(process: Process, fd: int) -> Iterator[int]:
    """Give our own duplicate of a descriptor of another process."""
    pidfd = os.pidfd_open(process.pid)
    try:
        ours = ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0)  # pidfd_getfd
        assert ours >= 0, os.strerror(ctypes.get_errno())
        yield ours
        os.close(ours)
    finally:
        os.close(pidfd)


def reap() -> None:
    """Take the ended children, those left to us too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG | 0x40000000)[0]:  # __WALL
            pass
