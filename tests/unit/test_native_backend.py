"""What the backend native computes: who may open a device, what is due, and the files that keep it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest

from uffdguard import native_backend, state
from uffdguard.kernel import native
from uffdguard.native_backend import CLOSED, Permissions
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from pathlib import Path


def acl(group: int, mask: int) -> bytes:
    """Return an ACL in which a user is named, with these permissions of the group that owns the file, and the mask."""
    entries = ((0x01, 6, -1), (0x02, 6, 1000), (0x04, group, -1), (0x10, mask, -1), (0x20, 0, -1))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


@pytest.mark.parametrize(
    ("permissions", "opens"),
    [
        (Permissions(0, 36, 0o660), True),
        (Permissions(0, 36, 0o666), True),
        (Permissions(0, 36, 0o600), False),
        (Permissions(0, 36, 0o640), False),
        (Permissions(0, 36, 0o606), False),
        (Permissions(0, 36, 0o660, acl(6, 6)), False),
        (Permissions(0, 36, 0o660, acl(0, 6)), False),
    ],
)
def test_the_group_opens_what_its_bits_let_it_but_with_an_acl_nothing(permissions: Permissions, opens: bool) -> None:
    assert permissions.group_opens is opens


@pytest.mark.parametrize("permissions", [CLOSED, Permissions(4294966784, 36, 0o6777, acl(6, 6))])
def test_a_record_is_what_was_recorded(permissions: Permissions) -> None:
    assert Permissions.of_record(permissions.record()) == permissions


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the records in a directory of the test's own."""
    monkeypatch.setattr(state, "NATIVE_MODE", tmp_path / "mode")
    monkeypatch.setattr(native_backend, "FOUND_DEVICE", tmp_path / "device")
    return tmp_path


@pytest.mark.parametrize(
    "text", ["-", "", "1", "0 0 9", "a b c", "0 0 600 x", "\xff", "99999999999 0 600", "0 -1 600", "0 0 77777"]
)
def test_a_record_that_is_damaged_or_of_no_device_gives_nothing_back(run: Path, text: str) -> None:
    (run / "device").write_text(text, "latin-1")
    assert native_backend.found_device() is None


@pytest.mark.parametrize("mode", Mode)
def test_the_mode_that_is_set_is_the_recorded_one(run: Path, mode: Mode) -> None:
    assert native_backend.policy() is None
    (run / "mode").write_text(mode)
    assert native_backend.policy() == Policy(mode, user_mode_only=True)


@pytest.mark.parametrize("text", ["", "kwm", "kvm kvm", "\xff"])
def test_a_damaged_one_is_the_strictest(run: Path, text: str) -> None:
    (run / "mode").write_text(text, "latin-1")
    assert native_backend.policy() == Policy(Mode.DISABLED, user_mode_only=True)


def test_what_is_due_follows_dev_kvm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm = run / "kvm"
    kvm.touch()
    monkeypatch.setattr(native, "DEV_KVM", kvm)
    monkeypatch.setattr(native, "wrong_kvm", lambda: None)
    for mode, due in ((0o660, Permissions(0, kvm.stat().st_gid, 0o660)), (0o600, CLOSED)):
        kvm.chmod(mode)
        assert native_backend.due_device(Mode.KVM) == due
    monkeypatch.setattr(native, "wrong_kvm", lambda: "/dev/kvm: no")
    assert native_backend.due_device(Mode.KVM) == native_backend.due_device(Mode.DISABLED) == CLOSED
    assert native_backend.due_device(Mode.ENABLED) == CLOSED  # what was found is not known
    (run / "device").write_text(Permissions(1, 2, 0o640).record())
    assert native_backend.due_device(Mode.ENABLED) == Permissions(1, 2, 0o640)


def test_the_files_say_what_is_due(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "kvm_group", lambda: 36)
    found = {mode: native_backend.rules(mode) for mode in Mode}
    for mode, value in ((Mode.DISABLED, 0), (Mode.KVM, 0), (Mode.ENABLED, 1)):
        assert found[mode][native_backend.SYSCTL].endswith(f"\nvm.unprivileged_userfaultfd = {value}\n")
    udev = {mode: rules.get(native_backend.UDEV_RULES, "") for mode, rules in found.items()}
    assert udev[Mode.ENABLED] == ""
    assert udev[Mode.DISABLED].endswith('KERNEL=="userfaultfd", OWNER:="0", GROUP:="0", MODE:="0600"\n')
    assert 'OWNER:="0", GROUP:="36", MODE:="0660"\n' in udev[Mode.KVM]


@pytest.mark.parametrize("before", [CLOSED, Permissions(0, 36, 0o660), Permissions(1, 2, 0o666)])
@pytest.mark.parametrize("with_acl", [False, True])
@pytest.mark.parametrize("kvm", [0o660, 0o666, 0o640, 0o600, 0o60, None])
def test_the_rule_that_follows_dev_kvm_gives_what_start_would(
    run: Path, monkeypatch: pytest.MonkeyPatch, kvm: int | None, with_acl: bool, before: Permissions
) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    device, of_kvm = run / "userfaultfd", run / "kvm"
    device.touch()
    before.give(device)
    monkeypatch.setattr(native, "DEV_KVM", of_kvm)
    monkeypatch.setattr(native, "wrong_kvm", lambda: None if kvm else "none")
    if kvm:
        of_kvm.touch()
        of_kvm.chmod(kvm)
        os.chown(of_kvm, 0, 36)
        if with_acl:
            os.setxattr(of_kvm, native_backend.ACL, acl(6, 6))
    follow(run)
    due = native_backend.due_device(Mode.KVM)
    found = Permissions.of(device)
    assert (found.gid, found.mode) == (due.gid, due.mode)


def test_the_rule_that_follows_dev_kvm_gives_nobody_a_device_that_has_an_acl(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    for name, permissions in (
        ("kvm", Permissions(0, 36, 0o660)),
        ("userfaultfd", Permissions(0, 36, 0o660, acl(6, 6))),
    ):
        (run / name).touch()
        permissions.give(run / name)
    follow(run)
    assert Permissions.of(run / "userfaultfd").mode == 0o600


def follow(run: Path) -> None:
    """Run what udev would, by sh: files of the test stand for the devices, and their number is a file's."""
    (script,) = re.findall(r"""RUN\+="/bin/sh -c '(.*?)'"$""", native_backend.FOLLOW_KVM, re.MULTILINE | re.DOTALL)
    assert '"' not in script
    assert not re.search(r"(?<![$])[$](?![$])|(?<!%)%(?!%)", script.replace("$$", "").replace("%%", ""))
    script = script.replace("\\\n", "").replace("$$", "$").replace("%%", "%").replace("/dev/", f"{run}/")
    script = script.replace(":a:e8", ":0:0")
    subprocess.run(["sh", "-c", script], check=True, stderr=subprocess.DEVNULL)
