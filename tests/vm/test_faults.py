"""Faults injected: status names each, start or stop mends it, and nobody is allowed more than asked meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import USER, actor, force_knob, forked, uffdguard, until, waiting_actor

from uffdguard import guard, knob, state
from uffdguard.errors import Failure
from uffdguard.kernel import features, libbpf, native, probe
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM = "open:/dev/kvm"
ALL = ("syscall", "int80", "device", "syscall:1", "int80:1", "device-int80")
#: What an unprivileged process may do by the native knob alone, by its value.
NATIVE = {0: {"device", "syscall:1", "int80:1", "device-int80"}, 1: set(ALL)}
NOTHING: set[str] = set()


def ways(*steps: str) -> set[str]:
    """Return the ways by which an unprivileged process gets a userfaultfd after STEPS."""
    answers = actor(*steps, *ALL)[-len(ALL) :]
    assert set(answers) <= {"allowed", "EPERM"}
    return {way for way, answer in zip(ALL, answers, strict=True) if answer == "allowed"}


def start(mode: str | None = None) -> bool:
    return guard.start(Policy(), Mode(mode) if mode else None).changed


def names(*problems: str) -> bool:
    """Tell whether status says just these, to a person and to a program, and that not all is well."""
    told, machine = uffdguard("status"), uffdguard("status", "--json")
    assert (told.status, machine.status) == (1, 1)
    assert all(f"problem: {problem}\n" in told.out for problem in problems)
    assert json.loads(machine.out)["problems"] == list(problems)
    return True


def in_order(mode: str) -> bool:
    """Tell whether the policy is in force in MODE, nothing is amiss, and it answers."""
    status = state.status()
    assert (status.in_force, status.mode, status.problems) == (True, mode, [])
    return ways() == NOTHING and ways(KVM) == (set(ALL) if mode == "kvm" else NOTHING)


@pytest.fixture
def serving() -> Iterator[Callable[[str], int]]:
    """Return a function that puts a policy in force and serves the interface file; it gives the command's pid."""
    pids = []

    def serve(mode: str) -> int:
        start(mode)
        pids.append(forked(knob.run))
        until(lambda: f"[{mode}]" in native.FILE.read_text())
        return pids[-1]

    yield serve
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


class TestReadOnlyBpffs:
    """Nothing can be pinned there, nor what is pinned opened or unpinned."""

    @pytest.fixture(autouse=True)
    def writable_again(self) -> Iterator[None]:
        yield
        native.remount(native.BPFFS, read_only=False)

    def test_is_named_decides_on_and_start_mends_it_and_keeps_the_grants(self) -> None:
        start("kvm")
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            native.remount(native.BPFFS, read_only=True)
            assert names(*(f"{part} is not pinned (Read-only file system)" for part in state.PARTS))
            assert ways() == NOTHING
            with pytest.raises(Failure, match="run uffdguard start"):
                guard.set_mode(Mode.ENABLED)
            start()
            assert in_order("kvm")
            assert go_on()[1:] == ["allowed"] * len(ALL)

    def test_does_not_stop_stop(self) -> None:
        start("kvm")
        native.remount(native.BPFFS, read_only=True)
        assert guard.stop()
        assert ways() == NATIVE[0]

    def test_is_no_hindrance_to_the_first_start_and_stays_when_that_fails(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        native.remount(native.BPFFS, read_only=True)
        with monkeypatch.context() as patch:
            patch.setattr(libbpf.Object, "load", lambda obj: full())
            with pytest.raises(Failure, match="No space left"):
                start("kvm")
        assert native.is_read_only(native.BPFFS)
        start("kvm")
        assert in_order("kvm")


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class TestFullBpffs:
    """A bpffs has no size: "full" is that the kernel has no memory for an inode, or that an LSM says no."""

    @pytest.fixture
    def fill(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], pytest.MonkeyPatch]:
        """Return a function that leaves no room for a part, nor for any pin after it."""
        pin = libbpf.pin
        seen = set()

        def fill_at(part: str) -> pytest.MonkeyPatch:
            def pin_while_there_is_room(fd: int, path: Path) -> None:
                seen.add(path.name)
                if f"new-{part}" in seen:
                    full()
                pin(fd, path)

            monkeypatch.setattr(libbpf, "pin", pin_while_there_is_room)
            return monkeypatch

        return fill_at

    @pytest.mark.parametrize("part", state.PARTS)
    def test_a_first_start_leaves_nothing_behind(self, fill: Callable[[str], object], part: str) -> None:
        fill(part)
        with pytest.raises(Failure, match=r"cannot put the policy in force: .*No space left"):
            start("kvm")
        assert not state.PINS.exists()
        assert not native.RUN.exists()
        assert ways() == NATIVE[0]

    @pytest.mark.parametrize("part", ["grants", "witness", "grant", "decide"])
    def test_an_upgrade_is_not_laxer_and_start_mends_it(
        self, fill: Callable[[str], pytest.MonkeyPatch], part: str
    ) -> None:
        start("kvm")
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            state.LOADED.write_text("another object")
            room = fill(part)
            with pytest.raises((Failure, OSError), match="No space left"):
                start("enabled")
            assert ways() == NOTHING
            assert ways(KVM) == set(ALL)
            room.undo()
            start()
            assert in_order("kvm")
            assert go_on()[1:] == ["allowed"] * len(ALL)


