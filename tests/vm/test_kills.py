"""Never laxer than asked: who serves the interface file, killed at each step of its life and in each write."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from typing import TYPE_CHECKING

import pytest
from inside import Killer, actor, forked, hold_maps_only, until, watched

from uffdguard import guard, knob, proof, state
from uffdguard.kernel import libbpf, native
from uffdguard.manager import Manager
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM = "open:/dev/kvm"
ALL = ("syscall", "int80", "device", "syscall:1", "device-int80:1")
LINE = "disabled enabled [kvm]\n"
CHANGE = ("ask strictly", "set the policy", "ask", "set the native knob", "ask by system call")


@pytest.fixture
def mark() -> mmap.mmap:
    """The byte by which a test arms the kill, and sees that it was."""
    return mmap.mmap(-1, 1)


@pytest.fixture
def served(mark: mmap.mmap) -> Iterator[Callable[..., int]]:
    """Return a function that has the file served by processes of which one will be killed at STEP."""
    pids = []

    def serve(step: str, how: Callable[[], None] = knob.run) -> int:
        def doomed() -> None:
            with watched(Killer(step, mark)):
                how()

        pids.append(forked(doomed))
        return pids[-1]

    yield serve
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def reads(line: str) -> bool:
    with contextlib.suppress(OSError):
        return native.FILE.read_text() == line
    return False


def strangers_are_refused() -> bool:
    return actor(*ALL) == ["EPERM"] * len(ALL)


def mended(mode: str) -> bool:
    """Run start; tell whether all is well then."""
    guard.start(Policy(), None)
    assert (state.status().mode, state.status().problems) == (mode, [])
    return strangers_are_refused() and actor(KVM, *ALL)[1:] == ["allowed"] * len(ALL)


def remove_a_pin(pid: int) -> None:
    (state.PINS / "counts").unlink()


def take_the_policy_away(pid: int) -> None:
    for link in state.LINKS:
        (state.PINS / link).unlink()


def close_the_native_knob(pid: int) -> None:
    """Do as others do who see the policy not answer."""
    fd = libbpf.get(state.PINS / "enforcement")
    with native.Knob() as native_knob:
        proof.set_knob({"enforcement": fd}, 0, native_knob)
    os.close(fd)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)


def nothing(pid: int) -> None:
    pass


#: Each step of a server that its service manager does not mount: what makes it be taken once the file is served
#: (None: it is taken before), and what status says of the kill.
STEPS: dict[str, tuple[Callable[[int], None] | None, str | None]] = {
    "show a procfs": (None, None),
    "cover the native file": (None, "a procfs of ours is visible though the native file is not covered"),
    "claim the file": (None, None),
    "watch": (nothing, None),
    "switch to the mode that is set": (
        close_the_native_knob,
        "the native knob is 0 and not 1: processes that the mode allows are refused",
    ),
    "await the mount": (None, None),
    "serve": (None, None),
    "pin again": (remove_a_pin, "counts is not pinned (No such file or directory)"),
    "close the native knob": (take_the_policy_away, "decide is not pinned (No such file or directory)"),
    "end": (end, None),
    "uncover the native file": (end, "the interface file does not answer: its server has died"),
}
#: Those of one that is.
MANAGED = ("bind the socket", "give the descriptor away", "keep the connection")


def test_no_step_is_left_out() -> None:
    assert (*MANAGED, *STEPS) == knob.STEPS


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_leaves_nothing_laxer_is_named_and_mended(
    step: str,
    in_force: Callable[..., None],
    served: Callable[..., int],
    mark: mmap.mmap,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provoke, named = STEPS[step]
    if step == "close the native knob":
        monkeypatch.setattr(knob.Server, "hold", hold_maps_only)
    mark[0] = 0 if provoke else Killer.ARMED
    in_force("kvm")
    pid = served(step)
    if provoke:
        until(lambda: reads(LINE))
        mark[0] = Killer.ARMED
        provoke(pid)
    until(lambda: mark[0] == Killer.HIT)
    os.waitpid(pid, 0)
    # Where nothing decides any more, and who would close the native knob was killed, it is open: only root gets there.
    assert strangers_are_refused() is (step != "close the native knob")
    assert (named in state.status().problems) if named else (state.status().problems == [])
    assert mended("kvm")
    if state.server() is None:
        monkeypatch.undo()
        pid = served("none")
        until(lambda: reads(LINE))
        end(pid)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("step", MANAGED)
def test_so_does_a_kill_of_a_server_that_its_service_manager_mounts(
    step: str, in_force: Callable[..., None], served: Callable[..., int], mark: mmap.mmap
) -> None:
    mark[0] = Killer.ARMED
    in_force("kvm")
    pid = served(step, lambda: knob.serve_under_manager(Manager()))
    if step != "bind the socket":
        until(knob.SOCKET.exists)
        mounter = forked(knob.mount)
        assert os.waitpid(mounter, 0)[1] != 0
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert mark[0] == Killer.HIT
    assert strangers_are_refused()
    assert state.status().problems == []
    assert mended("kvm")


@pytest.mark.parametrize("step", CHANGE)
def test_a_kill_in_a_write_is_as_lax_as_the_laxer_and_is_mended(
    step: str, in_force: Callable[..., None], served: Callable[..., int], mark: mmap.mmap
) -> None:
    in_force("disabled")
    pid = served(step)
    until(lambda: reads("[disabled] enabled kvm\n"))
    mark[0] = Killer.ARMED
    with pytest.raises(OSError, match=r"not connected|abort"):
        native.FILE.write_text("kvm")
    assert mark[0] == Killer.HIT
    os.waitpid(pid, 0)
    assert strangers_are_refused()
    after = state.status()
    # The policy is there before the native knob follows.
    assert (after.mode, after.drift) == {
        "ask strictly": (Mode.DISABLED, False),
        "set the policy": (Mode.DISABLED, False),
        "ask": (Mode.KVM, True),
        "set the native knob": (Mode.KVM, True),
        "ask by system call": (Mode.KVM, False),
    }[step]
    guard.start(Policy(), Mode.KVM)
    assert mended("kvm")
