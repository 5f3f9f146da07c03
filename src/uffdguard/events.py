"""Decisions as they happen: what the kernel side tells of each, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uffdguard.policy import Mode  # noqa: TC001 - at run time too: journal.to_event() has msgspec read the types

#: The ways to ask: userfaultfd(2), the same by a 32-bit program or of x32, and ioctl(2) on /dev/userfaultfd.
Way = Literal["syscall", "compat", "x32", "device"]


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
    #: The path of the executable, or "" where the process had ended before it was looked up.
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
