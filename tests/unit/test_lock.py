"""One holder at a time, and none for ever."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from uffdguard import lock
from uffdguard.errors import Failure
from uffdguard.kernel import native


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(native, "RUN", tmp_path / "run")
    monkeypatch.setattr(native, "own", lambda fd: os.fchmod(fd, 0o700))
    return native.RUN


def holder(seconds: float) -> int:
    """Return the pid of a process that has the lock for so long."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock.locked():
            os.write(write, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
    return pid


def test_it_leaves_nothing_behind(run: Path) -> None:
    with lock.locked():
        assert run.is_dir()
    assert not run.exists()


def test_who_waits_gets_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 30.0)
    pid = holder(0.2)
    with pytest.raises(BlockingIOError), lock.locked(wait=False):
        pass
    began = time.monotonic()
    with lock.locked():
        assert time.monotonic() - began < 10
    os.waitpid(pid, 0)


def test_a_holder_that_does_not_come_to_an_end_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    pid = holder(600)
    command = Path(f"/proc/{pid}/comm").read_text().strip()
    with pytest.raises(Failure) as failure, lock.locked():
        pass
    assert failure.value.what == (
        f"another process (pid {pid}, {command}) is changing the policy and does not come to an end"
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # The thread that waited has let go of it.
    with lock.locked():
        pass
    assert not run.exists()


def test_who_gives_up_again_and_again_leaves_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server that may have eight tasks ends with the seventh."""
    monkeypatch.setattr(lock, "INTERVAL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 0.02)
    before = threading.active_count()
    pid = holder(600)
    for _ in range(10):
        with pytest.raises(Failure, match=f"pid {pid}"), lock.locked():
            pass
    assert threading.active_count() <= before + 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with lock.locked():
        pass


def test_where_no_thread_can_be_had_it_is_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    pid = holder(0.2)
    with lock.locked():
        pass
    os.waitpid(pid, 0)
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    pid = holder(600)
    with pytest.raises(Failure, match=f"pid {pid}"), lock.locked():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_holder_that_leaves_it_to_another_process_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    run.mkdir()
    fd = os.open(run, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(Failure, match=f"pid {pid}, which has ended and left the lock to another"), lock.locked():
        pass
    os.close(fd)


def test_many_holders_in_turn_are_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 5.0)
    pids = []
    for _ in range(20):
        pids.append(os.fork())
        if pids[-1] == 0:
            for _ in range(5):
                with lock.locked():
                    os.close(os.open(run.with_name("inside"), os.O_CREAT | os.O_EXCL))
                    time.sleep(0.002)
                    run.with_name("inside").unlink()
            os._exit(0)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)
