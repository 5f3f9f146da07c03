"""Who used userfaultfd, as the journal has it, and what each mode would have done with them."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from uffdguard import config, journal
from uffdguard.errors import Failure, one_line
from uffdguard.policy import Mode, Policy, Request, Way, decide

if TYPE_CHECKING:
    from uffdguard.events import SysctlWrite
    from uffdguard.policy import Way

#: The strictest mode first.
STRICTNESS = (Mode.DISABLED, Mode.KVM, Mode.ENABLED)


class Program(NamedTuple):
    """A program of a user. A process can give itself any executable, so that the user belongs to its name."""

    #: The path that its processes say, or its file's name where none of them lived long enough.
    name: str
    user: str

    def __str__(self) -> str:
        """Return both, quoted as for a shell since a name may be a sentence."""
        return f"{shlex.quote(self.name)} of {shlex.quote(self.user)}"


class Who(NamedTuple):
    """Whose uses are counted together. Names that others chose have escapes for what does not print."""

    program: str  # as Program.name
    user: str
    unit: str


class Write(NamedTuple):
    """What is the same in refused writes of a sysctl that are counted together."""

    setting: str  # as events.SysctlWrite
    user: str
    command: str
    unit: str


@dataclass
class Uses:
    """What one of them has asked for."""

    asked: int = 0
    ways: Counter[Way] = field(default_factory=Counter)
    #: How often with UFFD_USER_MODE_ONLY.
    user_mode_only: int = 0
    #: How often each policy would have refused.
    refused: Counter[Policy] = field(default_factory=Counter)

    def add(self, other: Uses) -> None:
        """Count OTHER's as well."""
        self.asked += other.asked
        self.ways += other.ways
        self.user_mode_only += other.user_mode_only
        self.refused += other.refused

    def told(self, policy: Policy) -> str:
        """Say what POLICY would have answered."""
        refused = self.refused[policy]
        if 0 < refused < self.asked:
            return f"{refused} refused"
        return "refused" if refused else "allowed"

    def how(self) -> str:
        """Say by which ways it asked, and for what."""
        told: list[str] = sorted(self.ways)
        if self.user_mode_only:
            part = f" {self.user_mode_only} of {self.asked}" if self.user_mode_only < self.asked else ""
            told.append(f"user-mode-only{part}")
        return ", ".join(told)


