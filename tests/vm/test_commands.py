"""The commands as their user meets them, on a live kernel."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from inside import USER, force_knob, uffdguard

from uffdguard import config, state
from uffdguard.kernel import features, libbpf, native

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_start_mode_status_and_stop_in_a_dialogue() -> None:
    assert uffdguard("start", "--mode", "kvm").status == 0
    assert uffdguard("mode").out == "disabled enabled [kvm]\n"
    again = uffdguard("start")
    assert (again.status, again.out) == (0, "already in force; nothing to do\n")
    switched = uffdguard("mode", "enabled")
    assert (switched.status, switched.out, switched.err) == (0, "", "")
    assert uffdguard("mode").out == "disabled [enabled] kvm\n"
    assert uffdguard("stop").status == 0
    assert uffdguard("stop").out == "not in force; nothing to do\n"


def test_start_takes_the_mode_from_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "uffdguard.toml").write_text('mode = "kvm"\nuser-mode-only = "allow"\n')
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    assert uffdguard("start").status == 0
    status = json.loads(uffdguard("status", "--json").out)
    assert (status["mode"], status["user_mode_only"]) == ("kvm", True)


def test_a_mistake_in_the_configuration_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "uffdguard.toml").write_text('mode = "kmv"\n')
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    outcome = uffdguard("start")
    assert outcome.status == 1
    assert f"{tmp_path}/uffdguard.toml, line 1: mode: must be one of disabled, enabled, kvm" in outcome.err
    assert not state.PINS.exists()


def test_an_unknown_mode_changes_nothing(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    outcome = uffdguard("mode", "kmv")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "uffdguard mode: there is no mode 'kmv'; the modes are disabled, enabled, kvm\n"
    assert uffdguard("mode").out == "disabled enabled [kvm]\n"


def test_mode_without_a_policy_says_so() -> None:
    outcome = uffdguard("mode")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "uffdguard: the policy is not in force; run uffdguard start\n"
    assert uffdguard("mode", "kvm").status == 1


def test_a_kernel_without_kvm_has_two_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_kvm", lambda: False)
    outcome = uffdguard("start", "--mode", "kvm")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "the modes are disabled, enabled\n" in outcome.err
    assert uffdguard("start").status == 0
    assert uffdguard("mode").out == "[disabled] enabled\n"


def test_status_as_json_tells_the_state(in_force: Callable[..., None]) -> None:
    before = json.loads(uffdguard("status", "--json").out)
    assert (before["in_force"], before["mode"], before["since"], before["native_knob"]) == (False, None, None, 0)
    in_force("kvm")
    status: dict[str, Any] = json.loads(uffdguard("status", "--json").out)
    assert (status["in_force"], status["mode"], status["native_knob"], status["drift"]) == (True, "kvm", 1, False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", status["since"])
    assert (status["kernel"], status["grants"]) == (os.uname().release, 0)
    assert (status["skipped"], status["lost"], status["problems"]) == (0, 0, [])
    assert set(status["pins"].values()) == {True}
    assert (status["allowed"], status["refused"]) == (0, 0)  # what start asks itself does not count


def test_status_as_text_exits_with_0_only_when_all_is_well(in_force: Callable[..., None]) -> None:
    assert uffdguard("status").status == 1
    in_force("kvm")
    outcome = uffdguard("status")
    assert outcome.status == 0
    assert re.search(r"^policy +in force since \S+$", outcome.out, re.MULTILINE)
    force_knob(0)
    outcome = uffdguard("status")
    assert outcome.status == 1
    assert "the native knob is 0 and not 1: processes that the mode allows are refused" in outcome.out


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [("disabled", "EPERM", "EPERM"), ("enabled", "allowed", "allowed"), ("kvm", "EPERM", "allowed")],
)
def test_probe_really_tries(in_force: Callable[..., None], mode: str, before: str, after: str) -> None:
    in_force(mode)
    outcome = uffdguard("probe", "--json", user=USER)
    ways = ("syscall", "syscall-user-mode-only", "device")
    assert json.loads(outcome.out) == {
        **dict.fromkeys(ways, before),
        "kvm": "allowed",
        **dict.fromkeys((f"{way}-after-kvm" for way in ways), after),
    }


@pytest.mark.parametrize("arguments", [("start",), ("stop",), ("mode",), ("mode", "kvm"), ("status",)], ids=" ".join)
def test_an_ordinary_user_is_told_that_root_is_needed(arguments: tuple[str, ...]) -> None:
    outcome = uffdguard(*arguments, user=USER)
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "run it as root" in outcome.err
    assert not native.RUN.exists()


def test_a_compiled_program_that_is_missing_is_told_on_one_line(
    in_force: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_force("kvm")
    monkeypatch.setattr(features, "OBJECT", tmp_path / "guard.bpf.o")
    outcome = uffdguard("start")
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "guard.bpf.o: No such file or directory" in outcome.err
    assert uffdguard("mode").out == "disabled enabled [kvm]\n"


class TestWhatIsMissing:
    """One clear line with what to do, exit status 1, nothing left behind."""

    def refused(self, *words: str) -> None:
        outcome = uffdguard("start", "--mode", "kvm")
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
        for word in words:
            assert word in outcome.err
        assert not native.RUN.exists()
        assert not state.PINS.exists()
        assert uffdguard("doctor").status == 1

    def test_libbpf(self, monkeypatch: pytest.MonkeyPatch) -> None:
        libbpf.library.cache_clear()
        monkeypatch.setattr(libbpf, "NAME", "libbpf.so.0.none")
        try:
            self.refused("libbpf.so.0.none is missing", "apt install libbpf1")
        finally:
            libbpf.library.cache_clear()

    def test_the_hook(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "HOOK", "no_such_hook")
        self.refused("no no_such_hook for BPF", "boot Linux 5.12 or newer, with CONFIG_BPF_LSM")

    def test_bpf_among_the_lsms(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "lsm").write_text("lockdown,capability,apparmor")
        monkeypatch.setattr(features, "SECURITYFS", tmp_path)
        self.refused("no bpf in lockdown,capability,apparmor", "boot with lsm=lockdown,apparmor,bpf")

    def test_a_kernel_that_refuses_the_program(self, variant: Callable[..., None]) -> None:
        variant("return now & STRICT ? -EACCES : -EPERM;", "return *(int *)0x10;")
        self.refused("the kernel refuses to load it")

    def test_a_place_for_bpffs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(native, "BPFFS", tmp_path / "nowhere")
        self.refused("nowhere is not there")
