from __future__ import annotations

from dataclasses import replace

import pytest

from uffdguard import journal
from uffdguard.events import Event, Notice, SysctlWrite
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


WRITE = SysctlWrite(
    time="2026-11-25T18:01:00.000001+00:00",
    pid=412,
    tid=412,
    uid=0,
    gid=0,
    user="root",
    command="sysctl",
    executable="/usr/sbin/sysctl",
    cgroup="/system.slice/hardening.service",
    unit="hardening.service",
    sysctl="kernel.ftrace_enabled",
    value=0,
    mode=Mode.DISABLED,
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


@pytest.mark.parametrize("write", [WRITE, replace(WRITE, value=None), replace(WRITE, value=4294967294)])
def test_a_refused_write_comes_out_of_the_journal_as_it_went_in(write: SysctlWrite) -> None:
    fields = journal.of_entry(write)
    assert journal.to_sysctl_write(fields) == write
    assert (fields["MESSAGE_ID"], fields["PRIORITY"], fields["UFFDGUARD_SYSCTL"]) == (
        journal.SYSCTL_ID, "4", "kernel.ftrace_enabled",
    )  # fmt: skip
    with pytest.raises(ValueError):
        journal.to_sysctl_write({**fields, "UFFDGUARD_VALUE": "x"})


def test_a_notice_is_an_entry_of_its_own_kind() -> None:
    silent, again = (journal.of_entry(Notice(EVENT.time, answers=answers)) for answers in (False, True))
    assert (silent["UFFDGUARD_ANSWERS"], silent["PRIORITY"]) == ("no", "2")
    assert (again["UFFDGUARD_ANSWERS"], again["PRIORITY"]) == ("yes", "5")
    assert len({journal.EVENT_ID, journal.SYSCTL_ID, journal.MISSING_ID, silent["MESSAGE_ID"]}) == 4


def test_a_refused_write_says_what_to_do() -> None:
    assert WRITE.line == (
        "sysctl kernel.ftrace_enabled = 0 refused: sysctl, pid 412, user root; "
        "it would switch the policy off without a trace; take it out of sysctl.d, or run uffdguard stop first"
    )
    knob = replace(WRITE, sysctl="vm.unprivileged_userfaultfd", value=1)
    assert knob.line.endswith("; mode disabled wants 0; switch the mode with uffdguard mode")
    assert replace(knob, mode=Mode.KVM, value=None).line == (
        "sysctl vm.unprivileged_userfaultfd refused: sysctl, pid 412, user root; "
        "mode kvm wants 1; switch the mode with uffdguard mode"
    )


def test_a_line_says_whether_the_verdict_was_carried_out() -> None:
    assert EVENT.line == "userfaultfd refused (no-kvm): python3, pid 4122, user ada"
    assert replace(EVENT, enforced=False).line.startswith("userfaultfd would be refused (no-kvm): python3")