class TestNoReferenceLeft:
    """What root may do on purpose, and nobody watches: the native knob alone decides then."""

    @staticmethod
    def unmount() -> None:
        native.unmount(native.BPFFS)

    @staticmethod
    def unpin() -> None:
        for part in state.PARTS:
            (state.PINS / part).unlink()

    @pytest.mark.parametrize("take_away", [unmount, unpin], ids=["bpffs unmounted", "all unpinned"])
    @pytest.mark.parametrize("mode", ["disabled", "kvm"])
    def test_is_named_and_start_mends_it(self, mode: str, take_away: Callable[[], None]) -> None:
        start(mode)
        take_away()
        # The kernel frees a program a while after its last reference.
        until(lambda: ways() == NATIVE[Mode(mode).native_value])
        assert names(*(f"{part} is not pinned (No such file or directory)" for part in state.PARTS))
        start(mode)
        assert in_order(mode)


def test_a_pin_that_is_of_something_else_is_named_and_mended() -> None:
    start("kvm")
    with state.pinned() as found:
        (state.PINS / "grant").unlink()
        libbpf.pin(found.fds["counts"], state.PINS / "grant")
    assert "problem: grant is not a link of ours" in uffdguard("status").out
    assert ways() == NOTHING
    start()
    assert in_order("kvm")


