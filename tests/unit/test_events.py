"""Events as far as they go without a kernel of our own."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inside import until
from unit.test_journal import EVENT, WRITE

from uffdguard import events, state
from uffdguard.cli.watch import Lines, Objects
from uffdguard.events import Batch, Entry, Event, Notice, SysctlWrite, notices
from uffdguard.kernel import layout
from uffdguard.policy import Mode


def record(**values: Any) -> layout.Event:
    """Return what the kernel side would record of this process now, but for VALUES."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    name = os.fsencode(Path("/proc/self/exe").readlink().name)
    return layout.Event(**{"time": now, "pid": os.getpid(), "executable": name, "command": b"sysctl"} | values)


def test_the_policy_is_asked_now_and_then_by_a_process_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    servers = iter([None, None, 7])

    def see() -> None:
        with asked.open("a") as file:
            file.write("x")
        until(lambda: (tmp_path / "go on").exists())

    monkeypatch.setattr(events, "see", see)
    monkeypatch.setattr(events, "ASKING", 0.0)
    monkeypatch.setattr(state, "server", lambda: next(servers))
    question = events.Question()
    question.ask()
    until(asked.exists)
    for _ in range(3):
        question.ask()  # the first question is not answered yet
    (tmp_path / "go on").touch()

    def again() -> bool:
        question.ask()
        return len(asked.read_text()) == 2

    until(again)
    with pytest.raises(StopIteration):  # of the third, a server asks
        until(lambda: question.ask())
    assert asked.read_text() == "xx"


@pytest.mark.parametrize(
    ("sysctl", "flags", "name", "value"),
    [
        (1, 0, "kernel.ftrace_enabled", 0),
        (2, 1, "vm.unprivileged_userfaultfd", 1),
        (2, 0xFFFFFFFF, "vm.unprivileged_userfaultfd", None),
    ],
)
def test_a_refused_write_is_told_by_its_name_and_value(sysctl: int, flags: int, name: str, value: int | None) -> None:
    # What a decision has, and such a write has not, may be anything.
    found = events.entry_of(record(sysctl=sysctl, flags=flags, way=200, reason=200, mode=2))
    assert isinstance(found, SysctlWrite)
    assert (found.sysctl, found.value, found.mode, found.command) == (name, value, Mode.KVM, "sysctl")
    assert found.executable == str(Path("/proc/self/exe").readlink())


def test_one_that_only_another_version_knows_is_none() -> None:
    assert events.entry_of(record(sysctl=3)) is None
    assert events.entry_of(record(sysctl=1, mode=3)) is None
    assert isinstance(events.entry_of(record()), Event)


def test_an_executable_is_a_path_only_where_that_ends_in_the_recorded_name_and_the_pid_is_fresh() -> None:
    path = str(Path("/proc/self/exe").readlink())
    known = record()
    assert events.executable_of(known) == path
    assert events.executable_of(record(time=known.time - events.FRESH)) == Path(path).name
    assert events.executable_of(record(executable=b"other")) == "other"
    assert events.executable_of(record(pid=0)) == Path(path).name


def test_a_name_is_compared_as_far_as_the_kernel_side_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for link, name in (
        ("/a/" + "x" * 60, b"x" * 39),
        ("/a/gone (deleted)", b"gone"),
        ("/a/\udcff", b"\xff"),
    ):
        monkeypatch.setattr(Path, "readlink", lambda path, link=link: Path(link))
        assert events.executable_of(record(executable=name)) == link.removesuffix(" (deleted)")


def test_silence_is_told_once_and_its_end_once() -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert notices(0, 0) == notices(now, now) == []
    assert [notice.answers for notice in notices(0, now)] == [False]
    assert [notice.answers for notice in notices(now, 0)] == [True]
    assert [notice.answers for notice in notices(now - 1, now)] == [True, False]


def test_what_is_allowed_is_shown_to_who_asks_for_everything() -> None:
    allowed = replace(EVENT, verdict="allowed")
    batch = Batch([allowed, EVENT, WRITE, Notice(EVENT.time, answers=False)], 0, 0)
    assert batch.shown(everything=True) == batch.entries
    assert batch.shown(everything=False) == batch.entries[1:]
    assert batch.events == [allowed, EVENT]


def test_watch_shows_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    entries: list[Entry] = [EVENT, WRITE, WRITE, Notice(EVENT.time, answers=False), Notice(EVENT.time, answers=True)]
    Lines().events(entries)
    head, event, write, why, silent, again = capsys.readouterr().out.splitlines()
    for word, value in (("times", "2"), ("user", "root"), ("command", "sysctl"), ("verdict", "refused")):
        assert write[head.index(word) :].startswith(value)
    assert write[head.index("reason") :].split()[:3] == ["sysctl", "kernel.ftrace_enabled", "hardening.service"]
    assert event[head.index("reason") :].startswith("no-kvm")
    assert why.strip() == f"kernel.ftrace_enabled = 0: {WRITE.why}"
    assert silent == f"{EVENT.time[11:23]}  {Notice(EVENT.time, answers=False).line}"
    assert again.endswith("  the policy answers again")
    Objects().events(entries)
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["sysctl" in one for one in objects] == [False, True, True, False, False]
    assert (objects[1]["sysctl"], objects[1]["value"], objects[1]["verdict"]) == ("kernel.ftrace_enabled", 0, "refused")
    assert [one.get("answers") for one in objects] == [None, None, None, False, True]
