"""The interface file: ``/proc/sys/vm/unprivileged_userfaultfd`` as the 2019 patch had it, served by FUSE.

The server has no capability. It opens /dev/fuse and waits; who may mount, :func:`run` or a service manager's
post-start step, takes that descriptor from it and covers the native file. The server holds references to all that
is pinned, so that pins removed by accident change nothing, and once a second sees the policy refuse.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffdguard import guard, state
from uffdguard.errors import Failure
from uffdguard.kernel import libbpf, native
from uffdguard.policy import Mode, Reason, interface_line
from uffdguard.proof import Asker

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("uffdguard")

LIBRARY = "libfuse3.so.3"
DEV_FUSE = Path("/dev/fuse")
#: Bytes; no word with blanks around it has reason to be longer.
LONGEST = 64
#: Seconds between two looks whether the policy still refuses.
INTERVAL = 1.0
ENDS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
NUMBERS = {"0": Mode.DISABLED, "1": Mode.ENABLED}


def parse(data: bytes, words: tuple[Mode, ...], *, numeric: bool = False) -> Mode:
    """Return the mode that a write of DATA asks for.

    :param words: the modes that exist.
    :param numeric: whether mainline's ``0`` and ``1`` are words too.
    :raises ValueError: it is none of the words.
    """
    text = data.decode("ascii").strip(" \t\n") if len(data) <= LONGEST else ""
    mode = NUMBERS[text] if numeric and text in NUMBERS else Mode(text)
    if mode not in words:
        raise ValueError(text)
    return mode


def run() -> None:
    """Serve the file until the server ends, and uncover the native one then. For who has no service manager.

    :raises Failure: no policy is in force, or it cannot be served.
    """
    _require()
    ready, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(ready)
            serve(lambda: os.close(theirs) if os.write(theirs, b".") else None)
            status = 0
        except Failure as error:
            log.error("%s", error)
        finally:
            os._exit(status)
    os.close(theirs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os.kill(pid, signal.SIGTERM))
    status = 1
    if os.read(ready, 1):
        try:
            mount(pid)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            native.uncover()
    else:
        os.waitpid(pid, 0)
        raise SystemExit(1)  # the child has said why
    if status:
        raise Failure("the server of the interface file has died", "the native file is seen again; run it anew")


def mount(pid: int) -> None:
    """Cover the native file by the one that the server PID serves, pidfd_getfd(2).

    :raises Failure: PID has no /dev/fuse open.
    """
    native.need_root("covers a file of /proc")
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # what the process has closed meanwhile
            if entry.readlink() == DEV_FUSE:
                fd = native.take_descriptor(pid, int(entry.name))
                break
    else:
        raise Failure(f"pid {pid} does not serve the interface file", "it must be a running uffdguard knob serve")
    try:
        native.uncover()
        native.cover(fd)
    finally:
        os.close(fd)
    native.FILE.read_bytes()


def serve(ready: Callable[[], None]) -> None:
    """Serve the file to whoever mounts it, without any privilege but to be root's.

    :param ready: is called when it can be mounted.
    :raises Failure: no policy is in force, or another server runs.
    """
    _require()
    with Asker() as asker:
        lock = os.open(state.SERVER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure("the interface file is being served already", "see uffdguard status") from None
        os.truncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())
        server = Server(asker)
        fuse = os.open(DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
        native.drop_capabilities()
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        ready()
        while not _is_mounted(fuse):
            pause(0.02)
        threading.Thread(target=server.watch, daemon=True).start()
        server.loop(fuse)


def notify() -> None:
    """Tell the service manager that the server is ready, sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        manager.send(b"READY=1")


def pause(seconds: float) -> None:
    """Wait; end the process when it is told to, which libfuse's loop in another thread need not know."""
    if signal.sigtimedwait(ENDS, seconds):
        os._exit(0)


