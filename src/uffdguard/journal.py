"""Events in the journal: the structured fields of systemd-journald's native protocol, systemd.journal-fields(7)."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import msgspec

from uffdguard.events import Event

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What tells our entries from all others: one for an event, one for events of which only the number is known.
EVENT_ID = "6d0f1ab5c49b4d3b8f0d6a2b2f7c1e90"
MISSING_ID = "b7c9a3f24e5d4f0f9a40d2c8b1e6d753"
PREFIX = "UFFDGUARD_"


def of_event(event: Event) -> dict[str, str]:
    """Return the journal's fields for EVENT: each of its names, in capitals, behind UFFDGUARD_."""
    found = {"MESSAGE": event.line, "MESSAGE_ID": EVENT_ID, "PRIORITY": "5" if event.verdict == "refused" else "6"}
    for field in fields(Event):
        value = getattr(event, field.name)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        found[PREFIX + field.name.upper()] = "|".join(value) if isinstance(value, tuple) else str(value)
    return found


def of_missing(suppressed: int, lost: int) -> dict[str, str]:
    """Return the journal's fields for events of which only the number is known."""
    return {
        "MESSAGE": f"{suppressed} events suppressed, {lost} lost",
        "MESSAGE_ID": MISSING_ID,
        "PRIORITY": "4",
        f"{PREFIX}SUPPRESSED": str(suppressed),
        f"{PREFIX}LOST": str(lost),
    }


def to_event(entry: Mapping[str, Any]) -> Event:
    """Return the event of an entry, as ``journalctl --output=json`` gives it.

    :raises ValueError: it is none of ours.
    """
    told: dict[str, Any] = {}
    for field in fields(Event):
        text = entry.get(PREFIX + field.name.upper(), "")
        if not isinstance(text, str):
            raise ValueError(f"no {field.name}")
        told[field.name] = text
        if field.type == "bool":
            told[field.name] = {"yes": True, "no": False}.get(text)
        elif field.type == "tuple[str, ...]":
            told[field.name] = tuple(filter(None, text.split("|")))
    return msgspec.convert(told, Event, strict=False)
