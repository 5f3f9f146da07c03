"""report on a real journal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from inside import USER, forked, journald, uffdguard
from unit.test_journal import EVENT

from uffdguard import journal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def send(*entries: Mapping[str, str], user: int = 0) -> None:
    """Have a process of USER write ENTRIES to the journal, and what journald adds with a leading _, too."""

    def job() -> None:
        os.setresuid(user, user, user)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.connect("/run/systemd/journal/socket")
            for entry in entries:
                peer.send("".join(f"{key}={value}\n" for key, value in {**entry, "_UID": "0"}.items()).encode())

    _, ended = os.waitpid(forked(job), 0)
    assert ended == 0
    subprocess.run(["journalctl", "--sync"], check=True)


@pytest.fixture(autouse=True)
def a_journal() -> Iterator[None]:
    with journald():
        yield


def test_it_counts_what_root_wrote_and_nothing_else() -> None:
    # Of more bytes than journalctl shows of a field unless it is asked to.
    far = replace(EVENT, exe_inode=1, executable="/" + r"\x1b" * 2000)
    send(*[journal.of_entry(EVENT)] * 3, journal.of_entry(far), journal.of_missing(4, 5))
    send(*[journal.of_entry(EVENT)] * 7, journal.of_missing(1000, 1000), user=USER)
    send({"MESSAGE_ID": journal.EVENT_ID, "MESSAGE": "damaged"})
    found = json.loads(uffdguard("report", "--json").out)
    assert [(use["program"], use["asked"]) for use in found["uses"]] == [("python3", 3), (far.executable, 1)]
    assert [found[name] for name in ("asked", "suppressed", "lost", "damaged")] == [4, 4, 5, 1]


def test_a_time_is_journalctls() -> None:
    send(journal.of_entry(EVENT))
    assert json.loads(uffdguard("report", "--json", "--since", "-1h").out)["asked"] == 1
    nothing = uffdguard("report", "--since", "tomorrow")
    assert (nothing.status, nothing.err) == (0, "")
    assert nothing.out.startswith("No use of userfaultfd is recorded")
    wrong = uffdguard("report", "--since", "tea time")
    assert (wrong.status, wrong.out, wrong.err.count("\n")) == (1, "", 1)
    assert wrong.err.startswith("uffdguard: journalctl: Failed to parse timestamp: tea time; ")


def test_who_may_not_read_the_journal_is_told_so() -> None:
    send(journal.of_entry(EVENT))
    refused = uffdguard("report", user=USER)
    assert (refused.status, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "insufficient permissions" in refused.err
