"""What happens, as it happens: read what the kernel side records of each event, and give it names.

No file system is asked that a process can choose or make: it need never answer, and who waits for it cannot be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uffdguard import proof, state
from uffdguard.errors import Failure, one_line
from uffdguard.inspect import NATIVE, unit, user_of
from uffdguard.kernel import layout, libbpf, native
from uffdguard.lock import locked
from uffdguard.policy import Mode, Way  # noqa: TC001 - at run time too: journal.to_event() has msgspec read the types
from uffdguard.steps import log

#: Seconds between two looks. Events have a limit, and the kernel side keeps the newest 2048.
INTERVAL = 0.25
#: Seconds between two questions to the policy.
ASKING = 5.0
#: Seconds, at most, for which the allowed ones are asked for anew at each look.
LEASE = 3

FLAGS = {0x1: "UFFD_USER_MODE_ONLY", os.O_NONBLOCK: "O_NONBLOCK", os.O_CLOEXEC: "O_CLOEXEC"}
CGROUPS = Path("/sys/fs/cgroup")
FILEID_KERNFS = 0xFE  # include/linux/exportfs.h
#: Seconds after which an event whose number is taken, and which is not there, counts as lost.
PATIENCE = 2.0
#: Nanoseconds for which a pid is taken for the process that the event is of.
FRESH = 5_000_000_000
#: The value that was asked for is no number.
NO_NUMBER = 0xFFFFFFFF


@dataclass(frozen=True)
class Event:
    """A decision, as it was taken. The names are those of ``watch --json``.

    Names that others chose have escapes for what does not print, see :func:`uffdguard.errors.one_line`. The command
    and the executable are the process's own word and prove nothing: it can give itself any name, and in a user
    namespace of its own any file as its executable (PR_SET_MM_MAP of prctl(2)). All else is the kernel's.
    """

    time: str  # local, ISO 8601 with microseconds
    pid: int
    tid: int
    uid: int  # effective, in the initial user namespace; so is gid
    gid: int
    user: str
    #: Whose limit it counts against: the owner of the outermost user namespace below the initial one, or the real uid.
    owner: int
    initial_user_namespace: bool
    command: str
    #: A path in the mounts of the process, see :func:`executable_of`; its file's name where that is all that is known.
    executable: str
    exe_device: str  # MAJOR:MINOR
    exe_inode: int
    cgroup: str
    unit: str  # units, pods and containers, outermost first
    way: Way
    flags: tuple[str, ...]
    mode: Mode
    verdict: Literal["allowed", "refused"]
    #: A policy.Reason, or ``native``: the kernel's own knob refused before the policy was asked.
    reason: str
    #: Whether the verdict was carried out; a refusal in audit is not.
    enforced: bool
    #: What the decision asks about, of which policy.decide() makes what another mode would have said.
    capability: bool
    user_mode_only: bool
    granted: bool

    @property
    def line(self) -> str:
        """What happened, in one line."""
        what = self.verdict if self.enforced else "would be refused"
        return f"userfaultfd {what} ({self.reason}): {self.command}, pid {self.pid}, user {self.user}"


@dataclass(frozen=True)
class SysctlWrite:
    """A write to a sysctl that was refused. The names are those of ``watch --json``; those of Event mean the same."""

    time: str
    pid: int
    tid: int
    uid: int
    gid: int
    user: str
    command: str
    executable: str
    cgroup: str
    unit: str
    #: Its name, as sysctl(8) has it: one of layout.SYSCTLS.
    sysctl: str
    value: int | None  # that was asked for; None: no number
    mode: Mode
    verdict: Literal["refused"] = "refused"

    @property
    def setting(self) -> str:
        """What was asked for, e.g. ``kernel.ftrace_enabled = 0``."""
        return self.sysctl if self.value is None else f"{self.sysctl} = {self.value}"

    @property
    def why(self) -> str:
        """Why it was refused, and what to do."""
        if self.sysctl == layout.SYSCTLS[0]:
            return (
                "it would switch the policy off without a trace; take it out of sysctl.d, or run uffdguard stop first"
            )
        return f"mode {self.mode} wants {self.mode.native_value}; switch the mode with uffdguard mode"

    @property
    def line(self) -> str:
        """What happened, why, and what to do, in one line."""
        return f"sysctl {self.setting} refused: {self.command}, pid {self.pid}, user {self.user}; {self.why}"


@dataclass(frozen=True)
class Notice:
    """The policy in force does not answer any more, or answers again. The names are those of ``watch --json``."""

    time: str
    answers: bool

    @property
    def line(self) -> str:
        """What happened, and what to do, in one line."""
        if self.answers:
            return "the policy answers again"
        return "the policy does not answer: it refuses nobody, and the native knob alone decides; see uffdguard status"


Entry = Event | SysctlWrite | Notice


def notices(previous: int, current: int) -> list[Notice]:
    """Return what has changed between two looks at ``unanswered_since`` of the kernel side.

    :param previous: ns since boot; 0: the policy answered.
    """
    if previous == current:
        return []
    again = [Notice(local_time(time.clock_gettime_ns(time.CLOCK_BOOTTIME)), answers=True)] if previous else []
    return again + ([Notice(local_time(current), answers=False)] if current else [])


@dataclass(frozen=True)
class Batch:
    """What is new since the last look."""

    entries: list[Entry]
    suppressed: int  # over a limit
    lost: int  # overwritten before they were read, or of another version's kernel side with words that we have not

    @property
    def events(self) -> list[Event]:
        """The decisions alone."""
        return [entry for entry in self.entries if isinstance(entry, Event)]

    def shown(self, *, everything: bool) -> list[Entry]:
        """Return the entries, those of allowed decisions only with EVERYTHING."""
        return [entry for entry in self.entries if everything or getattr(entry, "verdict", "") != "allowed"]


class Stream:
    """What happens to the policy in force, each event once.

    Nothing is held between two looks: the policy may be stopped, started and replaced meanwhile.

    :param last: the number of the newest event that is known already; None: of the newest there is.
    :param everything: ask for the allowed ones too.
    """

    def __init__(self, last: int | None = 0, *, everything: bool = False) -> None:
        self.last = last
        self.everything = everything
        #: Which map it is of: the kernel never gives a number twice.
        self.map: int | None = None
        self._suppressed: int | None = None
        #: Since when the next one is waited for.
        self._waiting: float | None = None
        self._unanswered = 0

    def read(self) -> Batch:
        """Return what is new.

        :raises Failure: no policy is in force.
        """
        with contextlib.ExitStack() as stack:
            try:
                fds = {name: libbpf.get(state.PINS / name) for name in ("events", "watching", "witness", "counts")}
                for fd in fds.values():
                    stack.callback(os.close, fd)
                if self.everything:
                    until = int(time.clock_gettime(time.CLOCK_BOOTTIME)) + LEASE
                    libbpf.store(fds["witness"], layout.Witness, "all_until", until)
                newest = libbpf.read(fds["watching"], layout.Watching).told
                suppressed = libbpf.read(fds["counts"], layout.Counts).total().suppressed
            except OSError as error:
                raise state.not_in_force() from error
            number = libbpf.info(fds["watching"], libbpf.MapInfo).id
            if self.map not in (None, number):  # of another policy, which counts anew
                self.last, self._suppressed = 0, 0
            self.map = number
            if self.last is None:
                self.last = newest
            size = libbpf.info(fds["events"], libbpf.MapInfo).max_entries
            oldest = max(self.last + 1, newest - size + 1)
            lost = oldest - self.last - 1
            records = []
            for number in range(oldest, newest + 1):
                record = libbpf.read_locked(fds["events"], number % size, layout.Slot).event
                # Its number is taken, and it is yet to be written.
                if record.number < number and not self._is_overdue():
                    break
                self._waiting = None
                if record.number == number:
                    records.append(record)
                else:
                    lost += 1
                self.last = number
        before, self._suppressed = self._suppressed, suppressed
        more = 0 if before is None else suppressed - before
        entries: list[Entry] = [entry for entry in map(entry_of, records) if entry]
        lost += len(records) - len(entries)
        was, self._unanswered = self._unanswered, unanswered_since()
        return Batch([*entries, *notices(was, self._unanswered)], more, lost)

    def _is_overdue(self) -> bool:
        now = time.monotonic()
        self._waiting = self._waiting or now
        return now - self._waiting > PATIENCE


class Question:
    """Asks the policy every few seconds, where no server of the interface file does: see :func:`unanswered_since`.

    Each time by a process of its own, so that nobody waits for the answer.
    """

    def __init__(self) -> None:
        self._pid: int | None = None
        self._due = time.monotonic()

    def ask(self) -> None:
        """Start a process that asks, if it is time."""
        if self._pid is not None:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                    return
            self._pid = None
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + ASKING
        with contextlib.suppress(Failure):
            if state.server():
                return
        with contextlib.suppress(OSError):  # no process can be had: nothing is known
            self._pid = os.fork()
        if self._pid == 0:
            try:
                see()
            except (Failure, OSError) as error:
                log.debug("%s", error)
            finally:
                os._exit(0)


def see() -> None:
    """See the pinned policy refuse, or leave a note and close the native knob, as ``status`` does.

    Needs no more capabilities than uffdguard-log.service has, unless a file of ours covers the native knob.

    :raises Failure: it does not refuse, or it cannot be asked.
    :raises OSError: nothing is pinned, or another process has the lock.
    """
    with contextlib.ExitStack() as stack:
        if state.PINS.exists():  # else there would be a directory of the lock
            stack.enter_context(locked(wait=False))
        fds = {name: libbpf.get(state.PINS / name) for name in ("witness", "policy", "enforcement")}
        for fd in fds.values():
            stack.callback(os.close, fd)
        asker, knob = stack.enter_context(proof.Asker()), stack.enter_context(native.Knob())
        proof.see(fds, state.read_policy(fds["policy"]), asker, knob)


def unanswered_since() -> int:
    """Return since when the policy in force does not answer, in ns since boot; 0: it answers."""
    with contextlib.suppress(OSError):
        fd = libbpf.get(state.PINS / "enforcement")
        try:
            return int(libbpf.read(fd, layout.Enforcement).unanswered_since)
        finally:
            os.close(fd)
    return 0


def entry_of(record: layout.Event) -> Event | SysctlWrite | None:
    """Give names to what the kernel side has recorded; None: one of its words is not known."""
    return sysctl_write_of(record) if record.sysctl else event_of(record)


def sysctl_write_of(record: layout.Event) -> SysctlWrite | None:
    """Give names to a refused write of a sysctl; None: one of its words is not known."""
    if record.sysctl > len(layout.SYSCTLS) or record.mode >= len(layout.MODES):
        return None
    cgroup = one_line(cgroup_of(record.cgroup))
    return SysctlWrite(
        time=local_time(record.time),
        pid=record.pid,
        tid=record.tid,
        uid=record.uid,
        gid=record.gid,
        user=user_of(record.uid),
        command=one_line(record.command.decode(errors="backslashreplace")),
        executable=one_line(executable_of(record)),
        cgroup=cgroup,
        unit=unit(cgroup),
        sysctl=layout.SYSCTLS[record.sysctl - 1],
        value=None if record.flags == NO_NUMBER else record.flags,
        mode=layout.MODES[record.mode],
    )


def event_of(record: layout.Event) -> Event | None:
    """Give names to a decision; None: one of its words is not known."""
    if record.reason > len(layout.REASONS) or record.way >= len(layout.WAYS) or record.mode >= len(layout.MODES):
        return None
    native = record.reason == len(layout.REASONS)
    reason = None if native else layout.REASONS[record.reason]
    cgroup = one_line(cgroup_of(record.cgroup))
    return Event(
        time=local_time(record.time),
        pid=record.pid,
        tid=record.tid,
        uid=record.uid,
        gid=record.gid,
        user=user_of(record.uid),
        owner=record.owner,
        initial_user_namespace=bool(record.initial),
        command=one_line(record.command.decode(errors="backslashreplace")),
        executable=one_line(executable_of(record)),
        exe_device=f"{record.exe_device >> 20}:{record.exe_device & 0xFFFFF}",
        exe_inode=record.exe_inode,
        cgroup=cgroup,
        unit=unit(cgroup),
        way=layout.WAYS[record.way],
        flags=tuple(flags_of(record.flags)),
        mode=layout.MODES[record.mode],
        verdict="allowed" if reason and reason.allowed else "refused",
        reason=reason or NATIVE,
        enforced=bool(record.enforced),
        capability=bool(record.capability),
        user_mode_only=bool(record.flags & 1),
        granted=bool(record.granted),
    )


def local_time(since_boot: int) -> str:
    """Return a kernel's time since boot, in ns, as local time, ISO 8601 with microseconds."""
    from datetime import UTC, datetime, timedelta

    ago = timedelta(microseconds=(time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot) / 1000)
    return (datetime.now(UTC) - ago).astimezone().isoformat(timespec="microseconds")


