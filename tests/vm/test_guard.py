"""Never laxer than asked: start, stop and mode, killed, repeated, at once, and sabotaged."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import USER, Killer, actor, force_knob, forked, killed_at, uffdguard, waiting_actor, watched

from uffdguard import guard, lock, proof, state
from uffdguard.errors import Failure
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM = "open:/dev/kvm"
WAYS = ("syscall", "syscall:1", "device")
#: What an unprivileged process may do without any policy, by the native knob's value.
NATIVE = {0: {"syscall:1", "device"}, 1: {"syscall", "syscall:1", "device"}}
NOTHING: set[str] = set()


def open_ways(*steps: str) -> set[str]:
    """Return the ways by which an unprivileged process gets a userfaultfd now."""
    answers = actor(*steps, *WAYS)[-len(WAYS) :]
    return {way for way, answer in zip(WAYS, answers, strict=True) if answer == "allowed"}


def knob() -> int:
    return int(Path("/proc", native.KNOB).read_text())


def start(mode: str) -> Callable[[], object]:
    return lambda: guard.start(Policy(), Mode(mode))


def switch(mode: str) -> Callable[[], object]:
    return lambda: guard.set_mode(Mode(mode))


FIRST_START = guard.STEPS[: guard.STEPS.index("record the object") + 1]
CHANGE = ("ask strictly", "set the policy", "ask", "set the native knob", "ask by system call", "count native refusals")
#: Programs that grant, and that are the same, stay attached.
AT_FIRST = ("mount bpffs", "record the native knob", "seed", "attach grant")
UPGRADE = tuple(s for s in FIRST_START if s not in AT_FIRST)
STOP = guard.STEPS[guard.STEPS.index("close the native knob") :]


def test_the_steps_are_those_that_are_taken() -> None:
    """So that the tests below, which kill at each, leave none out."""
    native.unmount(native.BPFFS)
    with watched(Killer()) as seen:
        start("kvm")()
        assert tuple(seen) == FIRST_START
        seen.clear()
        state.LOADED.write_text("another object")
        start("disabled")()
        # The native knob is closed before the policy is set, and opened after it.
        closing = [s for s in UPGRADE if s not in ("ask by system call", "set the native knob")]
        closing.insert(closing.index("set the policy"), "set the native knob")
        assert seen == closing
        seen.clear()
        guard.stop()
        assert tuple(seen) == STOP
    assert FIRST_START + STOP == guard.STEPS


def test_a_first_start_looks_through_more_than_a_million_descriptors(in_force: Callable[..., None]) -> None:
    """After a million about which an iterator writes nothing, read(2) gives EAGAIN."""
    number, times = 50_000, 21
    read, write = os.pipe()

    def stay() -> None:
        os.write(write, b"x")
        signal.pause()

    def crowd() -> None:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (number + 100, number + 100))
        for _ in range(number):
            os.dup(0)
        for _ in range(times):
            forked(stay)
        os.write(write, b"x")
        signal.pause()

    pid = forked(crowd)
    os.close(write)
    try:
        assert all(os.read(read, 1) == b"x" for _ in range(times + 1))
        in_force("kvm")
    finally:
        os.close(read)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("step", FIRST_START)
def test_a_killed_first_start_is_not_laxer_than_before_and_can_be_repeated(step: str) -> None:
    if step == "mount bpffs":
        native.unmount(native.BPFFS)
    with waiting_actor(KVM, "wait", *WAYS) as go_on:
        assert killed_at(step, start("kvm"))
        assert open_ways() <= NATIVE[0]
        assert state.status().problems or not state.status().in_force
        killed_at(step, start("kvm"))  # twice in a row
        assert open_ways() <= NATIVE[0]
        start("kvm")()
        assert state.status().in_force
        assert not state.status().problems
        assert open_ways() == NOTHING
        assert go_on()[-len(WAYS) :] == ["allowed"] * len(WAYS)
    guard.stop()
    assert knob() == 0
    assert open_ways() == NATIVE[0]


@pytest.mark.parametrize("step", [*FIRST_START[1:], None], ids=str)
def test_the_native_value_found_first_is_what_stop_gives_back(step: str | None) -> None:
    Path("/proc", native.KNOB).write_text("1\n")
    if step:
        assert killed_at(step, start("kvm"))
        killed_at(step, start("disabled"))
    else:
        start("disabled")()
        assert knob() == 0
    guard.stop()
    assert knob() == 1


@pytest.mark.parametrize("step", UPGRADE)
def test_a_killed_upgrade_refuses_and_keeps_the_grants(step: str) -> None:
    start("kvm")()
    with waiting_actor(KVM, "wait", "syscall", "wait", "syscall") as go_on:
        state.LOADED.write_text("another object")
        assert killed_at(step, lambda: guard.start(Policy(), None))
        assert open_ways() == NOTHING
        assert open_ways(KVM) == set(WAYS)
        guard.start(Policy(), None)
        status = state.status()
        assert (status.in_force, status.mode, status.problems) == (True, Mode.KVM, [])
        assert open_ways() == NOTHING
        assert go_on() == ["allowed"] * 3


@pytest.mark.parametrize("step", CHANGE)
@pytest.mark.parametrize(("old", "new"), [("disabled", "kvm"), ("kvm", "enabled"), ("enabled", "kvm")])
def test_a_killed_change_is_as_lax_as_the_laxer_and_start_mends_it(old: str, new: str, step: str) -> None:
    start(old)()
    lax = {"disabled": NOTHING, "kvm": NOTHING, "enabled": set(WAYS)}
    assert killed_at(step, switch(new))
    assert open_ways() <= lax[old] | lax[new]
    guard.start(Policy(), None)
    status = state.status()
    assert status.mode in (old, new)
    assert not status.problems
    assert open_ways() == lax[str(status.mode)]


@pytest.mark.parametrize("step", ["ask strictly", "set the native knob", "set the policy", "ask"])
def test_a_killed_change_to_disabled_is_mended(step: str) -> None:
    start("kvm")()
    assert killed_at(step, switch("disabled"))
    assert open_ways() == NOTHING
    assert state.status().drift is (step == "set the policy")
    guard.start(Policy(), None)
    assert not state.status().problems
    assert open_ways() == NOTHING


@pytest.mark.parametrize("step", CHANGE)
@pytest.mark.parametrize("found", [0, 1])
def test_a_killed_change_to_audit_or_back_is_as_lax_as_the_laxer(step: str, found: int) -> None:
    """In audit everybody gets what the native knob, as it was found, lets pass."""
    Path("/proc", native.KNOB).write_text(f"{found}\n")
    lax = {False: NOTHING, True: NATIVE[found]}
    start("kvm")()
    for audit in (True, False):
        killed_at(step, lambda audit=audit: guard.start(Policy(audit=audit), None))  # type: ignore[misc]
        assert open_ways() <= lax[True]
        guard.start(Policy(audit=audit), None)
        assert not state.status().problems
        assert open_ways() == lax[audit]
        assert knob() == (found if audit else 1)


def test_a_change_to_audit_that_fails_is_undone_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    start("kvm")()
    seen: list[set[str]] = []

    def fails(*arguments: object) -> None:
        seen.append(open_ways())
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(guard, "_count_native", fails)
    with pytest.raises(Failure, match="injected"):
        guard.start(Policy(audit=True), None)
    assert seen == [NATIVE[0]]
    assert (state.status().audit, knob(), open_ways()) == (False, 1, NOTHING)


def test_a_record_that_is_older_than_a_change_of_the_knob_does_not_open_it() -> None:
    Path("/proc", native.KNOB).write_text("1\n")
    assert killed_at("load", start("kvm"))
    Path("/proc", native.KNOB).write_text("0\n")
    guard.start(Policy(audit=True), None)
    assert knob() == 0
    guard.stop()
    assert knob() == 0


def test_two_pins_that_are_missing_are_mended_as_one_is() -> None:
    start("kvm")()
    for part in ("decide", "events"):
        (state.PINS / part).unlink()
    guard.start(Policy(), None)
    assert not state.status().problems
    assert open_ways() == NOTHING


@pytest.mark.parametrize("step", STOP)
def test_a_killed_stop_is_not_laxer_than_without_a_policy_and_can_be_repeated(step: str) -> None:
    start("kvm")()
    assert killed_at(step, guard.stop)
    assert open_ways() <= NATIVE[0]
    assert state.status().problems or not state.status().in_force or step == STOP[0]
    killed_at(step, guard.stop)
    assert open_ways() <= NATIVE[0]
    guard.stop()
    assert not state.status().in_force
    assert knob() == 0


@pytest.mark.parametrize("step", STOP)
def test_a_killed_stop_can_be_followed_by_a_start(step: str) -> None:
    start("kvm")()
    assert killed_at(step, guard.stop)
    start("kvm")()
    assert not state.status().problems
    assert open_ways() == NOTHING
    assert open_ways(KVM) == set(WAYS)


@pytest.mark.parametrize("mode", ["kvm", "enabled"])
@pytest.mark.parametrize("part", state.PARTS)
def test_a_missing_pin_is_named_and_mended_and_the_mode_stays(part: str, mode: str) -> None:
    start(mode)()
    (state.PINS / part).unlink()
    assert f"{part} is not pinned (No such file or directory)" in state.status().problems
    assert open_ways() <= NATIVE[1]
    if part != "decide" and mode == "kvm":
        assert open_ways() == NOTHING
    guard.start(Policy(Mode.DISABLED), None)
    assert not state.status().problems
    assert state.status().mode == mode
    assert open_ways() == (NOTHING if mode == "kvm" else set(WAYS))


@pytest.mark.parametrize("step", ["pin grants", "pin witness", "pin decide", "record the object"])
def test_a_killed_upgrade_can_be_followed_by_a_start_with_a_laxer_mode(step: str) -> None:
    start("kvm")()
    state.LOADED.write_text("another object")
    assert killed_at(step, lambda: guard.start(Policy(), None))
    start("enabled")()
    assert not state.status().problems
    assert open_ways() == set(WAYS)


def test_the_policy_decides_with_no_process_of_ours_alive() -> None:
    assert killed_at("nothing", start("kvm")) is False  # a process that has ended
    assert open_ways() == NOTHING
    assert open_ways(KVM) == set(WAYS)


def test_start_again_does_nothing_and_keeps_the_mode() -> None:
    start("kvm")()
    assert guard.start(Policy(Mode.ENABLED), None).changed is False
    assert state.current_policy().mode is Mode.KVM
    assert guard.start(Policy(), Mode.ENABLED).changed is True
    assert state.current_policy().mode is Mode.ENABLED


def test_start_mends_a_native_knob_that_somebody_changed() -> None:
    start("disabled")()
    force_knob(1)
    assert state.status().drift
    assert open_ways() == NOTHING
    assert guard.start(Policy(), None).changed is True
    assert knob() == 0
    assert not state.status().drift


def test_the_programs_are_gone_when_stop_or_an_upgrade_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def programs() -> list[int]:
        with state.pinned() as found:
            return [program.id for program in found.programs.values()]

    def loaded(number: int) -> bool:
        fd: int = libbpf.library().bpf_prog_get_fd_by_id(number)
        if fd >= 0:
            os.close(fd)
        return fd >= 0

    again = tmp_path / "again.bpf.o"
    again.write_bytes(features.OBJECT.read_bytes() + b"\0")
    first_build = features.OBJECT
    for _ in range(5):
        monkeypatch.setattr(features, "OBJECT", first_build)
        start("kvm")()
        first = programs()
        assert len(first) == len(state.USES)
        assert all(map(loaded, first))
        monkeypatch.setattr(features, "OBJECT", again)
        start("kvm")()
        second = programs()
        replaced = set(first) - set(second)
        assert len(replaced) == len(state.USES) - 1  # but for the one that grants, which is the same
        assert not any(map(loaded, replaced))
        guard.stop()
        assert not any(map(loaded, second))


def test_a_stopped_policy_leaves_the_native_knob_closed_when_the_record_is_lost() -> None:
    start("kvm")()
    state.FOUND.unlink()
    assert "stop will leave the native knob at 0" in state.status().problems[0]
    guard.stop()
    assert knob() == 0


def test_many_at_once_are_serialised() -> None:
    jobs = [start("kvm"), start("disabled"), guard.stop, start("enabled"), start("kvm"), guard.stop, start("kvm")]
    pids = []
    for job in jobs:
        pids.append(os.fork())
        if pids[-1] == 0:
            with contextlib.suppress(BaseException):
                job()
                os._exit(0)
            os._exit(1)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(jobs)
    start("kvm")()
    assert not state.status().problems
    assert open_ways() == NOTHING


def test_the_lock_has_one_holder_at_a_time() -> None:
    """Also while each holder removes the directory that the lock is on."""
    inside = Path("/run/inside")

    def enter() -> None:
        for _ in range(100):
            with lock.locked():
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                time.sleep(0.001)
                inside.unlink()

    pids = [forked(enter) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def test_a_trial_child_that_is_stopped_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    start("kvm")()
    monkeypatch.setattr(proof.Asker, "PATIENCE", 2.0)
    monkeypatch.setattr(proof.Asker, "_serve", lambda *arguments: os.kill(os.getpid(), signal.SIGSTOP))
    with pytest.raises(Failure, match="does not answer"):
        guard.set_mode(Mode.ENABLED)
    assert state.status().mode is Mode.KVM
    assert open_ways() == NOTHING


def test_a_trial_that_was_killed_is_over_with_the_next_question() -> None:
    """Else whoever gets the pid of its child would be taken for it."""

    def tried() -> int:
        with state.pinned() as found:
            return int(libbpf.read(found.fds["witness"], layout.Witness).tgid)

    start("enabled")()

    def killed_while_asking() -> None:
        proof.Asker._answer = lambda asker, question: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value, method-assign]
        guard.set_mode(Mode.KVM)

    assert os.WTERMSIG(os.waitpid(forked(killed_while_asking), 0)[1]) == signal.SIGKILL
    assert tried()
    assert state.status().problems == []
    assert not tried()


class TestPinsOfAnother:
    """A bpffs with the sticky bit lets everybody make a directory of the name of ours."""

    @pytest.fixture(autouse=True)
    def cleaned(self) -> Iterator[None]:
        yield
        subprocess.run(["rm", "-rf", state.PINS], check=True)

    def test_a_directory_is_not_used(self) -> None:
        state.PINS.mkdir()
        os.chown(state.PINS, USER, USER)
        with pytest.raises(Failure, match="not a directory that only root may enter; remove it"):
            start("kvm")()
        assert knob() == 0
        assert state.status().problems == [f"{state.PINS} is not a directory that only root may enter"]

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "precious").touch()
        state.PINS.symlink_to(tmp_path)
        with pytest.raises(Failure, match="not a directory"):
            start("kvm")()
        guard.stop()
        assert (tmp_path / "precious").exists()


def test_start_refuses_in_a_mount_namespace_that_will_end() -> None:
    def start_there() -> None:
        ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS
        with pytest.raises(Failure, match="not in the mount namespace of process 1"):
            start("kvm")()

    assert os.waitpid(forked(start_there), 0)[1] == 0
    assert not native.RUN.exists()


def test_a_full_disk_leaves_nothing_behind() -> None:
    def start_there() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with pytest.raises(Failure, match="cannot write /run/uffdguard/native: File too large"):
            start("kvm")()

    assert os.waitpid(forked(start_there), 0)[1] == 0
    assert not native.RUN.exists()
    assert not state.PINS.exists()
    assert knob() == 0


@pytest.mark.parametrize("program", ["grant", "decide"])
def test_a_hook_that_cannot_be_attached_leaves_nothing_behind(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = libbpf.Object.attach

    def fail(obj: libbpf.Object, name: str) -> int:
        if name == program:
            raise OSError(errno.EBUSY, "bpf_program__attach: Device or resource busy")
        return attach(obj, name)

    monkeypatch.setattr(libbpf.Object, "attach", fail)
    with pytest.raises(Failure, match=r"cannot attach the policy: .*busy"):
        start("kvm")()
    assert not native.RUN.exists()
    assert not state.PINS.exists()
    assert open_ways() == NATIVE[0]


def test_a_grant_that_cannot_be_recorded_is_counted_and_refused(variant: Callable[..., None]) -> None:
    variant("\t\tif (!grant)\n", "\t\tif (!grant || enforcement.room[0])\n")
    start("kvm")()
    with waiting_actor(KVM, "wait", *WAYS) as first:
        with state.pinned() as found:
            kept = libbpf.read(found.fds["enforcement"], layout.Enforcement)
            kept.room[0] = 1
            libbpf.write(found.fds["enforcement"], kept)
        assert open_ways(KVM) == NOTHING
        status = state.status()
        assert (status.lost, status.grants) == (1, 1)
        assert first()[1:] == ["allowed"] * len(WAYS)


def test_an_upgrade_to_an_object_with_more_reasons_counts_anew(
    variant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start("kvm")()
    assert open_ways() == NOTHING
    with waiting_actor(KVM, "wait", *WAYS) as go_on:
        variant("\tNR_REASONS,", "\tREASON_NEW,\n\tNR_REASONS,")
        # The other version knows its own layout.
        monkeypatch.setattr(layout, "check", lambda obj: None)
        monkeypatch.setattr(guard, "_acknowledge", lambda fds: None)
        guard.start(Policy(), None)
        assert open_ways() == NOTHING
        assert "the counts are those of another version of uffdguard" in state.status().problems
        assert go_on()[1:] == ["allowed"] * len(WAYS)


def test_nothing_is_written_to_a_map_of_another_layout() -> None:
    start("kvm")()
    with state.pinned() as found, pytest.raises(OSError, match="another layout"):
        libbpf.store(found.fds["counts"], layout.Watching, "total", 1)


def test_a_hundred_changes_at_once_by_ten_while_ten_ask() -> None:
    """Between disabled and kvm: who has not opened /dev/kvm must never be allowed."""
    start("disabled")()
    done = threading.Event()

    def ask(*steps: str) -> set[str]:
        questions = ("syscall", "int80", "device", "syscall:1") * 10
        answers: set[str] = set()
        while not done.wait(0.3):  # so that the changes come to their turn on an emulated processor
            answers.update(actor(*steps, *questions)[-len(questions) :])
        return answers

    def change() -> None:
        for mode in ("kvm", "disabled") * 5:
            guard.set_mode(Mode(mode))

    with ThreadPoolExecutor(10) as pool:
        # Before the threads are there, since a fork copies what they hold locked.
        pids = [forked(change) for _ in range(10)]
        strangers = [pool.submit(ask) for _ in range(5)]
        openers = [pool.submit(ask, KVM) for _ in range(5)]
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
        done.set()
    assert ended == [0] * 10
    assert [asker.result() for asker in strangers] == [{"EPERM"}] * 5
    assert set().union(*(asker.result() for asker in openers)) == {"allowed", "EPERM"}
    assert not state.status().problems


class TestWithoutTheDevice:
    """No /dev/userfaultfd, as on a kernel before 6.1: the policy is asked with UFFD_USER_MODE_ONLY."""

    @pytest.fixture(autouse=True)
    def hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "DEV_USERFAULTFD", Path("/dev/no-such-device"))

    def test_each_mode_is_put_in_force_and_in_the_place_of_another(self) -> None:
        for mode in (Mode.KVM, Mode.DISABLED, Mode.ENABLED, Mode.KVM):
            start(mode)()
            assert (state.status().in_force, state.status().mode, state.status().problems) == (True, mode, [])
            assert guard.set_mode(mode).mode is mode
        assert uffdguard("start").status == uffdguard("status").status == 0
        assert open_ways() == NOTHING
        with state.pinned() as found:
            # What was asked is no use of userfaultfd; the strangers' are.
            counted = libbpf.read(found.fds["counts"], layout.Counts).total()
            assert set(counted.by_reason().values()) - {0} == {len(WAYS)}

    def test_a_policy_that_allows_everything_is_seen(self, variant: Callable[..., None]) -> None:
        variant("return now & STRICT ? -EACCES : -EPERM;", "return 0;")
        with pytest.raises(Failure, match="answers wrongly"):
            start("kvm")()
        assert not state.PINS.exists()

    def test_the_option_user_mode_only_does_not_answer_the_strict_question(self) -> None:
        for mode in (Mode.KVM, Mode.DISABLED, Mode.ENABLED):
            guard.start(Policy(user_mode_only=True), mode)
            assert (state.status().in_force, state.status().problems) == (True, [])
            assert "syscall:1" in open_ways()

    def test_a_policy_that_does_not_answer_any_more_is_seen(self, silence: Callable[[bool], None]) -> None:
        start("disabled")()
        silence(True)
        assert (state.status().in_force, state.status().failing) == (False, ["policy-answers"])
        with pytest.raises(Failure, match="does not answer"):
            guard.set_mode(Mode.ENABLED)
        silence(False)
        assert state.status().in_force

    def test_a_policy_that_is_not_attached_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attach = libbpf.Object.attach

        def not_decide(obj: libbpf.Object, program: str) -> int:
            return os.open("/dev/null", os.O_RDONLY) if program == "decide" else attach(obj, program)

        monkeypatch.setattr(libbpf.Object, "attach", not_decide)
        with pytest.raises(Failure, match="does not answer"):
            start("kvm")()


class TestSabotage:
    """Start goes on only when it has seen the policy answer."""

    @pytest.fixture(params=[0, 1])
    def native_value(self, request: pytest.FixtureRequest) -> int:
        value: int = request.param
        Path("/proc", native.KNOB).write_text(f"{value}\n")
        return value

    def fails(self, native_value: int) -> str:
        """Try to start; see that it fails, that nothing is left, and return what it said."""
        outcome = uffdguard("start", "--mode", "kvm")
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.err.count("\n") == 1
        assert knob() == native_value
        assert not state.PINS.exists()
        assert not native.RUN.exists()
        assert open_ways() == NATIVE[native_value]
        return outcome.err

    def test_a_policy_that_allows_everything(self, variant: Callable[..., None], native_value: int) -> None:
        variant("return now & STRICT ? -EACCES : -EPERM;", "return 0;")
        assert "answers wrongly" in self.fails(native_value)

    def test_a_policy_that_counts_a_refusal_but_decides_otherwise(
        self, variant: Callable[..., None], native_value: int
    ) -> None:
        variant("return is_current_granted(task) ? REASON_KVM : REASON_NO_KVM;", "return REASON_KVM;")
        assert "answers wrongly" in self.fails(native_value)

    def test_a_null_check_that_the_verifier_takes_for_always_true(
        self, variant: Callable[..., None], native_value: int
    ) -> None:
        variant("barrier_var(least);", "")
        if platform.release().startswith("6.1."):  # its verifier keeps the check
            assert uffdguard("start", "--mode", "kvm").status == 0
            assert open_ways() == NOTHING
        else:
            assert "does not answer" in self.fails(native_value)

    def test_a_policy_that_is_never_attached(self, monkeypatch: pytest.MonkeyPatch, native_value: int) -> None:
        attach = libbpf.Object.attach

        def not_decide(obj: libbpf.Object, program: str) -> int:
            return os.open("/dev/null", os.O_RDONLY) if program == "decide" else attach(obj, program)

        monkeypatch.setattr(libbpf.Object, "attach", not_decide)
        assert "does not answer" in self.fails(native_value)

    def test_an_upgrade_to_such_a_policy_leaves_the_older_one_in_force(self, variant: Callable[..., None]) -> None:
        start("kvm")()
        with waiting_actor(KVM, "wait", *WAYS) as go_on:
            variant("return now & STRICT ? -EACCES : -EPERM;", "return 0;")
            with pytest.raises(Failure, match="answers wrongly"):
                start("enabled")()
            assert state.status().mode is Mode.KVM
            assert not state.status().problems
            assert open_ways() == NOTHING
            assert go_on()[-len(WAYS) :] == ["allowed"] * len(WAYS)
