"""What happens, in the journal: structured fields of systemd-journald's native protocol, systemd.journal-fields(7)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from uffdguard import events
from uffdguard.errors import Failure
from uffdguard.events import Event, Notice, SysctlWrite
from uffdguard.kernel import native

if TYPE_CHECKING:
    from collections.abc import Mapping

    from uffdguard.events import Entry

#: The map and the number of the newest event that is in the journal; locked by the process that writes there.
WRITTEN = native.RUN / "log"

Kind = TypeVar("Kind", Event, SysctlWrite)

#: What tells our entries from all others: one for each kind, one for events of which only the number is known.
EVENT_ID = "6d0f1ab5c49b4d3b8f0d6a2b2f7c1e90"
SYSCTL_ID = "c2f6d1f0a1d24e6c9a7e4b0d5c83e1a4"
NOTICE_ID = "e81b7c5d90f3486ab2d46f17c3a9058e"
IDS: dict[type[Entry], str] = {Event: EVENT_ID, SysctlWrite: SYSCTL_ID, Notice: NOTICE_ID}
MISSING_ID = "b7c9a3f24e5d4f0f9a40d2c8b1e6d753"
PREFIX = "UFFDGUARD_"


def of_entry(entry: Entry) -> dict[str, str]:
    """Return the journal's fields for ENTRY: each of its names, in capitals, behind UFFDGUARD_."""
    found = {"MESSAGE": entry.line, "MESSAGE_ID": IDS[type(entry)], "PRIORITY": priority(entry)}
    for field in fields(entry):
        value = getattr(entry, field.name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif value is None:
            value = ""
        found[PREFIX + field.name.upper()] = "|".join(value) if isinstance(value, tuple) else str(value)
    return found


def priority(entry: Entry) -> str:
    """Return how urgent ENTRY is, as syslog(3) has it."""
    if isinstance(entry, Event):
        return "5" if entry.verdict == "refused" else "6"
    if isinstance(entry, SysctlWrite):
        return "4"
    return "5" if entry.answers else "2"


def of_missing(suppressed: int, lost: int) -> dict[str, str]:
    """Return the journal's fields for events of which only the number is known."""
    return {
        "MESSAGE": f"{suppressed} events suppressed, {lost} lost",
        "MESSAGE_ID": MISSING_ID,
        "PRIORITY": "4",
        f"{PREFIX}SUPPRESSED": str(suppressed),
        f"{PREFIX}LOST": str(lost),
    }


def follow(*, everything: bool) -> NoReturn:
    """Write what happens to the journal for as long as a policy is in force.

    :param everything: the allowed ones, too.
    :raises Failure: no policy is in force, there is no journal, or another writes there.
    """
    from logging_journald import JournaldTransport

    native.need_root("sees the decisions")
    events.Stream().read()
    written = os.open(WRITTEN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(written, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure("the journal is being written already", "see systemctl status uffdguard-log") from None
    stream = events.Stream(everything=everything)
    with contextlib.suppress(ValueError):
        stream.map, stream.last = map(int, os.pread(written, 64, 0).split())
    try:
        journal = JournaldTransport()
        question = events.Question()
        while True:
            question.ask()
            batch = stream.read()
            for entry in batch.shown(everything=everything):
                journal.send(of_entry(entry).items())
            if batch.suppressed or batch.lost:
                journal.send(of_missing(batch.suppressed, batch.lost).items())
            if batch.entries or batch.lost:
                os.pwrite(written, b"%020d %020d\n" % (stream.map or 0, stream.last or 0), 0)
            time.sleep(events.INTERVAL)
    except OSError as error:
        raise Failure(f"the journal does not take entries: {error}", "is systemd-journald running?") from error


def to_event(entry: Mapping[str, Any]) -> Event:
    """Return the decision of an entry, as ``journalctl --output=json`` gives it.

    :raises ValueError: it is none of ours.
    """
    return _to(Event, entry)


def to_sysctl_write(entry: Mapping[str, Any]) -> SysctlWrite:
    """Return the refused write of an entry, as :func:`to_event`."""
    return _to(SysctlWrite, entry)


def _to(kind: type[Kind], entry: Mapping[str, Any]) -> Kind:
    told: dict[str, Any] = {}
    for field in fields(kind):
        text = entry.get(PREFIX + field.name.upper(), "")
        if not isinstance(text, str):
            raise ValueError(f"no {field.name}")
        told[field.name] = text
        if field.type == "bool":
            told[field.name] = {"yes": True, "no": False}.get(text)
        elif field.type == "tuple[str, ...]":
            told[field.name] = tuple(filter(None, text.split("|")))
        elif field.type == "int | None":
            told[field.name] = text or None
    return msgspec.convert(told, kind, strict=False)
