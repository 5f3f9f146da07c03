from __future__ import annotations

from dataclasses import replace

import pytest

from uffdguard import journal
from uffdguard.events import Event
from uffdguard.policy import Mode

EVENT = Event(
    time="2026-11-25T18:00:00.000001+00:00",
    pid=4122,
    tid=4123,
    uid=1000,
    gid=1000,
    user="ada",
    owner=1000,
    initial_user_namespace=True,
    command="python3",
    executable="",
    exe_device="254:0",
    exe_inode=131,
    cgroup="/system.slice/ada.service",
    unit="ada.service",
    way="syscall",
    flags=("O_CLOEXEC", "O_NONBLOCK"),
    mode=Mode.KVM,
    verdict="refused",
    reason="no-kvm",
    enforced=True,
    capability=False,
    user_mode_only=False,
    granted=False,
)


@pytest.mark.parametrize(
    "event", [EVENT, replace(EVENT, flags=(), enforced=False, executable="/a b|c", uid=4294967294)]
)
def test_an_event_comes_out_of_the_journal_as_it_went_in(event: Event) -> None:
    assert journal.to_event({**journal.of_entry(event), "_PID": "1"}) == event


@pytest.mark.parametrize(
    "field, value", [("PID", "x"), ("MODE", "open"), ("WAY", ""), ("ENFORCED", "1"), ("USER", [1])]
)
def test_an_entry_that_is_none_of_ours_is_told_so(field: str, value: object) -> None:
    with pytest.raises(ValueError):
        journal.to_event({**journal.of_entry(EVENT), f"UFFDGUARD_{field}": value})


def test_a_line_says_whether_the_verdict_was_carried_out() -> None:
    assert EVENT.line == "userfaultfd refused (no-kvm): python3, pid 4122, user ada"
    assert replace(EVENT, enforced=False).line.startswith("userfaultfd would be refused (no-kvm): python3")
