"""The interface file: ``/proc/sys/vm/unprivileged_userfaultfd`` as the 2019 patch had it, served by FUSE.

The server has no capability. Whoever may mount gets its /dev/fuse, by inheritance (:func:`run`) or by a socket
(:func:`mount`, for a service manager), and covers the native file. The server holds references to all that is
pinned, so that pins removed by accident change nothing, and once a second sees the policy refuse.

A mount namespace that was made from this one has a copy of the cover. So that the copies outlive a server, a service
manager keeps a descriptor of the connection, and the next server goes on with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from uffdguard import fuse, guard, proof, state
from uffdguard.errors import Failure, one_line
from uffdguard.kernel import layout, libbpf, native
from uffdguard.kernel.native import Access
from uffdguard.lock import locked
from uffdguard.manager import Manager
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
        "keep the connection",
        "cover the native file",
        "claim the file",
        "watch",
        "switch to the mode that is set",
        "await the mount",
        "serve",
        "pin again",
        "close the native knob",
        "end",
        "uncover the native file",
    )
)
step = STEPS.take

#: Where a server that waits to be mounted gives away its /dev/fuse.
SOCKET = native.RUN / "fuse"
#: The name by which the service manager keeps the native knob.
NATIVE = "native"
#: Seconds that it waits.
PATIENCE = 30.0
#: Bytes; no word with blanks around it has reason to be longer.
LONGEST = 64
#: Seconds between two looks whether the policy still refuses.
INTERVAL = 1.0
#: Seconds without one, after which that is told.
BLIND = 60.0
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
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
    """Serve the file until the server ends, and uncover the native one then. For those without a service manager.

    :raises Failure: no policy is in force, or it cannot be served.
    """
    _require()
    connection = os.open(fuse.DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    # Ignored by our parent, it would keep us from seeing how the server ends.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            serve(connection, native.Knob())
        except (Failure, OSError) as error:
            log.error("%s", error)
        finally:
            os._exit(status)
    try:
        _cover(connection)
        os.close(connection)
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
    """Cover the native file by the one of the server that waits for it; see that the server answers.

    One that goes on with what an earlier server was mounted for needs no mount.

    :raises Failure: no server waits or serves, or it does not answer.
    """
    native.need_root("covers a file of /proc")
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(PATIENCE)
            server.connect(str(SOCKET))
            _, fds, _, _ = socket.recv_fds(server, 1, 1)
    except (FileNotFoundError, ConnectionError, TimeoutError):
        fds = []
    if not fds and not (state.server() and native.is_covered()):
        raise Failure("no server waits to be mounted", "run uffdguard knob serve")
    for connection in fds:
        try:
            _cover(connection)
        finally:
            os.close(connection)
    try:
        native.FILE.read_bytes()
    except OSError as error:
        native.uncover()
        raise Failure(f"the interface file does not answer: {error.strerror}", "run uffdguard knob serve") from error


def _cover(connection: int) -> None:
    """Cover the native file by what is served by a descriptor of /dev/fuse.

    :raises Failure: the kernel would name those who write by their numbers in another pid namespace than the policy.
    """
    if not native.in_initial("pid"):
        raise Failure("not in the initial pid namespace", "run it on the host itself")
    step("cover the native file")
    # Or a start may take what is half done for what a kill has left.
    with locked():
        native.uncover()
        native.cover(connection)


def main() -> NoReturn:
    """Be ``uffdguard knob serve``, without the command line, which would stay in memory."""
    logging.basicConfig(level=logging.WARNING, format="uffdguard knob: %(message)s")
    manager = Manager()
    try:
        serve_under_manager(manager)
    except (Failure, OSError) as error:
        # The next one would not begin either: nobody is to wait for an answer.
        manager.forget(*manager.kept)
        print(f"uffdguard: {error}", file=sys.stderr)
        sys.exit(1)


def serve_under_manager(manager: Manager) -> NoReturn:
    """Serve the file: what an earlier server was mounted for, or mounted by :func:`mount` once MANAGER is told.

    :raises Failure: no policy is in force, another server runs, or nobody mounted it.
    """
    if os.geteuid() == 0:
        native.join_owner()
    _require()
    SOCKET.unlink(missing_ok=True)
    native_knob = native.Knob(manager.kept.get(NATIVE))
    connection = manager.kept.get(_name_of_cover())
    if connection is None or not fuse.is_alive(connection):
        # What is kept is of a cover that is gone.
        manager.forget(*(name for name in manager.kept if name != NATIVE))
        connection = os.open(fuse.DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
        _give_away(connection, manager)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    serve(connection, native_knob, manager)


def _give_away(connection: int, manager: Manager) -> None:
    """Give a descriptor of /dev/fuse to whoever mounts it.

    :raises Failure: nobody comes.
    """
    step("bind the socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(SOCKET))
        server.listen()
        server.settimeout(PATIENCE)
        manager.ready()
        try:
            with server.accept()[0] as mounter:
                step("give the descriptor away")
                socket.send_fds(mounter, [b"."], [connection])
        except TimeoutError:
            raise Failure("nobody has mounted the interface file", "run uffdguard knob mount") from None
        finally:
            SOCKET.unlink(missing_ok=True)


def _name_of_cover() -> str:
    """Return the name by which the connection is kept of what covers the native file: a colon cannot be in it."""
    return f"connection-{native.cover_device()}".replace(":", "-")


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
            # Whoever looks whether a server runs has a lock on it, too, for an instant: state.server().
            if time.monotonic() > end:
                raise Failure("the interface file is being served already", "see uffdguard status") from None
        time.sleep(0.01)


def serve(connection: int, native_knob: native.Knob, manager: Manager | None = None) -> NoReturn:
    """Serve what is mounted, or soon will be, by a descriptor of /dev/fuse, without any privilege but root's.

    ENDS are blocked. Ends the process.

    :param native_knob: opened while nothing covered it: there is no other way to it without a capability.
    :raises Failure: the policy is damaged or not in force any more, or another server runs.
    """
    with Asker() as asker:
        # Nothing else may be opened to write soon.
        device = os.open(fuse.DEV_FUSE, os.O_RDWR | os.O_CLOEXEC)
        confine()
        with locked():
            # Under the lock, so that stop either sees this server or leaves nothing for it to hold.
            if not state.LOADED.exists():
                raise state.not_in_force()
            step("claim the file")
            lock = os.open(state.SERVER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            claim(lock)
            os.truncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
            server = Server(asker, native_knob)
            if missing := [part for part in state.PARTS if part not in server.held and part != "guard_sysctl"]:
                raise Failure(f"the policy is damaged: not pinned: {', '.join(missing)}", "run uffdguard start")
        server.look()
        step("await the mount")
        server.wait_for(lambda: fuse.clone(connection, device))
        if manager:
            if connection not in manager.kept.values():
                server.wait_for(native.is_covered)
                step("keep the connection")
                if NATIVE not in manager.kept:
                    manager.keep(NATIVE, native_knob.fileno())
                manager.keep(_name_of_cover(), connection)
            manager.ready()
        step("serve")
        if server.current().audit:
            log.warning("audit: refusals are counted and told, and let pass")
        server.loop(device)
        server.end(0)


def confine() -> None:
    """Give up what a server can do without: its capabilities, and to write files that are not its own.

    :raises Failure: it cannot join the group of our directories.
    """
    native.join_owner()
    os.umask(0o077)
    native.drop_capabilities()
    native.restrict_writes(
        {
            native.RUN: Access.WRITE | Access.MAKE | Access.REMOVE,
            # To pin again.
            native.BPFFS: Access.MAKE | Access.MAKE_DIRECTORY | Access.REMOVE,
            # A bpffs may be mounted anew. Nothing else that is mounted there lets files be made or removed.
            native.BPFFS.parent: Access.MAKE | Access.REMOVE,
        }
    )


class Server:
    """The file, as fuse.File has it; and the watch over the policy."""

    def __init__(self, asker: Asker, native_knob: native.Knob) -> None:
        self.asker = asker
        self.native_knob = native_knob
        self.words = native.modes()
        self.held: dict[str, int] = {}
        #: Whether the policy has answered; None: that is not known yet.
        self.answers: bool | None = None
        #: When that was seen last, by the monotonic clock; None: it was told that this is long ago.
        self.seen: float | None = time.monotonic()
        self.hold()
        for number in ENDS:
            signal.signal(number, lambda number, frame: self.end(0))

    def hold(self) -> None:
        """Take references to what is pinned now; pin again what is not pinned any more."""
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

    def wait(self, poll: select.poll, seconds: float) -> bool:
        """Wait for what POLL has, and tell whether it has come; end, which can be done here only, when told to."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        try:
            return bool(poll.poll(max(0.0, seconds) * 1000))
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)

    def wait_for(self, mounted: Callable[[], bool]) -> None:
        """Wait until somebody has mounted what we serve.

        :raises Failure: nobody does.
        """
        end = time.monotonic() + PATIENCE
        while not mounted():
            self.wait(select.poll(), 0.02)
            if time.monotonic() > end:
                raise Failure("nobody has mounted the interface file", "run it anew")

    def end(self, status: int) -> NoReturn:
        """End the process."""
        step("end")
        os._exit(status)

    def loop(self, device: int) -> None:
        """Answer what the kernel asks until the file is unmounted everywhere, and watch the policy meanwhile."""
        poll = select.poll()
        poll.register(device, select.POLLIN)
        due = time.monotonic() + INTERVAL
        while True:
            if self.wait(poll, due - time.monotonic()) and not fuse.serve_one(device, self):
                return
            if time.monotonic() >= due:
                self.look()
                due = time.monotonic() + INTERVAL

    def look(self) -> None:
        """See whether the policy refuses; close the native knob when it does not, and set it anew when it does again.

        Ends the process where it can never see that any more.
        """
        step("watch")
        try:
            with locked(wait=False):
                self.hold()
                self.see()
        except BlockingIOError:
            # Whoever has the lock sees the policy answer, too: nothing is missed by skipping a turn.
            self.see_nothing("another process has the lock")
        except (Failure, OSError) as error:  # the lock cannot be had, and nobody would watch any more
            self.close(error)
            self.end(1)

    def see(self) -> None:
        """Do so under the lock, with what is pinned now."""
        try:
            self.ask()
            kept = libbpf.read(self.held["enforcement"], layout.Enforcement)
            # Others who see the policy not answer close the native knob, too.
            if not self.answers or kept.unanswered_since or kept.knob != state.knob_of(self.current()):
                self.go_on()
        except Silence as error:
            self.see_nothing(str(error))
            return
        except (Failure, OSError) as error:
            self.close(error)
        self.seen = time.monotonic()

    def see_nothing(self, why: str) -> None:
        """Tell, once, that nobody has seen for long whether the policy refuses."""
        if self.seen is not None and time.monotonic() > self.seen + BLIND:
            self.seen = None
            log.error("it cannot be seen whether the policy refuses: %s", why)

    def ask(self) -> None:
        """See the policy refuse, by a new trial child where the old one has died.

        :raises Silence: there is no trial child.
        :raises Failure: it does not.
        """
        try:
            self.asker.ask(self.held["witness"], Reason.DISABLED, strict=True)
        except Silence:
            try:
                self.asker.restart()
            except OSError as error:
                raise Silence(f"no process can be had to try the policy: {error.strerror}", "try again") from error
            self.asker.ask(self.held["witness"], Reason.DISABLED, strict=True)

    def close(self, error: Exception) -> None:
        """Keep the native knob closed while the policy does not refuse, but not where nothing is to be refused."""
        step("close the native knob")
        closed = True
        with contextlib.suppress(OSError):
            closed = proof.close_net(self.held, state.read_policy(self.held["policy"]), self.native_knob)
        if self.answers is not False:
            result = "is closed" if closed else "stays as it is, for the policy lets all pass"
            log.critical("the policy does not refuse any more, and the native knob %s: %s", result, error)
        self.note(False)

    def go_on(self) -> None:
        """Let the native knob be what is due, now that the policy answers; another server may have closed it.

        :raises Failure: it does not answer after all.
        """
        policy = self.current()
        if self.native_knob.read() != state.knob_of(policy):
            step("switch to the mode that is set")
            guard.switch(self.held, policy.mode, self.asker, self.native_knob)
        if self.answers is not None:
            log.warning("the policy refuses again, and the native knob is %d", self.native_knob.read())
        self.note(True)

    def note(self, answers: bool) -> None:
        """Remember whether the policy has answered, and leave that for others."""
        self.answers = answers
        proof.record(self.held, answers=answers)

    def current(self) -> Policy:
        """Return the policy that is set.

        :raises OSError: EIO when it cannot be read.
        """
        policy = state.read_policy(self.held["policy"])
        if policy is None:
            raise OSError(errno.EIO, "the policy cannot be read")
        return policy

    def read(self) -> bytes:
        """Return the line that lists the modes, the current one in brackets."""
        return f"{interface_line(self.current().mode, self.words)}\n".encode()

    def check_writer(self, thread: int) -> None:
        """Refuse who has no CAP_SYS_ADMIN in the initial user namespace: uid 0 alone is root of any container.

        :raises PermissionError: so it is.
        """
        if thread not in memoryview(libbpf.iterate(self.held["administrators"])).cast("i"):
            log.warning("refused to write: %s has no CAP_SYS_ADMIN in the initial user namespace", _who(thread))
            raise PermissionError(errno.EPERM, "no CAP_SYS_ADMIN")

    def write(self, data: bytes, offset: int, thread: int) -> None:
        """Switch the mode before write(2) returns; EINVAL for what is none of the words."""
        number = data.strip(b" \t\n") in (b"0", b"1") and len(data) <= LONGEST
        if number and not offset and self.current().audit:
            self.change(lambda: guard.set_found(self.held, int(data), self.asker, self.native_knob))
            return
        try:
            if offset:
                raise ValueError("not at the start")
            mode = parse(data, self.words, numeric=self.accepts_numbers())
        except ValueError:
            words = ", ".join(self.words)
            log.warning("refused to write %r, which is none of %s: %s", data[:LONGEST], words, _who(thread))
            raise OSError(errno.EINVAL, "none of the words") from None
        self.change(lambda: guard.switch(self.held, mode, self.asker, self.native_knob))
        if self.current().audit:
            log.warning("mode %s in audit: refusals are counted and told, and let pass: %s", mode, _who(thread))

    def change(self, how: Callable[[], object]) -> None:
        """Change something of what is pinned now; EIO when that fails."""
        try:
            with locked():
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
    native.need_root("serves the interface file")
    if not state.LOADED.exists():
        raise state.not_in_force()
    if state.server():
        raise Failure("the interface file is being served already", "see uffdguard status")
    if not fuse.DEV_FUSE.exists():
        raise Failure(f"{fuse.DEV_FUSE} is not there", "modprobe fuse; the kernel must have CONFIG_FUSE_FS")


def _who(thread: int) -> str:
    """Return what to call a thread: its id, and the name that it has given itself."""
    try:
        name = Path(f"/proc/{thread}/comm").read_bytes().decode(errors="backslashreplace")[:-1]
    except OSError:
        name = ""
    return one_line(f"pid {thread} ({name})")
