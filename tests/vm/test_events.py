"""Events and counts on a live kernel: each decision is counted, told as it was, and nobody can fill the log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from inside import (
    ACTOR,
    INT80,
    USER,
    actor,
    force_knob,
    forked,
    journald,
    kernel_memory,
    uffdguard,
    until,
    waiting_actor,
)
from vm import silent

from uffdguard import events, guard, inspect, journal, report, state
from uffdguard.events import INTERVAL, LEASE, Event, Stream
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
KVM = "open:/dev/kvm"
HOSTILE = "\x1b[31m\n<b>[red]"
ESCAPED = r"\x1b[31m\n<b>[red]"
OTHER = 1001
UFFDGUARD = [sys.executable, "-m", "uffdguard"]
#: The actor, root in a user namespace that is in another.
NESTED = ["unshare", "-Ur", "unshare", "-Ur", str(ACTOR)]


@pytest.fixture
def kvm(in_force: Callable[..., None]) -> None:
    in_force("kvm", events_per_second=500)


def told(*steps: str, stream: Stream | None = None, user: int = USER) -> list[Event]:
    """Let the actor do STEPS, and return the events of that."""
    stream = stream or Stream(None)
    stream.read()
    actor(*steps, user=user)
    batch = stream.read()
    assert (batch.suppressed, batch.lost) == (0, 0)
    return batch.events


def newest() -> int:
    """Return the number of the newest event."""
    with state.pinned() as found:
        number: int = libbpf.read(found.fds["watching"], layout.Watching).told
    return number


def most_in_a_second(first: int) -> int:
    """Return how many events there were in one second of the kernel's, from the number FIRST on."""
    with state.pinned() as found:
        slots = (libbpf.read_locked(found.fds["events"], n % 2048, layout.Slot) for n in range(first, newest() + 1))
        return max(Counter(slot.event.time // 10**9 for slot in slots).values(), default=0)


def limit(**numbers: int) -> None:
    fd = libbpf.get(state.PINS / "watching")
    for name, number in numbers.items():
        libbpf.store(fd, layout.Watching, name, number)
    os.close(fd)


def counted() -> Counter[str]:
    """Return how many decisions there were by reason, and what else is counted of them."""
    status = state.status()
    numbers = {str(reason): number for reason, number in status.decisions.items()}
    return Counter(numbers | {"native": status.native, "let pass": status.let_pass})


def more(before: Counter[str]) -> dict[str, int]:
    return dict(counted() - before)


class TestAnEvent:
    def test_says_who_asked_how_and_what_was_decided(self, kvm: None) -> None:
        before = time.time()
        (event,) = told("name:asker", "syscall:0x80800")
        assert event.pid == event.tid > 0
        assert (event.uid, event.gid, event.owner) == (USER, USER, USER)
        assert event.user == inspect.user_of(USER)
        assert event.initial_user_namespace
        assert event.command == "asker"
        assert (event.way, event.flags) == ("syscall", ("O_NONBLOCK", "O_CLOEXEC"))
        assert (event.mode, event.verdict, event.reason, event.enforced) == (Mode.KVM, "refused", "no-kvm", True)
        assert not (event.capability or event.user_mode_only or event.granted)
        assert before - 0.1 <= datetime.fromisoformat(event.time).timestamp() <= time.time()
        found = ACTOR.stat()
        assert (event.exe_inode, event.exe_device) == (
            found.st_ino,
            f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}",
        )
        assert event.executable == ACTOR.name  # it has ended

    @pytest.mark.kept
    @pytest.mark.parametrize(
        ("step", "way", "flags"),
        [
            ("syscall:1", "syscall", ("UFFD_USER_MODE_ONLY",)),
            ("syscall-misleading:0x80000", "syscall", ("O_CLOEXEC",)),
            ("int80:1", INT80, ("UFFD_USER_MODE_ONLY",)),
            ("int80-misleading:0x800", INT80, ("O_NONBLOCK",)),
            ("device:1", "device", ("UFFD_USER_MODE_ONLY",)),
            ("device-misleading", "device", ()),
            ("device-int80:0x80001", "device", ("UFFD_USER_MODE_ONLY", "O_CLOEXEC")),
            ("device-int80-misleading", "device", ()),
        ],
    )
    def test_says_by_which_way_and_with_which_flags(
        self, kvm: None, step: str, way: str, flags: tuple[str, ...]
    ) -> None:
        (event,) = told(step)
        assert (event.way, event.flags, event.user_mode_only) == (way, flags, "UFFD_USER_MODE_ONLY" in flags)

    def test_of_the_native_knob_has_the_flags_that_the_kernel_knows_not(self, in_force: Callable[..., None]) -> None:
        in_force("disabled")
        (event,) = told("int80:0x80046")
        assert (event.reason, event.way, event.flags) == ("native", INT80, ("O_CLOEXEC", "0x46"))

    def test_says_the_path_of_an_executable_that_still_runs(self, kvm: None) -> None:
        stream = Stream(None)
        stream.read()
        with subprocess.Popen([ACTOR, "syscall", "wait"], user=USER, stdin=subprocess.PIPE) as process:
            batch = stream.read()
            while not batch.events:
                batch = stream.read()
            process.communicate(b"\n")
        assert batch.events[0].executable == str(ACTOR)

    def test_has_the_executable_that_the_process_says_and_whose_it_is(self, kvm: None) -> None:
        """Root of a user namespace of one's own has any file there is as the executable: PR_SET_MM_MAP."""
        other = Path("/usr/bin/env").resolve()
        stream = Stream(None)
        stream.read()
        with waiting_actor("name:env", "unshare-user", f"executable:{other}", "syscall", "wait") as go_on:
            batch = stream.read()
            assert go_on() == ["EPERM"]
        (event,) = batch.events
        assert (event.executable, event.exe_inode, event.command) == (str(other), other.stat().st_ino, "env")
        assert (event.uid, event.owner, event.initial_user_namespace) == (USER, USER, False)
        # Which is why report names the user with it, and lets it rename nothing of another's.
        found = report.Report(user_mode_only=False)
        for one in (event, replace(event, user="ada", executable="env")):
            found.add(json.dumps(journal.of_entry(one)).encode())
        assert {who.user: who.program for who in found.uses} == {event.user: str(other), "ada": "env"}
        assert f"{other} of {event.user}" in found.recommendation()[0]

    def test_says_the_control_group_and_what_is_named_by_it(self, kvm: None) -> None:
        if not (root := Path("/run/cgroup2")).exists():
            root.mkdir()
            subprocess.run(["mount", "-t", "cgroup2", "cgroup2", root], check=True)
        (unit := root / "uffdguard-test.service").mkdir()
        try:
            stream = Stream(None)
            stream.read()

            def ask_there() -> None:
                (unit / "cgroup.procs").write_text(str(os.getpid()))
                actor("syscall")

            os.waitpid(forked(ask_there), 0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("uffdguard.events.CGROUPS", root)
                (event,) = stream.read().events
        finally:
            unit.rmdir()
        assert (event.cgroup, event.unit) == ("/uffdguard-test.service", "uffdguard-test.service")

    def test_says_who_is_in_another_user_namespace_and_whose_it_is(self, kvm: None) -> None:
        stream = Stream(None)
        stream.read()
        subprocess.run([*NESTED, "syscall"], user=USER, check=True, stdout=subprocess.DEVNULL)
        (event,) = stream.read().events
        assert not event.initial_user_namespace
        assert (event.uid, event.owner, event.capability) == (USER, USER, False)
        (event,) = told("unshare-user", "syscall:1", user=0)
        assert (event.owner, event.capability) == (0, False)

    def test_has_escapes_for_what_does_not_print_in_a_name(self, kvm: None) -> None:
        (event,) = told(f"name:{HOSTILE}", "syscall")
        assert event.command == ESCAPED[: len(event.command)]
        assert len(event.command) > 15

    def test_is_told_of_each_thread_and_each_child(self, kvm: None) -> None:
        (event,) = told("thread", "syscall")
        assert event.tid != event.pid
        one, other = told("syscall", "fork", "syscall")
        assert one.pid != other.pid

    def test_is_not_told_of_what_is_allowed_unless_somebody_wants_to_know(self, kvm: None) -> None:
        assert told(KVM, "syscall", "device") == []
        everything = Stream(None, everything=True)
        events = told(KVM, "syscall", "device", stream=everything)
        assert [(event.verdict, event.reason, event.way) for event in events] == [
            ("allowed", "kvm", "syscall"),
            ("allowed", "kvm", "device"),
        ]
        assert all(event.granted and event.enforced for event in events)

    def test_wish_for_the_allowed_ones_ends_with_who_had_it(self, kvm: None) -> None:
        Stream(None, everything=True).read()
        time.sleep(LEASE)
        assert told(KVM, "syscall") == []
        with state.pinned() as found:  # and nobody pays for it any more
            assert libbpf.read(found.fds["witness"], layout.Witness).all_until == 0

    def test_is_not_made_of_what_start_tries(self, in_force: Callable[..., None]) -> None:
        stream = Stream(everything=True)
        for mode in ("kvm", "disabled", "enabled"):
            in_force(mode)
            guard.set_mode(Mode.KVM)
            assert stream.read().events == []
        assert +counted() == {}


class TestTheNativeKnob:
    """In mode disabled it is 0, and refuses before any hook."""

    @pytest.fixture(autouse=True)
    def mode(self, in_force: Callable[..., None]) -> None:
        in_force("disabled", events_per_second=500)

    def test_is_counted_and_told_where_it_refuses(self) -> None:
        events = told("syscall", "int80", "syscall-misleading", "int80-misleading")
        assert [event.reason for event in events] == ["native"] * 4
        assert more(Counter()) == {"native": 4}

    def test_is_not_taken_for_what_refuses_where_the_hook_does(self) -> None:
        events = told("syscall:1", "device", "int80:1", "device-int80", "syscall", "device:1", "syscall")
        assert [event.reason for event in events] == ["disabled"] * 4 + ["native", "disabled", "native"]
        assert more(Counter()) == {"native": 2, "disabled": 5}

    def test_is_not_counted_when_somebody_has_opened_it_and_the_hook_refuses(self) -> None:
        force_knob(1)
        assert [event.reason for event in told("syscall", "int80", "syscall")] == ["disabled"] * 3
        assert more(Counter()) == {"disabled": 3}
        force_knob(0)
        assert [event.reason for event in told("syscall")] == ["native"]

    def test_counts_again_after_the_mode_was_another(self) -> None:
        guard.set_mode(Mode.KVM)
        assert [event.reason for event in told("syscall", "device")] == ["no-kvm"] * 2
        guard.set_mode(Mode.DISABLED)
        assert [event.reason for event in told("syscall")] == ["native"]

    def test_is_not_taken_for_a_refusal_of_another_mode(self) -> None:
        """What has refused in kvm has left a mark that nothing has taken away."""
        with subprocess.Popen(
            [ACTOR, *["syscall", "int80", "wait"] * 2, "syscall", "int80"],
            user=USER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin
            until(lambda: counted()["native"] == 2)
            guard.set_mode(Mode.KVM)
            process.stdin.write(b"\n")
            process.stdin.flush()
            until(lambda: counted()["no-kvm"] == 2)
            guard.set_mode(Mode.DISABLED)
            before = counted()
            assert [event.reason for event in told("syscall")] == ["native"]
            process.communicate(b"\n")
        assert more(before) == {"native": 3}

    def test_is_named_when_it_is_not_counted_and_start_mends_it(self) -> None:
        (state.PINS / state.link_of("native")).unlink()
        assert state.status().problems == ["the refusals of the native knob are not counted"]
        guard.start(Policy(), None)
        assert state.status().problems == []
        assert [event.reason for event in told("syscall", "int80")] == ["native"] * 2

    def test_is_not_asked_about_where_it_allows(self) -> None:
        actor("syscall", "device", user=0)
        assert more(Counter()) == {"capability": 2}


class TestTheLimit:
    def flood(self, number: int) -> int:
        """Ask NUMBER times and return the most that is told a second; see that the rest is counted as suppressed."""
        first = newest() + 1
        stream = Stream(None)
        stream.read()
        assert actor(f"flood:{number}") == [str(number)]
        batch = stream.read()
        assert len(batch.events) + batch.suppressed == number
        return most_in_a_second(first)

    def test_is_so_many_a_second_for_one_user(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        assert self.flood(20_000) == 20
        assert more(Counter()) == {"no-kvm": 20_000}

    def test_is_that_of_the_configuration(self, in_force: Callable[..., None]) -> None:
        in_force("kvm", events_per_second=3)
        assert self.flood(5000) == 3
        in_force("kvm", events_per_second=0)
        assert self.flood(100) == 0

    def test_is_one_for_all_user_namespaces_of_a_user(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        first = newest() + 1
        floods = [
            subprocess.Popen([*command, "flood:5000"], user=USER, stdout=subprocess.DEVNULL)
            for command in ([str(ACTOR)], [str(ACTOR), "unshare-user"], NESTED)
        ]
        assert [process.wait() for process in floods] == [0, 0, 0]
        assert most_in_a_second(first) == 20

    def test_of_one_user_is_none_for_another(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        stream = Stream(None)
        stream.read()
        with subprocess.Popen([ACTOR, "flood:1000000000"], user=USER, stdout=subprocess.DEVNULL) as process:
            before = counted()
            for _ in range(10):
                actor("device", "device", user=OTHER)
                time.sleep(0.2)
            assert more(before)["no-kvm"] > 1000
            process.kill()
        by_user = Counter(event.uid for event in stream.read().events)
        assert by_user[OTHER] == 20

    def test_of_all_users_together_is_kept_too(self, in_force: Callable[..., None]) -> None:
        in_force("kvm", events_per_second=500)
        limit(total=7)
        assert self.flood(5000) == 7

    def test_keeps_memory_flat_and_the_counts_exact(self, in_force: Callable[..., None], steps: int) -> None:
        number = min(250 * steps, 1_000_000)
        in_force("kvm")
        actor("flood:10000")
        memory, before = kernel_memory(), counted()
        assert actor(f"flood:{number}") == [str(number)]
        assert more(before) == {"no-kvm": number}
        grown = kernel_memory() - memory
        print(f"{number} refusals: {grown:+} KiB of kernel memory")
        assert grown < 1024

    def test_counts_are_exact_on_all_cpus_at_once(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        floods = [subprocess.Popen([ACTOR, "flood:5000"], user=1000 + n, stdout=subprocess.DEVNULL) for n in range(4)]
        assert [process.wait() for process in floods] == [0] * 4
        assert more(Counter()) == {"no-kvm": 20_000}


class TestReaders:
    def test_all_get_every_event_and_a_late_one_what_was_before(self, kvm: None) -> None:
        one, other = Stream(), Stream()
        actor("syscall", "device")
        seen = one.read().events
        assert len(seen) == 2
        assert [strip(event) for event in other.read().events] == [strip(event) for event in seen]
        assert one.read().events == []
        assert [strip(event) for event in Stream().read().events] == [strip(event) for event in seen]

    def test_a_slow_one_is_told_how_many_it_has_lost(self, kvm: None) -> None:
        limit(per_owner=1 << 30, total=1 << 30)
        stream = Stream()
        actor("flood:5000")
        batch = stream.read()
        assert (len(batch.events), batch.lost, batch.suppressed) == (2048, 5000 - 2048, 0)
        actor("syscall")
        assert len(stream.read().events) == 1

    def test_count_as_lost_what_has_words_that_only_another_version_knows(
        self, in_force: Callable[..., None], variant: Callable[..., None]
    ) -> None:
        variant("event->way = way_of(task, &flags);", "event->way = 100 + way_of(task, &flags);")
        in_force("kvm", events_per_second=500)
        stream = Stream(None)
        stream.read()
        actor("syscall", "device")
        batch = stream.read()
        assert (batch.events, batch.lost) == ([], 2)

    def test_go_on_over_an_upgrade(self, kvm: None) -> None:
        stream = Stream()
        actor("syscall")
        state.LOADED.write_text("another object")
        guard.start(Policy(), None, events_per_second=500)
        actor("device")
        batch = stream.read()
        assert ([event.way for event in batch.events], batch.lost) == (["syscall", "device"], 0)
        assert more(Counter()) == {"no-kvm": 2}

    def test_begin_anew_with_another_policy(self, kvm: None, in_force: Callable[..., None]) -> None:
        stream = Stream()
        actor("syscall", "syscall")
        stream.read()
        guard.stop()
        in_force("kvm")
        actor("device")
        batch = stream.read()
        assert ([event.way for event in batch.events], batch.lost) == (["device"], 0)


def strip(event: Event) -> tuple[object, ...]:
    """Leave out what is computed anew at each look."""
    return (event.pid, event.way, event.reason)


class TestAudit:
    WAYS = ("syscall:1", "int80:1", "device", "device-int80")

    @pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
    def test_lets_pass_what_it_would_refuse_and_tells_so(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode, audit=True, events_per_second=500)
        stream = Stream()
        assert actor(*self.WAYS) == ["allowed"] * 4
        reason = "disabled" if mode is Mode.DISABLED else "no-kvm"
        events = stream.read().events
        assert [(event.verdict, event.reason, event.enforced) for event in events] == [("refused", reason, False)] * 4
        assert more(Counter()) == {reason: 4, "let pass": 4}

    @pytest.mark.parametrize("found", [0, 1])
    @pytest.mark.parametrize("mode", list(Mode))
    def test_leaves_the_native_knob_as_it_was_found(
        self, in_force: Callable[..., None], mode: Mode, found: int
    ) -> None:
        native.FILE.write_text(f"{found}\n")
        in_force(mode, audit=True)
        assert native.read_knob() == found
        assert actor("syscall", "int80") == ["allowed" if found else "EPERM"] * 2
        assert more(Counter()).get("native", 0) == (0 if found else 2)
        in_force(mode)
        assert native.read_knob() == mode.native_value
        in_force(mode, audit=True)
        assert native.read_knob() == found
        assert not state.status().problems

    def test_is_changed_to_and_from_with_grants_and_counts_kept(self, in_force: Callable[..., None]) -> None:
        native.FILE.write_text("1\n")
        in_force("kvm")
        actor("syscall")
        with subprocess.Popen([ACTOR, KVM, "wait", "syscall"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as opener:
            until(lambda: state.status().grants == 1)
            in_force("kvm", audit=True)
            assert actor("syscall") == ["allowed"]
            in_force("kvm")
            assert actor("syscall") == ["EPERM"]
            status = state.status()
            assert (status.grants, status.decisions[Reason.NO_KVM], status.let_pass) == (1, 3, 1)
            opener.communicate(b"\n")

    def test_is_said_wherever_the_state_is_told(self, in_force: Callable[..., None]) -> None:
        warning = "audit: refusals are counted and told, and let pass\n"
        assert uffdguard("start", "--mode", "kvm", "--audit").err == warning
        assert uffdguard("mode").err == uffdguard("mode", "disabled").err == warning
        assert "NOT ENFORCED (audit)" in uffdguard("status").out
        assert json.loads(uffdguard("status", "--json").out)["audit"] is True
        assert uffdguard("start", "--enforce").out == "audit has ended: refusals are carried out\n"
        assert "NOT ENFORCED" not in uffdguard("status").out
        assert actor("device") == ["EPERM"]

    def test_stays_when_the_mode_is_switched(self, in_force: Callable[..., None]) -> None:
        in_force("kvm", audit=True)
        guard.set_mode(Mode.DISABLED)
        assert state.status().audit
        assert actor("device") == ["allowed"]

    def test_check_says_what_it_lets_pass(self, in_force: Callable[..., None]) -> None:
        native.FILE.write_text("1\n")
        in_force("kvm", audit=True)
        with subprocess.Popen([ACTOR, "wait"], user=USER, stdin=subprocess.PIPE) as process:
            answer = uffdguard("check", str(process.pid))
            process.communicate(b"\n")
        assert answer.status == 0
        assert "allowed (audit): in audit a refusal is let pass; this one (no-kvm): mode is kvm" in answer.out


class TestWatch:
    """The command itself, in a process of its own."""

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "uffdguard", "watch", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def lines(self, process: subprocess.Popen[str], number: int) -> list[str]:
        assert process.stdout
        return [process.stdout.readline() for _ in range(number)]

    def test_prints_an_aligned_line_an_event_and_folds_what_repeats_itself(self, kvm: None) -> None:
        process = self.start("--since-boot")
        totals = self.lines(process, 2)
        process.send_signal(signal.SIGSTOP)  # so that it sees all at one look
        actor("name:asker", *["syscall"] * 3, f"name:{HOSTILE}", "device:1")
        process.send_signal(signal.SIGCONT)
        folded, single = self.lines(process, 2)
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        assert process.stderr
        assert process.stderr.read().strip() == ""
        assert "nothing decided" in totals[0] + totals[1]
        head = next(line for line in totals if line.startswith("time"))
        for line, times in ((folded, "3"), (single, "")):
            assert line[head.index("times") : head.index("pid")].strip() == times
            assert line[head.index("user") :].startswith(inspect.user_of(USER))
            assert line[:-1].isprintable()
        assert folded[head.index("command") :].split()[:4] == ["asker", "refused", "no-kvm", "syscall"]
        assert single.split()[-1] == "UFFD_USER_MODE_ONLY"

    def test_prints_json_objects(self, kvm: None) -> None:
        process = self.start("--json", "--all", "--since-boot")
        (totals,) = self.lines(process, 1)
        assert json.loads(totals)["native"] == 0
        actor(f"name:{HOSTILE}", "syscall")
        refused = json.loads(*self.lines(process, 1))
        actor(KVM, "syscall")
        allowed = json.loads(*self.lines(process, 1))
        process.terminate()
        process.wait()
        assert (refused["verdict"], refused["command"]) == ("refused", ESCAPED[: len(refused["command"])])
        assert (allowed["verdict"], allowed["reason"], allowed["granted"]) == ("allowed", "kvm", True)

    def test_ends_when_its_reader_has_gone_though_nothing_happens(self, kvm: None) -> None:
        process = self.start()
        self.lines(process, 1)
        assert process.stdout
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr
        assert process.stderr.read() == ""

    def test_ends_with_the_policy(self, kvm: None) -> None:
        process = self.start()
        self.lines(process, 1)
        guard.stop()
        assert process.wait(20) == 1
        assert process.stderr
        assert process.stderr.read() == "uffdguard: the policy is not in force; run uffdguard start\n"

    def test_needs_a_policy_and_root(self) -> None:
        assert uffdguard("watch").err == "uffdguard: the policy is not in force; run uffdguard start\n"
        assert "root" in uffdguard("watch", user=USER).err
        assert "root" in uffdguard("log", user=USER).err
        assert uffdguard("log").err == "uffdguard: the policy is not in force; run uffdguard start\n"


class TestLog:
    @pytest.fixture(autouse=True)
    def systemd_journal(self) -> Iterator[None]:
        with journald():
            yield

    @contextlib.contextmanager
    def logging(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        """Run the command until all is written that has happened."""
        command = [sys.executable, "-m", "uffdguard", "log", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: held(journal.WRITTEN))
            try:
                yield process
                until(lambda: process.poll() is not None or written() == newest())
            finally:
                process.terminate()

    def entries(self, *matches: str) -> list[dict[str, str]]:
        subprocess.run(["journalctl", "--sync"], check=True)
        lines = subprocess.check_output(["journalctl", "--output=json", "--all", *matches], text=True).splitlines()
        return [json.loads(line) for line in lines]

    def test_writes_each_refusal_once_with_fields_that_make_the_event_again(self, kvm: None) -> None:
        told("syscall")  # before it runs
        with self.logging():
            actor(f"name:{HOSTILE}", "device:1", KVM, "syscall")
        actor("int80")
        with self.logging():
            pass
        found = [journal.to_event(entry) for entry in self.entries("UFFDGUARD_VERDICT=refused")]
        assert [strip(event) for event in found] == [strip(event) for event in Stream().read().events]
        assert [event.way for event in found] == ["syscall", "device", INT80]
        assert found[1].command == ESCAPED[: len(found[1].command)]
        assert self.entries("UFFDGUARD_REASON=no-kvm", f"UFFDGUARD_WAY={INT80}")[-1]["MESSAGE"] == found[2].line
        assert self.entries("UFFDGUARD_VERDICT=allowed") == []

    def test_writes_what_is_allowed_when_asked_to(self, kvm: None) -> None:
        with self.logging("--all"):
            actor("device")
            until(lambda: written() == newest())  # it looks, so what is allowed is told
            actor(KVM, "syscall")
        (event,) = [journal.to_event(entry) for entry in self.entries("UFFDGUARD_VERDICT=allowed")]
        assert (event.reason, event.granted) == ("kvm", True)

    def test_says_how_many_are_missing(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")

        def told() -> int:
            missing = self.entries(f"MESSAGE_ID={journal.MISSING_ID}")
            suppressed = sum(int(entry["UFFDGUARD_SUPPRESSED"]) for entry in missing)
            return suppressed + len(self.entries(f"MESSAGE_ID={journal.EVENT_ID}"))

        with self.logging():
            # What was suppressed before its first look is not told.
            actor("syscall")
            until(lambda: written() == newest())
            actor("flood:5000")
            until(lambda: told() == 5001)

    def test_is_read_by_report(self, kvm: None) -> None:
        with self.logging():
            actor("syscall", "device")
        figures = json.loads(uffdguard("report", "--json").out)
        assert (figures["asked"], figures["refused"]) == (2, 2)

    def test_leaves_the_journal_to_one_writer(self, kvm: None) -> None:
        with self.logging():
            assert uffdguard("log").err.startswith("uffdguard: the journal is being written already; ")

    def test_ends_with_the_policy_or_the_journal_on_one_line(self, kvm: None) -> None:
        with self.logging() as process:
            guard.stop()
            assert process.wait(20) == 1
            assert process.stderr
            assert process.stderr.read() == "uffdguard: the policy is not in force; run uffdguard start\n"


def test_refused_sysctls_and_silence_are_told_by_watch_log_and_report(
    in_force: Callable[..., None], silence: Callable[[bool], None]
) -> None:
    in_force("disabled")
    with journald(), background("log"), background("watch", "--json", "--since-boot") as told:
        until(lambda: held(journal.WRITTEN))
        assert "decisions" in told()
        actor("device")
        for path, text in ((features.FTRACE_ENABLED, b"0\n"), (native.FILE, b"1\n"), (native.FILE, b"x\n")):
            with path.open("wb", buffering=0) as file, pytest.raises(PermissionError):
                file.write(text)
        actor("device", user=OTHER)
        first, ftrace, knob, other, last = (told() for _ in range(5))
        assert (first["uid"], last["uid"], "sysctl" in first) == (USER, OTHER, False)
        assert [(one["sysctl"], one["value"]) for one in (ftrace, knob, other)] == [
            ("kernel.ftrace_enabled", 0), ("vm.unprivileged_userfaultfd", 1), ("vm.unprivileged_userfaultfd", None),
        ]  # fmt: skip
        assert (ftrace["pid"], ftrace["user"], ftrace["mode"]) == (os.getpid(), "root", "disabled")
        assert ftrace["executable"] == str(Path("/proc/self/exe").readlink())
        until(lambda: written() == newest())
        # Nobody but these two asks.
        silence(True)
        assert told()["answers"] is False
        time.sleep(2 * INTERVAL)  # log looks no less often
        silence(False)
        assert state.status().in_force
        assert told()["answers"] is True
        time.sleep(2 * INTERVAL)
        subprocess.run(["journalctl", "--sync"], check=True)
        found = json.loads(uffdguard("report", "--json").out)
        assert [found[name] for name in ("asked", "silences", "damaged")] == [2, 1, 0]
        assert [(one["setting"], one["refused"]) for one in found["sysctls"]] == [
            ("kernel.ftrace_enabled = 0", 1),
            ("vm.unprivileged_userfaultfd = 1", 1),
            ("vm.unprivileged_userfaultfd", 1),
        ]


def test_log_can_ask_the_policy_with_the_capabilities_of_its_service(
    in_force: Callable[..., None], silence: Callable[[bool], None]
) -> None:
    in_force("kvm")
    unit = (ROOT / "packaging/systemd/uffdguard-log.service").read_text()
    names = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert names
    kept = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in names[1].split())
    ask = ["setpriv", "--no-new-privs", f"--bounding-set=-all{kept}", sys.executable, "-c"]
    ask.append("from uffdguard import events; events.see()")
    assert subprocess.run(ask).returncode == 0
    silence(True)
    done = subprocess.run(ask, capture_output=True, text=True)
    assert "the policy does not answer" in done.stderr
    assert events.unanswered_since()
    assert native.read_knob() == 0


def test_a_file_system_that_does_not_answer_holds_up_nobody(kvm: None) -> None:
    """An ordinary user asks from a program on it; then another user asks."""
    with (
        journald(),
        background("log"),
        background("watch", "--json", "--since-boot") as told,
        silent.running(ACTOR, "wait", "syscall", KVM, "wait") as program,
    ):
        until(lambda: held(journal.WRITTEN))
        assert "decisions" in told()
        program.fall_silent()
        program.go_on()
        event = told()
        assert (event["pid"], event["uid"], event["executable"]) == (program.pid, USER, "/mnt/over/program")
        actor("device", user=OTHER)
        assert told()["uid"] == OTHER
        until(lambda: written() == newest())
        subprocess.run(["journalctl", "--sync"], check=True)
        assert json.loads(uffdguard("report", "--json").out)["asked"] == 2
        until(lambda: program.pid in {holder["pid"] for holder in json.loads(uffdguard("holders", "--json").out)})
        assert uffdguard("check", str(program.pid)).out.startswith("allowed (kvm)")
        assert uffdguard("status").status == 0
        assert not program.awaited
        # So it is for whoever looks at the file:
        looker = forked(lambda: Path(f"/proc/{program.pid}/exe").stat())
        until(lambda: program.awaited)
        os.kill(looker, signal.SIGKILL)
        until(lambda: Path(f"/proc/{looker}/stat").read_text().rpartition(")")[2].split()[0] == "D")
    os.waitpid(looker, 0)


def test_log_says_that_there_is_no_journal(kvm: None) -> None:
    assert uffdguard("log").err.startswith("uffdguard: the journal does not take entries: ")


@contextlib.contextmanager
def background(*arguments: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run one of our commands; give what waits for the next JSON object that it prints."""
    with subprocess.Popen([*UFFDGUARD, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = iter(process.stdout)
        try:
            yield lambda: json.loads(next(lines))
        finally:
            process.kill()


def written() -> int:
    """Return the number of the newest event that is in the journal."""
    numbers = journal.WRITTEN.read_bytes().split()
    return int(numbers[1]) if numbers else 0


def held(path: Path) -> bool:
    """Tell whether somebody has a lock on PATH, without one of our own: who begins would find it and give up."""
    locks = Path("/proc/locks").read_text().splitlines()
    return path.exists() and any(line.split()[-3].endswith(f":{path.stat().st_ino}") for line in locks)
