"""What holders and check say, as far as it goes without a kernel of our own."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdguard import cli, inspect
from uffdguard.cli import render
from uffdguard.errors import Failure
from uffdguard.inspect import Setting, Subject, Verdict, control_group, unit
from uffdguard.kernel import execve, layout, libbpf, native
from uffdguard.kernel.execve import Caller, FileCapabilities, Program
from uffdguard.policy import Mode, Policy, Request, decide

if TYPE_CHECKING:
    from pathlib import Path

CONTAINER = "0123456789abcdef" * 4
POD = "3fc84a85-7a8c-4e5a-a1a6-8f0f3a3c1d2e"


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("/system.slice/sshd.service", "sshd.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/a.service", "user@1000.service/a.service"),
        # Who has a control group of its own names those below as it likes.
        ("/user.slice/user-1000.slice/user@1000.service/sshd.service", "user@1000.service/sshd.service"),
        (f"/system.slice/docker-{CONTAINER}.scope", "docker-0123456789ab"),
        (f"/docker/{CONTAINER}", "0123456789ab"),
        (f"/machine.slice/libpod-{CONTAINER}.scope/container", "libpod-0123456789ab"),
        (f"/user.slice/user@1000.service/user.slice/libpod-{CONTAINER}.scope", "user@1000.service/libpod-0123456789ab"),
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD.replace('-', '_')}.slice"
            f"/cri-containerd-{CONTAINER}.scope",
            f"pod {POD}/cri-containerd-0123456789ab",
        ),
        (f"/kubepods/besteffort/pod{POD}/{CONTAINER}", f"pod {POD}/0123456789ab"),
        ("/lxc.payload.web/init.scope", "lxc.payload.web/init.scope"),
        (r"/machine.slice/machine-qemu\x2d1\x2dvm.scope/libvirt/emulator", r"machine-qemu\x2d1\x2dvm.scope"),
        (f"/{CONTAINER}0", ""),
        ("/a/b", ""),
        ("/", ""),
        ("", ""),
    ],
)
def test_a_control_group_tells_units_pods_and_containers(cgroup: str, expected: str) -> None:
    assert unit(cgroup) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/system.slice/a.service\n", "/system.slice/a.service"),
        ("12:cpu,cpuacct:/x\n1:name=systemd:/system.slice/a.service\n0::/y\n", "/system.slice/a.service"),
        ("12:cpu,cpuacct:/x\n0::/a:b::c\n", "/a:b::c"),
        ("0::/a\rb\x1b\n", "/a\rb\x1b"),
        ("12:cpu,cpuacct:/x\n", ""),
        ("", ""),
    ],
)
def test_the_control_group_is_the_one_that_systemd_goes_by(text: str, expected: str) -> None:
    assert control_group(text) == expected


SETTINGS = [
    Setting(policy, knob)
    for policy in (None, *(Policy(mode, option) for mode in Mode for option in (False, True)))
    for knob in (0, 1, None)
]
SUBJECTS = [Subject("pid 1 (x)", *facts) for facts in itertools.product((False, True), repeat=4)]
ANSWERS = [(setting, subject) for setting in SETTINGS for subject in SUBJECTS]


def test_a_verdict_is_that_of_the_table_unless_the_knob_refuses_first() -> None:
    for (setting, subject), flag in itertools.product(ANSWERS, (False, True)):
        request = Request(subject.effective and subject.initial, flag, subject.granted)
        native_refuses = setting.knob == 0 and not (request.capability or flag)
        by_table = setting.policy is None or decide(setting.policy, request).allowed
        expected = by_table and not native_refuses
        assert inspect.verdict(setting, request).allowed is expected, (setting, request)


def test_what_would_allow_it_is_told_to_who_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_kvm", lambda: True)
    for setting, subject in ANSWERS:
        answer = inspect.answer(setting, subject)
        command = "uffdguard mode" if setting.policy else "uffdguard start --mode"
        is_kvm, is_enabled, refused = answer.mode is Mode.KVM, answer.mode is Mode.ENABLED, not answer.allowed
        told = "\n".join(answer.would_allow)
        expected = {
            "CAP_SYS_PTRACE effective": refused,
            f"{command} kvm": refused and not is_kvm,
            f"{command} kvm, and to open /dev/kvm": refused and not is_kvm and not subject.granted,
            f"{command} enabled": refused and not is_enabled,
        }
        assert {change: change in told for change in expected} == expected, answer
        by_opening = refused and is_kvm and not subject.granted and setting.knob != 0
        assert told.startswith("to open /dev/kvm itself") is by_opening, answer


def test_in_audit_only_the_knob_refuses_and_enforcement_is_what_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_kvm", lambda: True)
    opener = inspect.Subject("pid 1 (x)", effective=False, initial=True, granted=True)
    for mode in Mode:
        policy = Policy(mode, audit=True)
        assert inspect.verdict(inspect.Setting(policy, 1), opener.request).allowed
        answer = inspect.answer(inspect.Setting(policy, 0), opener)
        assert (answer.allowed, answer.reason) == (False, "native")
        assert "in audit vm.unprivileged_userfaultfd is left as it was" in answer.why
        commands = [change for change in answer.would_allow if change.startswith("uffdguard")]
        assert all(command.startswith("uffdguard start --enforce") for command in commands)
        assert ("uffdguard start --enforce, which sets the knob" in commands) is (mode is not Mode.DISABLED)
    stranger = inspect.answer(inspect.Setting(Policy(Mode.KVM, audit=True), 1), replace(opener, granted=False))
    assert (stranger.allowed, stranger.reason, stranger.would_allow) == (True, "audit", [])
    assert "this one (no-kvm): mode is kvm" in stranger.why


def test_the_facts_are_those_that_decide() -> None:
    for setting, subject in ANSWERS:
        answer = inspect.answer(setting, subject)
        if setting.policy and answer.reason != "capability":
            assert f"mode is {answer.mode}" in answer.why or f"mode {answer.mode}" in answer.why
        if answer.reason in ("capability", "disabled", "no-kvm") or not setting.policy:
            assert ("has CAP_SYS_PTRACE effective" in answer.why) is answer.capability, answer
            assert ("not in the initial user namespace" in answer.why) is not subject.initial, answer
        assert ("unprivileged_userfaultfd" in answer.why) is (answer.reason == "native")


NOBODY = Caller((1000, 1000), (1000, 1000), frozenset(), 0, 0, (1 << 41) - 1, 0, False, 0)
ROOT = Caller((0, 0), (0, 0), frozenset(), 0, 0, (1 << 41) - 1, 0, False, 0)
BIT = 1 << native.CAP_SYS_PTRACE


def changed(caller: Caller, **values: Any) -> Caller:
    return replace(caller, **values)


@pytest.mark.parametrize(
    ("caller", "program", "expected"),
    [
        (NOBODY, Program(), 0),
        (ROOT, Program(), BIT),
        (changed(ROOT, bounding=0), Program(), 0),
        (changed(ROOT, securebits=1), Program(), 0),
        (changed(ROOT, no_new_privileges=True), Program(), 0),
        (changed(ROOT, no_new_privileges=True, permitted=BIT), Program(), BIT),
        (changed(NOBODY, permitted=BIT), Program(), 0),
        (changed(NOBODY, permitted=BIT, inheritable=BIT, ambient=BIT), Program(), BIT),
        (changed(NOBODY, permitted=BIT, inheritable=BIT, ambient=BIT), Program(user=1001), 0),
        (NOBODY, Program(user=0), BIT),
        (changed(NOBODY, no_new_privileges=True), Program(user=0), 0),
        (NOBODY, Program(user=1001), 0),
        (NOBODY, Program(capabilities=FileCapabilities(BIT, 0, True)), BIT),
        (NOBODY, Program(capabilities=FileCapabilities(BIT, 0, False)), 0),
        (changed(NOBODY, no_new_privileges=True), Program(capabilities=FileCapabilities(BIT, 0, True)), 0),
        (changed(NOBODY, inheritable=BIT), Program(capabilities=FileCapabilities(0, BIT, True)), BIT),
        # With capabilities of its own, setuid root gives no others.
        (NOBODY, Program(user=0, capabilities=FileCapabilities(1, 0, True)), 0),
        (ROOT, Program(capabilities=FileCapabilities(1, 0, True)), BIT),
    ],
    ids=str,
)
def test_a_started_program_has_the_capabilities_of_capabilities_7(
    caller: Caller, program: Program, expected: int
) -> None:
    assert execve.effective(caller, program) & BIT == expected


def test_a_program_that_demands_more_than_the_bounding_set_is_not_started() -> None:
    with pytest.raises(Failure, match="would not start it"):
        execve.effective(changed(NOBODY, bounding=0), Program(capabilities=FileCapabilities(BIT, 0, True)))


def test_what_depends_on_the_kernel_is_not_told() -> None:
    caller = changed(NOBODY, users=(1000, 1001), permitted=BIT, inheritable=BIT, ambient=BIT)
    with pytest.raises(Failure, match="cannot be told"):
        execve.effective(caller, Program())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (struct.pack("<5I", 0x02000001, BIT, 2, 1, 0), FileCapabilities(BIT | 1 << 32, 2, True)),
        (struct.pack("<3I", 0x01000000, BIT, 2), FileCapabilities(BIT, 2, False)),
        (struct.pack("<6I", 0x03000001, BIT, 2, 1, 0, 1000), None),  # of the root of another user namespace
        (struct.pack("<3I", 0x02000000, BIT, 2), None),
        (b"\0", None),
    ],
)
def test_capabilities_of_a_file(data: bytes, expected: FileCapabilities | None) -> None:
    assert FileCapabilities.decode(data) == expected


@given(st.binary(max_size=32))
def test_no_attribute_of_a_file_breaks_it(data: bytes) -> None:
    FileCapabilities.decode(data)


def test_a_program_is_found_as_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elf = tmp_path / "elf"
    elf.write_bytes(b"\x7fELF" + bytes(14) + b"\x3e\0")
    elf.chmod(0o4755)
    for name, text in (("script", f"#! {elf} -x\n"), ("second", f"#!{tmp_path / 'script'}"), ("none", "echo\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o6755)
    loop = tmp_path / "loop"
    loop.write_text(f"#!{loop}\n")
    loop.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("elf", "script", "second"):
        assert execve.find(name) == Program(user=os.getuid())
    for name in ("none", "loop"):
        with pytest.raises(Failure, match="cannot be told"):
            execve.find(name)
    with pytest.raises(Failure, match="no such program"):
        execve.find("elsewhere")


def test_the_records_are_those_of_the_compiled_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with libbpf.Object(inspect.OBJECT) as obj:
        layout.check_records(obj)
        monkeypatch.setitem(layout.RECORDS, "thread", layout.Descriptor)
        with pytest.raises(Failure, match=r"inspect.bpf.o and layout.py differ in the size of thread"):
            layout.check_records(obj)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, columns: int) -> list[str]:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    render.columns([("1", "refused", "a" * 100)], cut=[2])
    return terminal.getvalue().splitlines()


def test_a_terminal_has_colours_and_no_longer_lines_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    (line,) = shown(monkeypatch, 80)
    assert line != click.unstyle(line)
    assert len(click.unstyle(line)) == 80
    assert line.endswith("a…")
    (line,) = shown(monkeypatch, 200)
    assert line.endswith("a" * 100)
    monkeypatch.setenv("NO_COLOR", "1")
    (line,) = shown(monkeypatch, 80)
    assert line == f"1  refused  {'a' * 67}…"


def test_a_pipe_has_whole_lines_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    render.columns([("1", "refused", "a" * 300)], cut=[2])
    assert capsys.readouterr().out == f"1  refused  {'a' * 300}\n"


def test_a_command_with_a_hostile_name_in_a_user_namespace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile = tmp_path / "a\x1b"
    hostile.write_text("#!/bin/sh\n")
    hostile.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(inspect, "visible_setting", lambda: Setting(Policy(Mode.KVM), None, option=False))
    monkeypatch.setattr(native, "in_initial", lambda kind: False)
    with pytest.raises(SystemExit) as end:
        cli.main(["check", "--json", "--", "a\x1b"])
    answer = json.loads(capsys.readouterr().out)
    assert end.value.code == 1
    assert (answer["subject"], answer["reason"], answer["user_mode_only"]) == (r"a\x1b", "no-kvm", None)
    assert "not in the initial user namespace" in answer["why"]


def test_holders_are_shown_with_each_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "looking", lambda: contextlib.nullcontext((None, None)))
    verdicts = [Verdict(True, "capability"), Verdict(False, "no-kvm")]
    holder = inspect.Holder(7, 0, "root", "x", "", "/", 2, True, False, verdicts)
    monkeypatch.setattr(inspect, "holders", lambda setting, obj: [holder])
    with pytest.raises(SystemExit) as end:
        cli.main(["holders"])
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "7", "root", "x", "2", "open", "-", "allowed/refused", "capability/no-kvm", "-",
    ]  # fmt: skip