def flags_of(flags: int) -> list[str]:
    """Return the names of the flags of userfaultfd(2), those that it does not know as one number."""
    unknown = flags & ~sum(FLAGS)
    return [name for bit, name in FLAGS.items() if flags & bit] + ([f"{unknown:#x}"] if unknown else [])


def executable_of(record: layout.Event) -> str:
    """Return the path that the process says it runs, if it ends in the name that was recorded; else that name.

    The kernel itself tells where /proc/PID/exe leads. What is there, in mounts that the process made, is not looked at:
    the answer could take for ever.
    """
    name: bytes = record.executable
    if time.clock_gettime_ns(time.CLOCK_BOOTTIME) - record.time < FRESH:
        with contextlib.suppress(OSError):
            path = str(Path("/proc", str(record.pid), "exe").readlink()).removesuffix(" (deleted)")
            # The kernel side has as much of a name as there is room for, and a byte for its end.
            if os.fsencode(Path(path).name)[: layout.Event.executable.size - 1] == name:
                return path
    return name.decode(errors="backslashreplace")


class Handle(ctypes.Structure):
    """struct file_handle of open_by_handle_at(2), as the kernel's pseudo file systems have it."""

    _fields_ = (("handle_bytes", ctypes.c_uint32), ("handle_type", ctypes.c_int32), ("id", ctypes.c_uint64))


def cgroup_of(number: int) -> str:
    """Return the path of the control group of version 2 with this id, or "" when it is gone.

    Needs CAP_DAC_READ_SEARCH.
    """
    root = next(filter(Path.is_dir, (CGROUPS / "unified", CGROUPS)), CGROUPS)
    try:
        mount = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    handle = Handle(8, FILEID_KERNFS, number)
    found = _libc().open_by_handle_at(mount, ctypes.byref(handle), os.O_PATH | os.O_CLOEXEC)
    os.close(mount)
    if found < 0:
        return ""
    try:
        return str(Path(f"/proc/self/fd/{found}").readlink()).removeprefix(str(root)) or "/"
    finally:
        os.close(found)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