class TestMemoryLimit:
    """The kernel charges maps and their entries to the control group in which start ran."""

    GROUP = Path("/sys/fs/cgroup/start")

    @pytest.fixture(autouse=True)
    def group(self) -> Iterator[None]:
        (self.GROUP.parent / "cgroup.subtree_control").write_text("+memory")
        self.GROUP.mkdir()
        yield
        guard.stop()
        self.GROUP.rmdir()

    def do_there(self, job: Callable[[], object]) -> bool:
        """Do JOB in a process in the control group; tell whether it went well."""

        def do_in_group() -> None:
            (self.GROUP / "cgroup.procs").write_text(str(os.getpid()))
            job()

        return os.waitpid(forked(do_in_group), 0)[1] == 0

    def test_of_too_little_for_the_maps_is_told_and_leaves_nothing_behind(self, variant: Callable[..., None]) -> None:
        def start_fails() -> None:
            with pytest.raises(Failure, match=r"Cannot allocate memory; .* the memory limit of the control group"):
                start("kvm")

        variant("__uint(max_entries, EVENTS);", "__uint(max_entries, EVENTS << 12);")  # 1 GiB
        (self.GROUP / "memory.max").write_text("32M")
        assert self.do_there(start_fails)
        assert not state.PINS.exists()
        assert not native.RUN.exists()
        assert ways() == NATIVE[0]

    def test_of_too_little_for_a_grant_is_counted_and_the_opener_is_refused(self) -> None:
        assert self.do_there(lambda: start("kvm"))
        with contextlib.ExitStack() as openers:
            assert openers.enter_context(opener()) == "allowed"
            # What the kernel has charged ahead it gives back for this limit; for the other it would look for a victim.
            (self.GROUP / "memory.high").write_text("0")

            def opened_without_a_byte_to_spare() -> str:
                (self.GROUP / "memory.max").write_text((self.GROUP / "memory.current").read_text())
                return openers.enter_context(opener())

            if features.hides_grants():
                # Before 6.2 a grant is an atomic allocation, which goes beyond the limit: try_charge_memcg().
                assert {opened_without_a_byte_to_spare() for _ in range(100)} == {"allowed"}
                assert (state.status().grants, state.status().lost) == (101, 0)
                return
            number = next(n for n in range(300) if opened_without_a_byte_to_spare() == "EPERM")
            (self.GROUP / "memory.high").write_text("max")
            assert (state.status().grants, state.status().lost) == (number + 1, 1)
            (self.GROUP / "memory.max").write_text("max")
            until(lambda: ways(KVM) == set(ALL))


@contextlib.contextmanager
def opener() -> Iterator[str]:
    """What a process that has opened /dev/kvm is answered; it lives on meanwhile."""
    theirs, ours = socket.socketpair()

    def open_and_ask() -> None:
        ours.close()
        os.setresuid(USER, USER, USER)
        assert probe.open_kvm() == 0
        theirs.send(bytes([probe.syscall()]))
        theirs.recv(1)

    with ours:
        pid = forked(open_and_ask)
        theirs.close()
        yield probe.word(ours.recv(1)[0])
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class TestFullRun:
    """/run has no room for one more byte."""

    @staticmethod
    @contextlib.contextmanager
    def full() -> Iterator[None]:
        used = os.statvfs("/run")
        size = (used.f_blocks - used.f_bfree) * used.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={size}", "/run"], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", f"remount,size={used.f_blocks * used.f_frsize}", "/run"], check=True)

    def test_a_first_start_leaves_nothing_behind(self) -> None:
        with self.full(), pytest.raises(Failure, match="cannot write /run/uffdguard/native: No space left on device"):
            start("kvm")
        assert not native.RUN.exists()
        assert not state.PINS.exists()
        assert ways() == NATIVE[0]

    def test_an_upgrade_leaves_the_older_policy_in_force(self) -> None:
        start("kvm")
        state.LOADED.write_text("another object")
        with self.full():
            with pytest.raises(Failure, match="cannot write /run/uffdguard/object: No space left on device"):
                start("enabled")
            assert in_order("kvm")
        start()
        assert in_order("kvm")

    def test_does_not_stop_a_change_nor_stop_but_a_server_which_says_so(self) -> None:
        start("disabled")
        with self.full():
            assert os.waitpid(forked(knob.run), 0)[1] != 0
            assert native.FILE.read_text() == "0\n"
            guard.set_mode(Mode.KVM)
            assert in_order("kvm")
            assert guard.stop()
            assert ways() == NATIVE[0]


@pytest.mark.parametrize(("mode", "value"), [("disabled", 1), ("kvm", 0)])
def test_a_native_knob_that_somebody_else_writes_while_it_is_served_is_named_and_mended(
    mode: str, value: int, serving: Callable[[str], int]
) -> None:
    serving(mode)
    force_knob(value)
    why = "the net below the policy is open" if value else "processes that the mode allows are refused"
    assert names(f"the native knob is {value} and not {1 - value}: {why}")
    assert ways() == NOTHING
    start()
    assert in_order(mode)


