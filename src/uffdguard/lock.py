"""One at a time: whoever changes the policy holds a lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard.errors import Failure, one_line
from uffdguard.kernel import native

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds that one holder may take.
PATIENCE = 60.0
#: Seconds between two looks at who has the lock.
INTERVAL = 1.0
#: Seconds between two tries where no thread can wait.
PAUSE = 0.05

#: The thread that waits for the lock. Nothing ends it before it has the lock, so that no second one is made.
_waiter: threading.Thread | None = None


@contextlib.contextmanager
def locked(*, wait: bool = True) -> Iterator[None]:
    """Be the only one who changes anything: an flock(2) on /run/uffdguard, which is made if it is missing.

    :raises BlockingIOError: another one is, and WAIT is not wanted.
    :raises Failure: another one is, and does not come to an end.
    """
    fd = _lock(wait)
    try:
        yield
    finally:
        # By the holder alone and before the lock is released: who removes a directory that another has locked lets
        # a third make and lock a new one.
        with contextlib.suppress(OSError):
            native.RUN.rmdir()
        os.close(fd)


def _lock(wait: bool) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            native.RUN.mkdir(mode=0)
        try:
            fd = os.open(native.RUN, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            # Before the lock, so that nobody else can come to hold it; its holder may be about to do the same.
            native.own(fd)
            _flock(fd, wait)
            # Its holder may have removed the directory while we waited.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), native.RUN.lstat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _flock(fd: int, wait: bool) -> None:
    """Lock FD, flock(2).

    The call has no limit of time. Where it blocks, a thread waits in it: one that polls would come to its turn late.

    :raises BlockingIOError: another one has the lock, and WAIT is not wanted.
    :raises Failure: another one has it, and does not come to an end.
    """
    if _has(fd):
        return
    if not wait:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    waiter = _begin_to_wait(fd)
    seen, since = None, time.monotonic()
    while True:
        if waiter and waiter.is_alive():
            waiter.join(INTERVAL)
        else:
            time.sleep(PAUSE)
        if not (waiter and waiter.is_alive()) and _has(fd):
            return
        holder = _holder(fd)
        if holder != seen:
            seen, since = holder, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise Failure(
                f"another process ({_name(holder)}) is changing the policy and does not come to an end",
                "see what keeps it, or end it, and try again",
            )


def _has(fd: int) -> bool:
    """Tell whether FD has the lock, which it takes where that is free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _begin_to_wait(fd: int) -> threading.Thread | None:
    """Return a thread that ends when FD has the lock; None where one waits already, or where there can be none.

    A caller that gives up leaves it behind. The lock that it then gets ends at once, because the descriptor is closed.
    """
    global _waiter
    if _waiter and _waiter.is_alive():
        return None
    waiter = threading.Thread(target=fcntl.flock, args=(fd, fcntl.LOCK_EX), daemon=True)
    try:
        waiter.start()
    except RuntimeError:  # no thread can be had, for example over TasksMax=
        return None
    _waiter = waiter
    return waiter


def _holder(fd: int) -> int | None:
    """Return the pid of who has an flock(2) on the file, proc_locks(5); None where it cannot be seen from here."""
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        # Of a waiter the second field is "->".
        _, kind, _, _, pid, where, *_ = line.split()
        if (kind, where) == ("FLOCK", file):
            return int(pid)
    return None


def _name(pid: int | None) -> str:
    if pid is None:
        return "of another pid namespace"
    try:
        return f"pid {pid}, {one_line(Path(f'/proc/{pid}/comm').read_text(errors='backslashreplace').rstrip())}"
    except OSError:
        return f"pid {pid}, which has ended and left the lock to another"