class Server:
    """The operations of the file system, whose root is the file; and the watch over the policy."""

    #: What mfusepy asks of its operations: times in ns.
    use_ns = True

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.words = native.modes()
        self.held: dict[str, int] = {}
        self.hold()

    def hold(self) -> None:
        """Take references to what is pinned now; pin again what is not pinned any more."""
        for part in state.PARTS:
            try:
                fd = libbpf.get(state.PINS / part)
            except OSError:
                if part in self.held:
                    with contextlib.suppress(OSError):
                        state.PINS.mkdir(mode=0o700, exist_ok=True)
                        libbpf.pin(self.held[part], state.PINS / part)
                        log.warning("%s was not pinned any more: pinned again", part)
                continue
            if part in self.held:
                os.close(self.held[part])
            self.held[part] = fd

    def watch(self) -> None:
        """See the policy refuse, again and again; close the native knob and end when it does not."""
        while True:
            pause(INTERVAL)
            try:
                with guard.locked():
                    self.hold()
                    self.asker.ask(self.held["witness"], Reason.DISABLED, strict=True)
            except Exception as error:
                with contextlib.suppress(OSError):
                    native.write_knob(0)
                log.critical("the policy does not refuse any more, and the native knob is closed: %s", error)
                os._exit(1)

    def loop(self, fuse: int) -> None:
        """Answer what comes by the descriptor FUSE until the file is unmounted."""
        # Otherwise mfusepy would run ldconfig and take libfuse 2 where both are installed.
        os.environ["FUSE_LIBRARY_PATH"] = LIBRARY
        import mfusepy

        self.caller: Callable[[], tuple[int, int, int]] = mfusepy.fuse_get_context
        mfusepy.FUSE(self, f"/dev/fd/{fuse}", raw_fi=True, foreground=True, nothreads=True)

    def getattr(self, path: str, info: Any = None) -> dict[str, int]:
        """The attributes of a file of /proc/sys that root may write."""
        return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": 0, "st_uid": 0, "st_gid": 0}

    def open(self, path: str, info: Any) -> int:
        """Each read and write comes here, as to a file of /proc: what is read is always the truth."""
        info.direct_io = True
        return 0

    def truncate(self, path: str, length: int, info: Any = None) -> int:
        """What a shell does before it writes."""
        return 0

    def read(self, path: str, size: int, offset: int, info: Any) -> bytes:
        """Return the line that lists the modes, the current one in brackets."""
        word = state.read_policy(self.held["policy"])
        if word is None:
            raise OSError(errno.EIO, "the policy cannot be read")
        return f"{interface_line(word.mode, self.words)}\n".encode()[offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, info: Any) -> int:
        """Switch the mode before write(2) returns; EINVAL for what is none of the words."""
        try:
            if offset:
                raise ValueError("not at the start")
            mode = parse(data, self.words, numeric=self.accepts_numbers())
        except ValueError:
            _, _, pid = self.caller()
            log.warning(
                "refused to write %r, which is none of %s: pid %d (%s)",
                data[:LONGEST],
                ", ".join(self.words),
                pid,
                _name(pid),
            )
            raise OSError(errno.EINVAL, "none of the words") from None
        try:
            with guard.locked():
                self.hold()
                guard.switch(self.held, mode, self.asker)
        except Failure as error:
            log.error("%s", error)
            raise OSError(errno.EIO, str(error)) from error
        return len(data)

    @staticmethod
    def accepts_numbers() -> bool:
        """Whether the configuration has ``numeric = "accept"``, now."""
        from uffdguard import config

        try:
            return config.load().numeric
        except Failure as error:
            log.warning("%s", error)
            return False


def _require() -> None:
    """Make sure that a policy is in force and that the file can be served.

    :raises Failure: it is not so.
    """
    import ctypes

    native.need_root("serves the interface file")
    if not state.LOADED.exists() or not native.PROC.is_mount():
        raise Failure("the policy is not in force", "run uffdguard start")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        raise Failure(f"{LIBRARY} is missing: it serves the interface file", "apt install libfuse3-3") from None
    if not DEV_FUSE.exists():
        raise Failure(f"{DEV_FUSE} is not there", "modprobe fuse; the kernel must have CONFIG_FUSE_FS")


def _is_mounted(fuse: int) -> bool:
    """Tell whether a descriptor of /dev/fuse belongs to a mount: only then a read of it is refused as too short."""
    try:
        os.read(fuse, 1)
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
