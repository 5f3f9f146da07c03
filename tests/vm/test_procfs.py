"""What sandboxes may mount, and what a server that was taken over may write: no more than without us."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import USER, forked, until

from uffdguard import guard, knob, state
from uffdguard.kernel import libbpf, native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FRESH = "unshare -Urpf --mount-proc true"
#: As a service with ProtectKernelTunables= has it; then whether a user namespace in it can have a fresh procfs.
SANDBOX = """
mount --make-rprivate /
mount --rbind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; mount -t tmpfs -o ro,mode=000 t /proc/fs
setpriv {who} --no-new-privs unshare -Urmpf mount -t proc proc /mnt
"""
WHO = (f"--reuid {USER} --regid {USER} --clear-groups", "--bounding-set -all,+setfcap --inh-caps -all")


def sandboxes() -> list[bool]:
    """Tell whether a sandbox of an ordinary user, and one of uid 0 with a single capability, gets a fresh procfs."""
    words = [["unshare", "-m", "sh", "-c", SANDBOX.format(who=who)] for who in WHO]
    return [subprocess.run(command, capture_output=True).returncode == 0 for command in words]


def fresh(user: int = USER) -> bool:
    return subprocess.run(shlex.split(FRESH), user=user, group=user, extra_groups=[]).returncode == 0


def mounts() -> list[str]:
    """Return where something of ours is mounted, in the order of the mounts, with its type."""
    rows = [line.split() for line in native.MOUNTS.read_text().splitlines()]
    return [f"{row[4]} {row[-3]}" for row in rows if "uffdguard" in " ".join(row)]


@pytest.fixture
def serving(in_force: Callable[..., None]) -> Iterator[int]:
    """Put a policy in force and serve the interface file; give the command's pid."""
    in_force("kvm")
    pid = forked(knob.run)
    until(lambda: "[kvm]" in native.FILE.read_text())
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


def test_with_the_policy_in_force_sandboxes_get_what_they_get_without(in_force: Callable[..., None]) -> None:
    assert (sandboxes(), fresh(), mounts()) == ([False, False], True, [])
    in_force("kvm")
    assert (sandboxes(), fresh(), mounts()) == ([False, False], True, [])
    assert (state.status().native_knob, native.read_knob()) == (1, 1)


def test_while_the_file_is_served_a_procfs_is_there_that_nobody_reaches(serving: int) -> None:
    assert fresh()
    assert fresh(0)
    hidden = native.VISIBLE_PROC.parent
    assert mounts() == [f"{native.VISIBLE_PROC} proc", f"{hidden} tmpfs", f"{native.FILE} {native.COVER}"]
    least = native.MOUNTS.read_text().count("proc rw,subset=pid\n")
    assert least == platform.release().startswith(("6.1.", "6.12."))
    assert state.status().problems == []
    assert state.status().native_knob == 1
    with pytest.raises(FileNotFoundError):
        os.open(native.VISIBLE_PROC, os.O_PATH)
    # What it costs: docs/security.md
    assert sandboxes() == [True, True]
    os.kill(serving, signal.SIGTERM)
    os.waitpid(serving, 0)
    assert (sandboxes(), fresh(), mounts()) == ([False, False], True, [])
    assert not native.VISIBLE_PROC.parent.exists()


def test_without_user_namespaces_it_is_the_least_one(in_force: Callable[..., None]) -> None:
    """Though nobody can try there whether it suffices: the limit may be raised later."""
    limit = Path("/proc/sys/user/max_user_namespaces")
    before = limit.read_text()
    in_force("kvm")
    limit.write_text("0\n")
    try:
        pid = forked(knob.run)
        until(lambda: "[kvm]" in native.FILE.read_text())
        assert native.MOUNTS.read_text().count("proc rw,subset=pid\n") == 1
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    finally:
        limit.write_text(before)
    assert mounts() == []


def test_stop_takes_it_away_after_a_kill(serving: int) -> None:
    server = state.server()
    assert server
    os.kill(serving, signal.SIGKILL)
    os.waitpid(serving, 0)
    os.kill(server, signal.SIGKILL)
    until(lambda: state.server() is None)
    assert len(mounts()) == 3
    assert guard.stop()
    assert (fresh(), mounts()) == (True, [])
    assert not native.VISIBLE_PROC.parent.exists()


def test_a_first_start_removes_the_procfs_of_an_older_version(in_force: Callable[..., None]) -> None:
    (native.RUN / "proc").mkdir(parents=True)
    native.mount("proc", native.RUN / "proc")
    in_force("kvm")
    assert mounts() == []


def test_a_server_writes_no_file_but_its_own(serving: int, tmp_path: Path) -> None:
    """With the mounts there as they are while it is served, hidden and not."""
    (tmp_path / "x").touch()
    victims = [
        Path("/etc/hostname"),
        Path("/proc/sys/kernel/core_pattern"),
        Path("/proc/sys/kernel/modprobe"),
        tmp_path / "x",
    ]
    native.unmount(native.VISIBLE_PROC.parent)
    native.VISIBLE_PROC.parent.chmod(0o755)
    victims += [native.VISIBLE_PROC / "self/comm", *(native.VISIBLE_PROC.glob("sys/kernel/core_pattern"))]
    with state.pinned() as found:
        policy = os.dup(found.fds["policy"])

    def taken_over() -> None:
        knob.confine()
        for victim in victims:
            with pytest.raises(PermissionError):
                os.open(victim, os.O_WRONLY)
            if not platform.release().startswith("6.1."):  # Landlock asks for that since 6.2
                with pytest.raises(PermissionError):
                    os.truncate(victim, 0)
        for made in (tmp_path / "y", Path("/run/y"), Path("/sys/fs/cgroup/y")):
            with pytest.raises(PermissionError):
                made.mkdir()
            with pytest.raises(PermissionError):
                made.touch()
        with pytest.raises(PermissionError):
            os.open("/sys/fs/cgroup/cgroup.procs", os.O_WRONLY)
        (native.RUN / "x").write_text("x")
        (native.RUN / "x").unlink()
        libbpf.pin(policy, state.PINS / "x")
        (state.PINS / "x").unlink()

    assert os.waitpid(forked(taken_over), 0)[1] == 0