@dataclass
class Report:
    """All that is recorded, counted."""

    #: What the configuration says; with it each mode is asked what it would have done.
    user_mode_only: bool
    #: By the device and inode of the executable, the user and the unit; and what they call it, which no other changes.
    by_file: dict[tuple[str, int, str, str], Uses] = field(default_factory=lambda: defaultdict(Uses))
    names: dict[tuple[str, int, str, str], str] = field(default_factory=dict)
    #: Refused writes of sysctls, and the time of the last of each.
    writes: Counter[Write] = field(default_factory=Counter)
    last_writes: dict[Write, datetime] = field(default_factory=dict)
    #: How often the policy stopped answering.
    silences: int = 0
    #: By the hour, in local time: how often allowed and refused then.
    hours: dict[datetime, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    first: datetime | None = None
    last: datetime | None = None
    allowed: int = 0
    refused: int = 0
    #: Of the refused, those that audit did not carry out.
    not_enforced: int = 0
    #: Of events of which only the number is known.
    suppressed: int = 0
    lost: int = 0
    #: Entries with our MESSAGE_ID that cannot be read.
    damaged: int = 0
    #: What journalctl had to say about the journal, e.g. that a file of it is not readable.
    journalctl: str = ""

    @property
    def asked(self) -> int:
        """How many uses are counted."""
        return self.allowed + self.refused

    @property
    def uses(self) -> dict[Who, Uses]:
        """What each program of each user and unit has asked for."""
        found: dict[Who, Uses] = defaultdict(Uses)
        for key, uses in self.by_file.items():
            _, _, user, unit = key
            found[Who(self.names[key], user, unit)].add(uses)
        return found

    @property
    def programs(self) -> int:
        """How many programs these were of."""
        return len({who[:2] for who in self.uses})

    def add(self, line: bytes) -> None:
        """Count what LINE of ``journalctl --output=json`` tells."""
        if line.startswith(b"-- "):  # e.g. that there are no entries
            return
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
            if entry.get("MESSAGE_ID") == journal.MISSING_ID:
                suppressed, lost = (_number(entry.get(f"{journal.PREFIX}{name}")) for name in ("SUPPRESSED", "LOST"))
                self.suppressed += suppressed
                self.lost += lost
                return
            if entry.get("MESSAGE_ID") == journal.NOTICE_ID:
                self.silences += entry.get(f"{journal.PREFIX}ANSWERS") == "no"
                return
            if entry.get("MESSAGE_ID") == journal.SYSCTL_ID:
                self._add_write(journal.to_sysctl_write(entry))
                return
            event = journal.to_event(entry)
            time = datetime.fromisoformat(event.time).astimezone()
        except (ValueError, OverflowError, RecursionError):
            self.damaged += 1
            return
        self.first, self.last = min(self.first or time, time), max(self.last or time, time)
        self.hours[time.replace(minute=0, second=0, microsecond=0, tzinfo=None)][event.verdict] += 1
        if event.verdict == "allowed":
            self.allowed += 1
        else:
            self.refused += 1
            self.not_enforced += not event.enforced
        program, user, unit = map(one_line, (event.executable or event.command, event.user, event.unit))
        key = (event.exe_device, event.exe_inode, user, unit)
        if key not in self.names or program.startswith("/"):
            self.names[key] = program
        uses = self.by_file[key]
        uses.asked += 1
        uses.ways[event.way] += 1
        uses.user_mode_only += event.user_mode_only
        uses.refused.update(_refusing(Request(event.capability, event.user_mode_only, event.granted)))

    def _add_write(self, write: SysctlWrite) -> None:
        time = datetime.fromisoformat(write.time).astimezone()
        key = Write(*map(one_line, (write.setting, write.user, write.command, write.unit)))
        self.writes[key] += 1
        self.last_writes[key] = max(self.last_writes.get(key, time), time)

    def ranking(self) -> list[tuple[Who, Uses]]:
        """Return the uses, who asked most first."""
        return sorted(self.uses.items(), key=lambda item: (-item[1].asked, item[0]))

    def policy(self, mode: Mode) -> Policy:
        """Return MODE with what the configuration says besides."""
        return Policy(mode, self.user_mode_only)

    def refused_by(self, policy: Policy) -> Counter[Program]:
        """Return which programs POLICY would have refused, and how often; who asked most first."""
        found: Counter[Program] = Counter()
        for who, uses in self.ranking():
            if uses.refused[policy]:
                found[Program(who.program, who.user)] += uses.refused[policy]
        return found

    def summary(self) -> str:
        """Say how many uses are recorded, of when."""
        if not self.first or not self.last:
            return "No use of userfaultfd is recorded: have uffdguard-log.service run, or uffdguard log."
        uses = f"{_count(self.asked, 'use', 'uses')} of userfaultfd by {_count(self.programs, 'program', 'programs')}"
        period = " to ".join(time.isoformat(timespec="seconds") for time in (self.first, self.last))
        return f"{uses}, {period}: {self.allowed} allowed, {self.refused} refused"

    def notes(self) -> list[str]:
        """Return what the reader of the figures must know of them, a sentence each."""
        told = []
        if self.suppressed or self.lost:
            told.append(f"{self.suppressed} events were suppressed and {self.lost} lost: the figures are too low.")
        if self.damaged:
            told.append(f"{_count(self.damaged, 'entry', 'entries')} could not be read: the figures are too low.")
        if self.silences:
            often = _count(self.silences, "time", "times")
            told.append(f"The policy stopped answering {often}: nothing is known of the calls until it answered again.")
        if self.journalctl:
            told.append(f"journalctl: {self.journalctl}")
        if self.not_enforced:
            told.append(f"{self.not_enforced} of the refusals are of audit, which does not carry them out.")
        if self.refused and not self.allowed:
            told.append(
                "Only refusals are recorded: who was allowed, and would be refused by a stricter mode, is known only "
                "from uffdguard log --all."
            )
        return told

    def recommendation(self) -> list[str]:
        """Return which mode to take, and who would be refused then, a sentence each; nothing without uses."""
        if not self.uses:
            return []
        refused = {mode: self.refused_by(self.policy(mode)) for mode in Mode}
        strictest = next(mode for mode in STRICTNESS if not refused[mode])
        if strictest is Mode.DISABLED:
            return ["disabled, the strictest mode, would have refused nobody: uffdguard mode disabled."]
        if strictest is Mode.KVM:
            return [
                "kvm is the strictest mode that would have refused nobody: uffdguard mode kvm.",
                f"disabled would have refused {_programs(refused[Mode.DISABLED])}.",
            ]
        same = refused[Mode.KVM] == refused[Mode.DISABLED]
        take = Mode.DISABLED if same else Mode.KVM
        told = [f"{take} would have refused {_programs(refused[take])}{'; kvm the same' if same else ''}."]
        with_option = self.refused_by(Policy(take, user_mode_only=True))
        if len(with_option) < len(refused[take]):
            who = _programs(with_option) if with_option else "nobody"
            told.append(f'With user-mode-only = "allow" in the configuration, {take} would have refused {who}.')
        if not same:
            told.append(f"disabled would have refused {_programs(refused[Mode.DISABLED])}.")
        told.append("Only enabled would have refused nobody, and it allows everybody.")
        told.append(f"If none of those that {take} would have refused must have a userfaultfd: uffdguard mode {take}.")
        return told


def read(since: str | None = None) -> Report:
    """Return what the journal has.

    :param since: a time as journalctl takes it; without it all that is kept.
    :raises Failure: there is no journalctl, or it failed, e.g. because it takes SINCE for no time; or as config.load().
    """
    report = Report(config.load().policy.user_mode_only)
    # Without --all a field of more than 4096 bytes would be left out.
    command = ["journalctl", "--output=json", "--no-pager", "--all"]
    if since is not None:
        command.append(f"--since={since}")
    # Root's only: everybody may write an entry with these fields, except for those with _, which journald adds.
    matches = [[f"MESSAGE_ID={number}", "_UID=0"] for number in (*journal.IDS.values(), journal.MISSING_ID)]
    command += " + ".join(map(" ".join, matches)).split()
    with tempfile.TemporaryFile() as told:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=told)
        except FileNotFoundError as error:
            raise Failure("there is no journalctl", "the report is made of systemd's journal") from error
        with process:
            assert process.stdout
            for line in process.stdout:
                report.add(line)
        told.seek(0)
        report.journalctl = one_line(" ".join(told.read().decode(errors="backslashreplace").split()))
    if process.returncode:
        hint = "journalctl(1) tells which times it takes" if since is not None else "try it as root"
        raise Failure(f"journalctl: {report.journalctl or f'ended with {process.returncode}'}", hint)
    return report


@cache
def _refusing(request: Request) -> tuple[Policy, ...]:
    """Return which policies refuse REQUEST, of all modes with and without the option."""
    policies = (Policy(mode, option) for mode in Mode for option in (False, True))
    return tuple(policy for policy in policies if not decide(policy, request).allowed)


def _number(text: object) -> int:
    if not isinstance(text, str) or not text.isdecimal() or len(text) > 20:  # digits of a u64
        raise ValueError("no number")
    return int(text)


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _programs(programs: Counter[Program]) -> str:
    return f"{_count(len(programs), 'program', 'programs')}: {named(programs)}"


def named(programs: Counter[Program], most: int = 5) -> str:
    """Return the first MOST of PROGRAMS, and how many more."""
    names = [*map(str, list(programs)[:most])]
    return ", ".join([*names, *([f"{len(programs) - most} more"] if len(programs) > most else [])])
