"""doctor, and what a start refuses, on a live kernel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from inside import USER, actor, preemptible, uffdguard

from uffdguard import config, state
from uffdguard.conditions import CONDITIONS
from uffdguard.kernel import features, libbpf, native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ANSWERS = ["EPERM", "EPERM", "allowed", "allowed", "allowed"]


def doctor(user: int = 0) -> tuple[int, bool | None, dict[str, dict[str, Any]]]:
    """Return the exit status of --json, its answer, and its rows by their names."""
    outcome = uffdguard("doctor", "--json", user=user)
    assert outcome.err == ""
    found = json.loads(outcome.out)
    return outcome.status, found["can_enforce"], {row["name"]: row for row in found["rows"]}


def refused(*words: str) -> None:
    """See start refuse on one line, with these WORDS, and leave nothing behind."""
    outcome = uffdguard("start", "--mode", "kvm")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    for word in words:
        assert word in outcome.err
    assert not native.RUN.exists()
    assert not state.PINS.exists()


@pytest.fixture
def sysctl() -> Iterator[Callable[[Path, int], None]]:
    """Return a function that sets a sysctl, which is as it was at the end."""
    before: dict[Path, str] = {}

    def put(path: Path, value: int) -> None:
        before.setdefault(path, path.read_text())
        path.write_text(f"{value}\n")

    yield put
    for path, text in before.items():
        path.write_text(text)


def test_nothing_is_missing_here() -> None:
    native.DEV_KVM.chmod(0o660)
    status, able, rows = doctor()
    assert (status, able, {row["state"] for row in rows.values()}) == (0, True, {"ok"})
    with libbpf.Object(features.OBJECT) as obj:
        assert {f"program {name}" for name in obj.programs()} < set(rows)
    assert {condition.row for condition in CONDITIONS if condition.row} | {"configuration"} < set(rows)
    native.DEV_KVM.chmod(0o666)
    outcome = uffdguard("doctor")
    assert (outcome.status, outcome.out.splitlines()[-1]) == (0, "this machine can enforce the policy")
    assert "everybody may open /dev/kvm" in outcome.out
    assert not native.RUN.exists()


def test_an_ordinary_user_learns_what_can_be_told_while_a_policy_is_in_force(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    status, able, rows = doctor(USER)
    assert (status, able, rows["privileges"]["state"], rows["sysctl"]["state"]) == (1, None, "missing", "ok")
    assert {name for name, row in rows.items() if row["state"] == "missing"} == {"privileges"}
    assert rows["program decide"]["state"] == rows["namespaces"]["state"] == "cannot tell"


def test_ftrace_that_is_off_is_named_and_refused(sysctl: Callable[[Path, int], None]) -> None:
    try:
        sysctl(features.FTRACE_ENABLED, 0)
    except OSError:
        return  # this kernel refuses that itself while a trampoline is there
    status, able, rows = doctor()
    assert (status, able, rows["ftrace"]["state"]) == (1, False, "missing")
    assert uffdguard("doctor").out.endswith("\nthis machine cannot enforce the policy: 1 thing is missing\n")
    refused("kernel.ftrace_enabled is 0", "remove it from sysctl.d and run sysctl -w kernel.ftrace_enabled=1")


def test_the_policy_is_as_it_should_be_without_the_jit(sysctl: Callable[[Path, int], None]) -> None:
    sysctl(features.JIT_ENABLED, 0)
    sysctl(Path("/proc/sys/net/core/bpf_jit_harden"), 2)
    assert "interprets" in doctor()[2]["JIT"]["fact"]
    assert uffdguard("start", "--mode", "kvm").status == 0
    with state.pinned() as found:
        assert {program.jited_prog_len for program in found.programs.values()} == {0}
    assert actor("syscall", "device", "open:/dev/kvm", "syscall", "device") == ANSWERS
    assert uffdguard("mode", "disabled").status == 0
    assert actor("syscall", "device") == ["EPERM", "EPERM"]
    status = uffdguard("status")
    assert (status.status, "problem" in status.out) == (0, False)


def test_a_mistake_in_the_configuration_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    config.ADMINISTRATOR.write_text('\nmode = "kmv"\n')
    status, able, rows = doctor()
    assert (status, able, rows["configuration"]["state"]) == (1, False, "missing")
    assert "uffdguard.toml, line 2: mode: must be one of" in rows["configuration"]["fact"]


def test_what_is_not_mounted_cannot_be_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "SECURITYFS", tmp_path)
    status, able, rows = doctor()
    assert (status, able) == (0, None)
    assert {name for name, row in rows.items() if row["state"] == "cannot tell"} == {"LSM list", "lockdown"}
    assert uffdguard("start").status == 0  # it asks the policy


class TestRecursionGuard:
    """LSM programs before 6.1.54: the kernel skips one while another is preempted on the same CPU."""

    @pytest.fixture(autouse=True)
    def guarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hide the function that the kernel's BTF has where LSM programs are without the guard."""
        assert features.recursion_guard() is False
        has = libbpf.kernel_has_function
        monkeypatch.setattr(libbpf, "kernel_has_function", lambda name: name != "__bpf_prog_enter_recur" and has(name))

    def test_goes_with_a_kernel_that_does_not_preempt(self) -> None:
        if features.preemption() not in ("none", "voluntary"):
            pytest.skip("this kernel preempts")  # as x86 from 7.0 always does
        assert doctor()[2]["preemption"]["state"] == "ok"
        assert uffdguard("start").status == 0
        assert state.status().failing == []

    def test_names_a_kernel_that_preempts_from_now_on(self) -> None:
        if features.preemption() not in ("none", "voluntary"):
            pytest.skip("this kernel preempts")
        assert uffdguard("start").status == 0
        with preemptible():
            # Such a kernel may hide grants as well, which is less.
            assert state.status().failing[0] == "preemption"
            assert "this kernel preempts (full)" in uffdguard("status").out

    def test_does_not_go_with_one_that_does(self) -> None:
        with preemptible():
            assert doctor()[1] is False
            refused("preemption: this kernel preempts (full)", "boot Linux 6.1.54, 6.2 or newer")

    def test_without_debugfs_goes_by_the_command_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        if "PREEMPT_DYNAMIC" not in os.uname().version:
            pytest.skip("this kernel preempts as it was built to")
        monkeypatch.setattr(features, "PREEMPT", tmp_path / "preempt")
        monkeypatch.setattr(features, "COMMAND_LINE", tmp_path / "cmdline")
        for line, model in (("preempt=full", "full"), ("preempt=voluntary", "voluntary")):
            features.COMMAND_LINE.write_text(f"quiet {line}\n")
            assert features.preemption() == model
        features.COMMAND_LINE.write_text("quiet\n")
        monkeypatch.setattr(native, "MODULES", tmp_path)
        if features.preemption() is None:  # else this root has the configuration of its kernel
            refused("preemption: this kernel may preempt", "or with preempt=voluntary")
