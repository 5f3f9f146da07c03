"""The interface file: ``/proc/sys/vm/unprivileged_userfaultfd`` as the 2019 patch had it, served by FUSE.

The server has no capability. Who may mount gets its /dev/fuse, by inheritance (:func:`run`) or by a socket
(:func:`mount`, for a service manager), and covers the native file. The server holds references to all that is
pinned, so that pins removed by accident change nothing, and once a second sees the policy refuse.
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
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uffdguard import guard, state
from uffdguard.errors import Failure, one_line
from uffdguard.kernel import libbpf, native
from uffdguard.policy import Mode, Policy, Reason, interface_line
from uffdguard.proof import Asker, Silence
from uffdguard.steps import Steps, log

if TYPE_CHECKING:
    from collections.abc import Callable

#: The steps of who mounts the file and of its server, besides those of a switch of the mode and of stop.
STEPS = Steps(
    (
        "bind the socket",
        "give the descriptor away",
        "cover the native file",
        "claim the file",
        "switch to the mode that is set",
        "await the mount",
        "serve",
        "watch",
        "pin again",
        "close the native knob",
        "end",
        "uncover the native file",
    )
)
step = STEPS.take

LIBRARY = "libfuse3.so.3"
DEV_FUSE = Path("/dev/fuse")
#: Where a server that waits to be mounted gives away its /dev/fuse.
SOCKET = native.RUN / "fuse"
#: Seconds that it waits.
PATIENCE = 30.0
#: Bytes; no word with blanks around it has reason to be longer.
LONGEST = 64
#: Seconds between two looks whether the policy still refuses.
INTERVAL = 1.0
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NUMBERS = {"0": Mode.DISABLED, "1": Mode.ENABLED}
CAP_SYS_ADMIN = 21


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
    fuse = os.open(DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    # Ignored by our parent, it would keep us from seeing how the server ends.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            serve(fuse)
        except (Failure, OSError) as error:
            log.error("%s", error)
        finally:
            os._exit(status)
    try:
        step("cover the native file")
        native.uncover()
        native.cover(fuse)
        os.close(fuse)
        for number in ENDS:
            signal.signal(number, lambda number, frame: os.kill(pid, signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        step("uncover the native file")
        native.uncover()
    if status > 0:
        sys.exit(status)  # it has said why
    if status:
        raise Failure("the server of the interface file has died", "the native file is seen again; run it anew")


def mount() -> None:
    """Cover the native file by the one of the server that waits for it.

    :raises Failure: none does.
    """
    native.need_root("covers a file of /proc")
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(PATIENCE)
            server.connect(str(SOCKET))
            _, fds, _, _ = socket.recv_fds(server, 1, 1)
    except (FileNotFoundError, ConnectionError, TimeoutError):
        fds = []
    if not fds:
        raise Failure("no server waits to be mounted", "run uffdguard knob serve")
    try:
        step("cover the native file")
        native.uncover()
        native.cover(fds[0])
    finally:
        os.close(fds[0])
    native.FILE.read_bytes()


def main() -> NoReturn:
    """Be ``uffdguard knob serve``, without the command line, which would stay in memory."""
    logging.basicConfig(level=logging.WARNING, format="uffdguard knob: %(message)s")
    try:
        serve_under_manager()
    except (Failure, OSError) as error:
        print(f"uffdguard: {error}", file=sys.stderr)
        sys.exit(1)


def serve_under_manager() -> NoReturn:
    """Serve the file, mounted by :func:`mount` once $NOTIFY_SOCKET was told that it can be, sd_notify(3).

    :raises Failure: no policy is in force, another server runs, or nobody mounted it.
    """
    _require()
    SOCKET.unlink(missing_ok=True)
    step("bind the socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(SOCKET))
        server.listen()
        server.settimeout(PATIENCE)
        if address := os.environ.get("NOTIFY_SOCKET"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.connect(f"\0{address[1:]}" if address.startswith("@") else address)
                manager.send(b"READY=1")
        fuse = os.open(DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
        try:
            with server.accept()[0] as who_mounts:
                step("give the descriptor away")
                socket.send_fds(who_mounts, [b"."], [fuse])
        except TimeoutError:
            raise Failure("nobody has mounted the interface file", "run uffdguard knob mount") from None
        finally:
            SOCKET.unlink(missing_ok=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    serve(fuse)


def claim(lock: int) -> None:
    """Lock the server's file for as long as this descriptor is open.

    :raises Failure: another server has it.
    """
    end = time.monotonic() + 1
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # Who looks whether a server runs has a lock on it, too, for an instant: state.server().
            if time.monotonic() > end:
                raise Failure("the interface file is being served already", "see uffdguard status") from None
        time.sleep(0.01)


def serve(fuse: int) -> NoReturn:
    """Serve what is mounted, or soon will be, by the descriptor FUSE of /dev/fuse, without any privilege but root's.

    ENDS are blocked. Ends the process.

    :raises Failure: the policy is not in force any more, or another server runs.
    """
    with Asker() as asker:
        native.drop_capabilities()
        # A bpffs may be mounted anew below /sys/fs.
        native.restrict_writes(native.RUN, native.BPFFS.parent)
        with guard.locked():
            # Under the lock, so that stop either sees this server or leaves nothing for it to hold.
            if not state.LOADED.exists():
                raise state.not_in_force()
            step("claim the file")
            lock = os.open(state.SERVER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            claim(lock)
            os.truncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            server = Server(asker)
            if missing := [part for part in state.PARTS if part not in server.held]:
                raise Failure(f"the policy is damaged: not pinned: {', '.join(missing)}", "run uffdguard start")
            # A server before this one may have closed the native knob.
            step("switch to the mode that is set")
            guard.switch(server.held, server.current().mode, asker)
        step("await the mount")
        end = time.monotonic() + PATIENCE
        while not _is_mounted(fuse):
            server.pause(0.02)
            if time.monotonic() > end:
                raise Failure("nobody has mounted the interface file", "run it anew")
        step("serve")
        if server.current().audit:
            log.warning("audit: refusals are counted and told, and let pass")
        threading.Thread(target=server.watch, daemon=True).start()
        server.loop(fuse)
        server.end(0)


class Server:
    """The operations of the file system, whose root is the file; and the watch over the policy."""

    #: What mfusepy asks of its operations: times in ns.
    use_ns = True

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.words = native.modes()
        #: Stays when our procfs is unmounted.
        self.native_knob = os.open(native.PROC / native.KNOB, os.O_WRONLY | os.O_CLOEXEC)
        self.held: dict[str, int] = {}
        #: Has who uses or changes ``held``, besides guard's lock, which comes first, where something is changed.
        self.holding = threading.RLock()
        self.hold()

    def hold(self) -> None:
        """Take references to what is pinned now; pin again what is not pinned any more."""
        with self.holding:
            for part in state.PARTS:
                try:
                    fd = libbpf.get(state.PINS / part)
                except OSError:
                    if part in self.held:
                        self.pin_again(part)
                    continue
                if part in self.held:
                    os.close(self.held[part])
                self.held[part] = fd

    def pin_again(self, part: str) -> None:
        """Pin what we hold where nothing is pinned; without a bpffs there it stays undone."""
        step("pin again")
        with contextlib.suppress(OSError):
            state.PINS.mkdir(mode=0o700, exist_ok=True)
            libbpf.pin(self.held[part], state.PINS / part)
            log.warning("%s was not pinned any more: pinned again", part)

    def pause(self, seconds: float) -> None:
        """Wait; end when told to. libfuse, which waits in the main thread, need not know."""
        if signal.sigtimedwait(ENDS, seconds):
            self.end(0)

    def end(self, status: int) -> NoReturn:
        """End the process, but not in the middle of a change."""
        with self.holding:
            step("end")
            os._exit(status)

    def watch(self) -> None:
        """See the policy refuse, again and again; close the native knob and end when it does not."""
        while True:
            self.pause(INTERVAL)
            step("watch")
            try:
                # Whoever changes something sees the policy answer, too: nothing is missed by skipping a turn.
                with contextlib.suppress(BlockingIOError), guard.locked(wait=False), self.holding:
                    self.hold()
                    self.ask()
            except Exception as error:  # also that the lock cannot be had: nobody would watch any more
                step("close the native knob")
                with contextlib.suppress(OSError):
                    os.write(self.native_knob, b"0\n")
                log.critical("the policy does not refuse any more, and the native knob is closed: %s", error)
                self.end(1)

    def ask(self) -> None:
        """See the policy refuse, by a new trial child where the old one has died.

        :raises Failure: it does not.
        """
        try:
            self.asker.ask(self.held["witness"], Reason.DISABLED, strict=True)
        except Silence:
            self.asker.restart()
            self.asker.ask(self.held["witness"], Reason.DISABLED, strict=True)

    def current(self) -> Policy:
        """Return the policy that is set.

        :raises OSError: EIO when it cannot be read.
        """
        with self.holding:
            policy = state.read_policy(self.held["policy"])
        if policy is None:
            raise OSError(errno.EIO, "the policy cannot be read")
        return policy

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
        return f"{interface_line(self.current().mode, self.words)}\n".encode()[offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, info: Any) -> int:
        """Switch the mode before write(2) returns; EINVAL for what is none of the words."""
        _, _, pid = self.caller()
        who = one_line(f"pid {pid} ({_status(pid, 'Name')})")
        # A sandbox without CAP_SYS_ADMIN has its /proc/sys read-only, but what is mounted later comes in as it is.
        if not int(_status(pid, "CapEff") or "0", 16) >> CAP_SYS_ADMIN & 1:
            log.warning("refused to write: %s has no CAP_SYS_ADMIN", who)
            raise OSError(errno.EPERM, "no CAP_SYS_ADMIN")
        number = data.strip(b" \t\n") in (b"0", b"1") and len(data) <= LONGEST
        if number and not offset and self.current().audit:
            self.change(lambda: guard.set_found(self.held, int(data), self.asker))
            return len(data)
        try:
            if offset:
                raise ValueError("not at the start")
            mode = parse(data, self.words, numeric=self.accepts_numbers())
        except ValueError:
            log.warning("refused to write %r, which is none of %s: %s", data[:LONGEST], ", ".join(self.words), who)
            raise OSError(errno.EINVAL, "none of the words") from None
        self.change(lambda: guard.switch(self.held, mode, self.asker))
        if self.current().audit:
            log.warning("mode %s in audit: refusals are counted and told, and let pass: %s", mode, who)
        return len(data)

    def change(self, how: Callable[[], object]) -> None:
        """Change something of what is pinned now; EIO when that fails."""
        try:
            with guard.locked(), self.holding:
                self.hold()
                how()
        except Failure as error:
            log.error("%s", error)
            raise OSError(errno.EIO, str(error)) from error

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
        raise state.not_in_force()
    if state.server():
        raise Failure("the interface file is being served already", "see uffdguard status")
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


def _status(pid: int, field: str) -> str:
    """Return a field of /proc/PID/status, proc(5), or "" when the process has gone."""
    try:
        status = (native.PROC / str(pid) / "status").read_bytes().decode(errors="backslashreplace")
    except OSError:
        return ""
    # Not by splitlines(): of a name the kernel escapes the newline only, and not what else ends a line for Python.
    return next(line for line in status.split("\n") if line.startswith(f"{field}:\t")).split("\t", 1)[1]