def test_the_directory_of_the_lock_is_removed_and_the_server_which_cannot_lock_closes_the_knob(
    serving: Callable[[str], int],
) -> None:
    pid = serving("kvm")
    subprocess.run(["rm", "-r", native.RUN], check=True)
    assert os.waitpid(pid, 0)[1] != 0
    assert native.FILE.read_text() == "0\n"
    assert ways() == NOTHING
    assert state.status().problems
    start()
    assert in_order("kvm")


class TestDevKvm:
    """The kernel goes by the number of the device, and so does the policy, not by the path."""

    @pytest.fixture(autouse=True)
    def mode_kvm(self) -> Iterator[None]:
        start("kvm")
        self.aside = native.DEV_KVM.with_name("kvm-aside")
        native.DEV_KVM.rename(self.aside)
        yield
        self.aside.rename(native.DEV_KVM)
        assert state.status().problems == []

    def test_absent_grants_nobody_and_is_named(self) -> None:
        opened, *answers = actor(KVM, *ALL)
        assert opened == "ENOENT"
        assert answers == ["EPERM"] * len(ALL)
        assert names("/dev/kvm: No such file or directory: it grants nobody")
        assert uffdguard("doctor").status == 0

    def test_another_device_in_its_place_grants_nobody_and_is_named(self) -> None:
        make_node(native.DEV_KVM, 1, 3)
        try:
            opened, *answers = actor(KVM, *ALL)
            assert opened == "allowed"
            assert answers == ["EPERM"] * len(ALL)
            assert names("/dev/kvm is not the character device 10:232: it grants nobody")
            rows = {row["name"]: row for row in json.loads(uffdguard("doctor", "--json").out)["rows"]}
            assert (rows["KVM"]["state"], rows["KVM"]["fact"]) == (
                "warning",
                "/dev/kvm is not the character device 10:232: it grants nobody",
            )
        finally:
            native.DEV_KVM.unlink()

    def test_made_elsewhere_grants(self) -> None:
        node = native.DEV_KVM.with_name("elsewhere")
        make_node(node, 10, 232)
        try:
            assert ways(f"open:{node}") == set(ALL)
        finally:
            node.unlink()

    def test_mounted_elsewhere_grants(self) -> None:
        place = Path("/run/kvm-bound")
        place.touch()
        subprocess.run(["mount", "--bind", self.aside, place], check=True)
        try:
            assert ways(f"open:{place}") == set(ALL)
        finally:
            native.unmount(place)
            place.unlink()

    def test_with_other_permissions_grants_who_may_open_it(self) -> None:
        self.aside.chmod(0o600)
        opened, *answers = actor(f"open:{self.aside}", *ALL)
        assert opened == "EACCES"
        assert answers == ["EPERM"] * len(ALL)
        self.aside.chmod(0o666)
        assert ways(f"open:{self.aside}") == set(ALL)


def make_node(path: Path, major: int, minor: int) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(major, minor))
    path.chmod(0o666)


@pytest.fixture
def clock_set_back() -> Iterator[Callable[[], None]]:
    """Return a function that sets the clock back by a year; put right at the end."""
    right = time.clock_gettime(time.CLOCK_REALTIME) - time.monotonic()
    yield lambda: time.clock_settime(time.CLOCK_REALTIME, time.time() - 365 * 86400)
    time.clock_settime(time.CLOCK_REALTIME, right + time.monotonic())


def test_a_clock_that_is_set_back_changes_nothing(
    serving: Callable[[str], int], clock_set_back: Callable[[], None]
) -> None:
    serving("disabled")
    clock_set_back()
    since = datetime.strptime(state.status().since or "", "%Y-%m-%dT%H:%M:%S%z").timestamp()
    assert 0 <= time.time() - since < 3600  # by the clock as it is now
    native.FILE.write_text("kvm")
    (state.PINS / "counts").unlink()
    until(lambda: not state.status().problems)  # the server watches on
    assert in_order("kvm")
    assert start() is False
    assert guard.stop()
    assert ways() == NATIVE[0]
