"""Decisions as they happen: read what the kernel side tells of each, and give it names."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uffdguard import state
from uffdguard.errors import one_line
from uffdguard.inspect import NATIVE, unit, user_of
from uffdguard.kernel import layout, libbpf
from uffdguard.policy import Mode, Way  # noqa: TC001 - at run time too: journal.to_event() has msgspec read the types

#: Seconds between two looks. Events have a limit, and the kernel side keeps the newest 2048.
INTERVAL = 0.25
#: Seconds, at most, for which the allowed ones are asked for anew at each look.
LEASE = 3

FLAGS = {0x1: "UFFD_USER_MODE_ONLY", os.O_NONBLOCK: "O_NONBLOCK", os.O_CLOEXEC: "O_CLOEXEC"}
CGROUPS = Path("/sys/fs/cgroup")
FILEID_KERNFS = 0xFE  # include/linux/exportfs.h
#: Seconds after which an event whose number is taken, and which is not there, counts as lost.
PATIENCE = 2.0


@dataclass(frozen=True)
class Event:
    """A decision, as it was taken. The names are those of ``watch --json``.

    Names that others chose have escapes for what does not print, see :func:`uffdguard.errors.one_line`.
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
    #: The path of the executable; its file's name where the process had ended, or that path is another file for us.
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
class Batch:
    """What is new since the last look."""

    events: list[Event]
    suppressed: int  # over a limit
    lost: int  # overwritten before they were read, or of another version's kernel side with words that we have not


class Stream:
    """The events of the policy in force, each once.

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
        events = [event for event in map(event_of, records) if event]
        return Batch(events, more, lost + len(records) - len(events))

    def _is_overdue(self) -> bool:
        now = time.monotonic()
        self._waiting = self._waiting or now
        return now - self._waiting > PATIENCE


def event_of(record: layout.Event) -> Event | None:
    """Give names to what the kernel side has told; None: one of its words is not known."""
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
    """Return the path of what the process ran, if that is the same file for us; else the file's name.

    A process has mounts of its own, in which it can give its program any path.
    """
    name: str = record.executable.decode(errors="backslashreplace")
    process = Path("/proc", str(record.pid))
    try:
        # proc(5): its start is the 22nd field, in ticks since boot; the second may have blanks and parentheses.
        ticks = int((process / "stat").read_bytes().rpartition(b")")[2].split()[19])
        path = (process / "exe").readlink()
        found = (process / "exe").stat()
        same = os.path.samestat(found, path.stat()) and found.st_ino == record.exe_inode
    except (OSError, IndexError):
        return name
    return str(path) if same and ticks * 10**9 // os.sysconf("SC_CLK_TCK") <= record.time else name


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
