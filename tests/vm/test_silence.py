"""The policy does not vanish, and is not undone, without a word: what would do so is refused, seen, and said."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from inside import Killer, actor, force_knob, forked, uffdguard, watched

from uffdguard import config, guard, inspect, metrics, state
from uffdguard.errors import Failure
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KVM = "open:/dev/kvm"
FTRACE = features.FTRACE_ENABLED
FILE = native.FILE

#: What sysctls say of a process in another mount namespace, through a procfs of its own.
ELSEWHERE = "mkdir -p /run/elsewhere && mount -t proc proc /run/elsewhere && echo {value} > /run/elsewhere/sys/{path}"


def written(path: Path, value: str) -> int:
    """Write a sysctl; return 0 or the errno."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(fd)
    return 0


def written_elsewhere(path: str, value: str) -> bool:
    """Write a sysctl as a privileged container would; return whether that worked."""
    script = ELSEWHERE.format(value=value, path=path)
    return subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True).returncode == 0


@contextlib.contextmanager
def part(name: str) -> Iterator[int]:
    """Give a descriptor of a part that is pinned."""
    fd = libbpf.get(state.PINS / name)
    try:
        yield fd
    finally:
        os.close(fd)


def events() -> list[layout.Event]:
    """Return the events that there are."""
    with part("watching") as watching, part("events") as found:
        told = libbpf.read(watching, layout.Watching).told
        return [libbpf.read_locked(found, number, layout.Slot).event for number in range(1, told + 1)]


@pytest.fixture
def ftrace_off() -> Iterator[None]:
    """Have kernel.ftrace_enabled at 0, where the kernel lets it be."""
    if error := written(FTRACE, "0\n"):
        pytest.skip(f"this kernel itself refuses kernel.ftrace_enabled = 0: {os.strerror(error)}")
    yield
    FTRACE.write_text("1\n")


