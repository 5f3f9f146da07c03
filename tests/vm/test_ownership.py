"""Our directories: theirs is a mode that is set and not masked, and an owner that uid 0 alone does not pass."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import USER, actor, forked, until

from uffdguard import cli, guard, knob, state
from uffdguard.errors import Failure
from uffdguard.kernel import libbpf, native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM = "open:/dev/kvm"
UMASKS = [0o777, 0o177, 0o277]


def ours(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@contextlib.contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def served() -> Iterator[int]:
    """Serve the interface file in mode kvm; give the server's pid."""
    pid = forked(knob.run)
    try:
        until(lambda: "[kvm]" in native.FILE.read_text())
        yield state.server() or 0
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("value", UMASKS, ids=oct)
def test_no_umask_changes_what_start_mode_knob_and_stop_do(value: int) -> None:
    with umask(value):
        guard.start(Policy(), Mode.KVM)
        assert [ours(path) for path in (native.RUN, state.PINS)] == [(native.OWNER, native.OWNER, 0o770)] * 2
        assert {ours(state.PINS / part) for part in state.PARTS} == {(0, 0, 0o600)}
        assert (ours(state.FOUND), ours(state.LOADED)) == ((0, 0, 0o644),) * 2
        guard.set_mode(Mode.ENABLED)
        state.LOADED.write_text("another object")
        assert guard.start(Policy(), Mode.KVM).changed
        (state.PINS / "counts").unlink()
        assert guard.start(Policy()).changed
        with served():
            assert state.status().problems == []
            assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
        assert guard.stop()
    assert not native.RUN.exists()
    assert not state.PINS.exists()


def test_what_an_older_version_made_under_a_umask_is_taken_over_or_away() -> None:
    for path in (native.RUN, state.PINS):
        path.mkdir(mode=0)
    guard.start(Policy(), Mode.KVM)
    for path in (native.RUN, state.PINS):
        os.chown(path, 0, 0)
        path.chmod(0)
    assert not guard.start(Policy()).changed
    assert [ours(path) for path in (native.RUN, state.PINS)] == [(native.OWNER, native.OWNER, 0o770)] * 2
    for path in (native.RUN, state.PINS):
        os.chown(path, 0, 0)
        path.chmod(0o700)
    assert guard.stop()
    assert not native.RUN.exists()
    assert not state.PINS.exists()


def test_a_directory_of_root_that_others_may_enter_is_not_used() -> None:
    state.PINS.mkdir()
    state.PINS.chmod(0o711)
    with pytest.raises(Failure, match="not a directory that only root may enter; remove it"):
        guard.start(Policy(), Mode.KVM)
    state.PINS.rmdir()


def without_capabilities() -> None:
    """Be uid 0 of a service or a container that has no capability."""
    native.drop_capabilities()


def in_a_user_namespace() -> None:
    """Be root of a user namespace, with all capabilities there."""
    native._unshare(native.CLONE_NEWUSER | native.CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/self/{name}").write_text("0 0 1")


def test_uid_0_without_capabilities_reads_one_line(in_force: Callable[..., None], tmp_path: Path) -> None:
    in_force("kvm")

    def run(words: tuple[str, ...]) -> None:
        os.dup2(os.open(tmp_path / "error", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        native.drop_capabilities()
        cli.main(list(words))

    line = r"uffdguard: cannot enter /run/uffdguard: no CAP_\w+; run it as root on the host itself\n"
    for words in (("status",), ("mode", "enabled"), ("stop",), ("knob",), ("knob", "serve")):
        pid = forked(lambda words=words: run(words))  # type: ignore[misc]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        assert re.fullmatch(line, (tmp_path / "error").read_text()), words


def tracing(pid: int) -> list[bool]:
    """Tell whether each way to get at the memory and the descriptors of another process is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(8)
    vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 8)
    ways = [libc.process_vm_readv(pid, vector, 1, vector, 1, 0) >= 0]
    pidfd = os.pidfd_open(pid)
    ways.append(libc.syscall(438, pidfd, 0, 0) >= 0)  # pidfd_getfd
    try:
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
        ways.append(True)
    except PermissionError:
        ways.append(False)
    ptrace_attach, ptrace_detach = 16, 17
    ways.append(libc.ptrace(ptrace_attach, pid, None, None) == 0)
    if ways[-1]:
        os.waitpid(pid, 0)
        libc.ptrace(ptrace_detach, pid, None, None)
    return ways


@pytest.mark.parametrize("become", [without_capabilities, in_a_user_namespace])
def test_uid_0_without_capabilities(become: Callable[[], None], in_force: Callable[..., None]) -> None:
    def careless() -> None:
        native.drop_capabilities()
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
        signal.pause()

    in_force("kvm")
    victim = forked(careless)
    until(lambda: "CapEff:\t0000000000000000" in Path(f"/proc/{victim}/status").read_text())
    with served() as server:
        tasks = Path(f"/proc/{server}/task").iterdir()
        (child,) = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]

        def lie() -> None:
            become()
            assert os.getuid() == 0
            with pytest.raises((PermissionError, FileNotFoundError)):
                os.open(native.VISIBLE_PROC, os.O_PATH)
            for path in (native.RUN, state.PINS):
                with pytest.raises(PermissionError):
                    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)
                with pytest.raises(PermissionError):
                    path.chmod(0o777)
                with pytest.raises(PermissionError):
                    os.chown(path, 0, 0)
            for part in ("policy", "witness", "decide"):
                with pytest.raises(PermissionError):
                    libbpf.get(state.PINS / part)
            for path in (state.FOUND, state.LOADED, state.SERVER, native.RUN / "x"):
                with pytest.raises(PermissionError):
                    os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            assert tracing(server) == [False] * 4
            assert tracing(child) == [False] * 4
            if become is without_capabilities:
                # As uid 0 it can do that to what is not guarded so.
                assert tracing(victim) == [True] * 4
                os.close(os.open("/etc/shadow", os.O_RDWR))

        assert os.waitpid(forked(lie), 0)[1] == 0
        assert state.status().problems == []
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    assert actor(KVM, "syscall", user=USER) == ["allowed", "allowed"]