class TestTheGuardOfSysctls:
    @pytest.mark.parametrize("mode", Mode)
    def test_refuses_to_switch_tracing_off(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode)
        assert written(FTRACE, "0\n") == errno.EPERM
        assert not written_elsewhere("kernel/ftrace_enabled", "0")
        assert written(FTRACE, "1\n") == 0
        assert FTRACE.read_text() == "1\n"
        assert actor("device") == ["allowed" if mode is Mode.ENABLED else "EPERM"]
        told = [event for event in events() if event.sysctl]
        assert [(layout.SYSCTLS[event.sysctl - 1], event.flags) for event in told] == [("kernel.ftrace_enabled", 0)] * 2
        assert (told[0].pid, told[0].uid, told[0].enforced) == (os.getpid(), 0, 1)
        assert told[1].command == b"sh"
        with part("counts") as fd:
            assert libbpf.read(fd, layout.Counts).total().sysctl == 2
        assert guard.stop()
        assert written(FTRACE, "0\n") != errno.EPERM
        FTRACE.write_text("1\n")

    @pytest.mark.parametrize(("mode", "due"), [("disabled", 0), ("enabled", 1), ("kvm", 1)])
    def test_refuses_any_value_of_the_native_knob_but_the_one_that_is_due(
        self, in_force: Callable[..., None], mode: str, due: int
    ) -> None:
        in_force(mode)
        for text in (f"{1 - due}", f"{1 - due}\n", "2", "01", "+1", "0x1", f"{due} {1 - due}", "-1", "?", "1 " * 500):
            assert written(FILE, text) == errno.EPERM, text
        assert not written_elsewhere("vm/unprivileged_userfaultfd", f"{1 - due}")
        # What libvirt and others have in sysctl.d says what is so already.
        assert written(FILE, f"{due}\n") == written(FILE, f"{due}") == 0
        assert native.read_knob() == due
        assert state.status().problems == []
        assert {event.flags for event in events() if event.sysctl == 2} == {1 - due, 2, 0xFFFFFFFF}

    def test_lets_the_native_knob_be_written_in_audit(self, in_force: Callable[..., None]) -> None:
        in_force("kvm", audit=True)
        assert written(FILE, "1\n") == written(FILE, "0\n") == 0
        assert written(FTRACE, "0\n") == errno.EPERM

    def test_is_named_and_put_back_where_somebody_has_detached_it(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        with part("guard_sysctl") as fd:
            libbpf.library().bpf_link_detach(fd)
        assert written(FILE, "0\n") == 0
        assert any("guard of sysctls" in problem for problem in state.status().problems)
        assert guard.start(Policy(), None).changed
        assert written(FILE, "0\n") == errno.EPERM
        assert state.status().problems == []
        assert native.read_knob() == 1

    def test_is_named_as_missing_on_a_kernel_that_cannot_have_it(
        self, in_force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(features, "has_sysctl_guard", lambda: False)
        in_force("kvm")
        assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
        outcome = uffdguard("status")
        assert "guard of sysctls  impossible: this kernel has no cgroup v2 for BPF" in outcome.out
        assert json.loads(uffdguard("status", "--json").out)["guard"] == "unsupported"
        # A server of the interface file holds all that there can be: start waits for no more.
        with monkeypatch.context() as patch:
            patch.setattr(guard, "server", os.getpid)
            began = time.monotonic()
            assert guard.start(Policy(), None).changed is False
            assert time.monotonic() - began < 4


def test_a_start_names_tracing_that_is_off(ftrace_off: None) -> None:
    outcome = uffdguard("start", "--mode", "kvm")
    assert (outcome.status, outcome.out) == (1, "")
    assert "kernel.ftrace_enabled is 0" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not state.PINS.exists()
    assert native.read_knob() == 0


class TestAPolicyThatDoesNotAnswer:
    @pytest.mark.parametrize("mode", ["kvm", "disabled"])
    def test_is_not_in_force_and_the_native_knob_is_closed(
        self, in_force: Callable[..., None], silence: Callable[[bool], None], mode: str
    ) -> None:
        in_force(mode)
        silence(True)
        outcome = uffdguard("status", "--json")
        found = json.loads(outcome.out)
        assert (outcome.status, found["in_force"], found["native_knob"]) == (1, False, 0)
        assert found["failing"][0] == "policy-answers"
        assert "the policy does not answer" in found["reason"]
        assert "uffdguard_in_force 0.0" in uffdguard("metrics").out
        assert actor("syscall") == ["EPERM"]
        silence(False)
        assert uffdguard("start").status == 0
        assert state.status().problems == []
        assert native.read_knob() == Mode(mode).native_value

    @pytest.mark.parametrize("command", [("start",), ("start", "--mode", "enabled"), ("mode", "enabled")], ids=" ".join)
    def test_is_seen_by_a_command_that_changes_something_and_the_native_knob_is_closed(
        self, in_force: Callable[..., None], silence: Callable[[bool], None], command: tuple[str, ...]
    ) -> None:
        in_force("kvm")
        silence(True)
        outcome = uffdguard(*command)
        assert (outcome.status, outcome.out) == (1, "")
        assert "the policy does not answer" in outcome.err
        assert native.read_knob() == 0
        assert state.current_policy().mode is Mode.KVM

    @pytest.mark.parametrize(("mode", "audit"), [("enabled", False), ("kvm", True)])
    def test_leaves_the_native_knob_where_the_setting_lets_everybody_pass(
        self, in_force: Callable[..., None], silence: Callable[[bool], None], mode: str, audit: bool
    ) -> None:
        FILE.write_text("1\n")
        in_force(mode, audit=audit)
        silence(True)
        status = state.status()
        assert (status.in_force, status.native_knob) == (False, 1)
        assert actor("syscall") == ["allowed"]

    def test_is_not_concluded_from_a_question_that_could_not_be_asked(
        self, in_force: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_force("kvm")

        def fail() -> int:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", fail)
            status = state.status()
            told = metrics.text()
            with pytest.raises(Failure, match="cannot tell whether the policy is in force"), inspect.looking():
                pass
        assert (status.in_force, status.answers, status.failing) == (False, None, ["policy-answers"])
        assert "could not be asked" in (status.reason or "")
        assert "\nuffdguard_in_force" not in told
        assert 'uffdguard_condition{condition="policy-answers"} 0.0' in told
        assert "\nuffdguard_decisions_total{" in told
        assert status.native_knob == 1
        assert state.status().in_force


class TestAuditAndEnforcement:
    def test_stay_as_they_are_set_until_it_is_said_otherwise(self) -> None:
        assert uffdguard("start", "--mode", "kvm", "--audit").status == 0
        outcome = uffdguard("start")
        assert (outcome.status, outcome.out) == (0, "already in force; nothing to do\n")
        assert "audit" in outcome.err
        assert state.status().audit
        outcome = uffdguard("start", "--enforce")
        assert (outcome.status, outcome.out) == (0, "audit has ended: refusals are carried out\n")
        assert uffdguard("start").out == "already in force; nothing to do\n"
        assert not state.status().audit

    def test_follow_a_configuration_that_changes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
        config.ADMINISTRATOR.write_text("enforce = false\n")
        assert uffdguard("start").status == 0
        assert state.status().audit
        assert uffdguard("start", "--enforce").status == 0
        assert uffdguard("start").status == 0
        assert not state.status().audit
        config.ADMINISTRATOR.write_text("enforce = true\n")
        assert uffdguard("start").status == 0
        config.ADMINISTRATOR.write_text("enforce = false\n")
        assert uffdguard("start").status == 0
        assert state.status().audit


def test_an_upgrade_leaves_the_programs_that_grant_attached(
    in_force: Callable[..., None], variant: Callable[..., None]
) -> None:
    def programs() -> dict[str, int]:
        with state.pinned() as found:
            return {name: program.id for name, program in found.programs.items()}

    in_force("kvm")
    before = programs()
    variant("__u64 least = 1;\n\t__u32 now;", "__u64 least = 2;\n\t__u32 now;")
    assert guard.start(Policy(), None).changed
    after = programs()
    same = {name for name in before if before[name] == after[name]}
    assert same == {"grant"}
    assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]


def test_an_upgrade_that_was_killed_half_way_does_not_keep_the_next_start_from_any_mode(
    in_force: Callable[..., None],
) -> None:
    for mode in ("disabled", "enabled"):
        in_force("kvm")
        state.LOADED.write_text("another object")

        def doomed() -> None:
            with watched(Killer("pin decide")):
                guard.start(Policy(), None)

        assert os.waitstatus_to_exitcode(os.waitpid(forked(doomed), 0)[1]) == -signal.SIGKILL
        in_force(mode)
        assert native.read_knob() == Mode(mode).native_value
        assert state.status().problems == []


def test_the_mode_can_be_switched_without_the_guard_of_sysctls(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    with part("guard_sysctl") as fd:
        libbpf.library().bpf_link_detach(fd)
    assert uffdguard("mode", "disabled").status == 0
    assert native.read_knob() == 0
    assert state.status().failing == ["guard-attached"]


def test_a_start_that_was_killed_at_its_end_leaves_audit_and_enforcement_as_they_were_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    for audit, option in ((False, "--audit"), (True, "--enforce")):
        config.ADMINISTRATOR.write_text(f"enforce = {'false' if audit else 'true'}\n")
        assert uffdguard("start", option).status == 0
        # As after a kill before the last steps.
        state.CONFIGURED.unlink()
        state.LOADED.unlink()
        assert uffdguard("start").status == 0
        assert state.status().audit is not audit
        assert guard.stop()


def test_grants_that_were_lost_are_named_until_a_start_has_seen_them(
    in_force: Callable[..., None],
) -> None:
    in_force("kvm")
    with part("counts") as fd:
        counts = libbpf.read(fd, layout.Counts)
        counts.of[0].lost = 3
        libbpf.write(fd, counts)
    assert state.status().problems == ["an opener of /dev/kvm was not recorded, and is refused, 3 times"]
    assert guard.start(Policy(), None).changed
    assert state.status().problems == []


def test_a_native_knob_that_was_forced_is_put_right(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    force_knob(0)
    assert guard.start(Policy(), None).changed
    assert native.read_knob() == 1
