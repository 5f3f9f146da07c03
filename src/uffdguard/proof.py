"""See the policy answer: nothing is trusted that was not seen to refuse.

An answer other than the right one means that the policy is not in force. No answer at all, :class:`Silence`, means
that nothing is known, and nothing follows from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time

from uffdguard.errors import Failure
from uffdguard.kernel import layout, libbpf, native, probe
from uffdguard.policy import Mode, Policy, Reason, Request
from uffdguard.steps import log


class Silence(Failure):
    """The policy could not be asked: nothing is known of it."""


class Asker:
    """A child without privileges that asks for userfaultfds, to see what the policy answers. A context manager.

    It never opens /dev/kvm. /dev/userfaultfd is opened for it by root, because creations through it are not
    governed by the native knob: with the knob at 0 a refused system call would prove nothing of ours. Where there is no
    such device, as on a kernel before 6.1, the child asks with UFFD_USER_MODE_ONLY, which the native knob lets pass.
    """

    #: Seconds.
    PATIENCE = 20.0

    def __enter__(self) -> Asker:
        self._device: int | None = None
        with contextlib.suppress(FileNotFoundError):
            self._device = os.open(native.DEV_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
        #: What the kernel sees of a question that is not by the system call as others make it.
        self.request = Request(user_mode_only=self._device is None)
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        if self._device is not None:
            os.close(self._device)

    def restart(self) -> None:
        """Replace a child that does not answer by a new one."""
        self._end()
        self._begin()

    def _begin(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(self.PATIENCE)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                status = 1
                try:
                    self._socket.close()
                    self._serve(theirs, self._device)
                    status = 0
                finally:
                    os._exit(status)
        try:
            self._process: int | None = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._process = None

    def _end(self) -> None:
        self._socket.close()
        # Where our parent ignored SIGCHLD so do we, and the kernel itself waits for children: one that has ended is
        # gone, and its pid may be another's.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
                os.waitid(os.P_PIDFD, self._process, os.WEXITED)
            os.close(self._process)
            self._process = None

    @staticmethod
    def _serve(server: socket.socket, device: int | None) -> None:
        # Its user stays root: capabilities are all that the kernel and the policy ask about, and whoever serves the
        # interface file has none left by which to become another.
        native.drop_capabilities()
        # It ends when we do, by the end of the socket, and not by what a terminal or a service manager sends to all.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # The lock above all, which must not outlast us.
        low, high = sorted((server.fileno(), server.fileno() if device is None else device))
        for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, last)
        while question := server.recv(1):
            if question == b"s":
                answer = probe.syscall()
            elif device is not None:
                answer = probe.device_ioctl(device)
            else:
                answer = probe.syscall(probe.UFFD_USER_MODE_ONLY)
            server.send(bytes([answer]))

    def _answer(self, question: bytes) -> int:
        try:
            self._socket.send(question)
            answer = self._socket.recv(1)
        except OSError:
            answer = b""
        if not answer:
            raise Silence("the process that tries the policy does not answer", "try again")
        return answer[0]

    def ask(
        self, witness: int, expected: Reason, *, strict: bool = False, by_syscall: bool = False, audit: bool = False
    ) -> None:
        """Ask once, and see that the kernel side decided just this, and that the answer followed.

        :param witness: the descriptor of the loaded programs' ``witness`` map.
        :param strict: be decided about as if the mode were ``disabled``, and refused with EACCES: only the programs
            of this ``witness`` refuse so, while an older load that is attached as well can but give EPERM.
        :param audit: see a refusal let pass.
        :raises Failure: the policy does not answer as it must.
        """
        # Whoever gets the pid of a child that was killed is not to be taken for it for long.
        until = int(time.clock_gettime(time.CLOCK_BOOTTIME) + self.PATIENCE) + 1
        armed = {"strict": strict, "decisions": 0, "until": until, "tgid": self.pid}
        libbpf.store(witness, layout.Witness, "tgid", 0)
        for member, value in armed.items():
            libbpf.store(witness, layout.Witness, member, value)
        try:
            answer = self._answer(b"s" if by_syscall else b"d")
            seen = libbpf.read(witness, layout.Witness)
        finally:
            libbpf.store(witness, layout.Witness, "tgid", 0)
        if seen.decisions != 1 and answer:
            # A seccomp filter, another security module or a lack of memory may have come first.
            raise Silence(
                f"the policy could not be asked: a trial process got {os.strerror(answer)}, and not from the policy",
                "see what else restricts this process, e.g. a seccomp filter",
            )
        if seen.decisions != 1:
            raise Failure(
                f"the policy does not answer: a trial process was allowed a userfaultfd"
                f" and {seen.decisions} decisions were recorded",
                silence_hint(),
            )
        reason = layout.REASONS[seen.reason]
        refusal = errno.EACCES if strict else errno.EPERM
        if reason is not expected or answer != (0 if expected.allowed or audit else refusal):
            raise Failure(
                f"the policy answers wrongly: a trial process got {os.strerror(answer) if answer else 'a userfaultfd'}"
                f" ({reason}) where {expected} was due",
                "nothing was put in force; please report this with the kernel's version",
            )


def silence_hint() -> str:
    """Return what to do about a policy that does not answer."""
    from uffdguard.kernel import features

    if features.ftrace_enabled() == 0:
        return "kernel.ftrace_enabled is 0, and then no BPF trampoline runs: set it to 1 and take it out of sysctl.d"
    return "is bpf among the LSMs of this kernel? see uffdguard doctor"


def see(fds: dict[str, int], policy: Policy | None, asker: Asker, knob: native.Knob) -> None:
    """See what is in force refuse; where it does not, close the native knob and leave a note. For whoever has the lock.

    :param fds: descriptors of the maps in force, by name.
    :param policy: what is set, if that can be read.
    :raises Silence: it could not be asked.
    :raises Failure: it does not refuse.
    :raises OSError: the maps are those of another version.
    """
    try:
        asker.ask(fds["witness"], Reason.DISABLED, strict=True)
    except Silence:
        raise
    except Failure as error:
        log.debug("close the native knob")
        closed = close_net(fds, policy, knob)
        record(fds, answers=False)
        raise Failure(f"{error.what}{'; the native knob is closed' if closed else ''}", error.hint) from error
    record(fds, answers=True)


def ask_guard(witness: int, knob: native.Knob) -> None:
    """See the guard of sysctls refuse a write of the native knob that changes nothing in any case.

    :param witness: the descriptor of the loaded programs' ``witness`` map.
    :raises Failure: it is not there, or another load's refused.
    """
    before = libbpf.read(witness, layout.Witness).questions
    try:
        knob.write("?")
    except OSError as error:
        refused = error.errno == errno.EPERM
    else:
        refused = False
    if not refused or libbpf.read(witness, layout.Witness).questions == before:
        raise Failure(
            "the guard of sysctls does not answer: whoever may write kernel.ftrace_enabled can end the policy",
            "run uffdguard start",
        )


def set_knob(fds: dict[str, int], value: int, knob: native.Knob) -> None:
    """Set the native knob, and let the guard of sysctls refuse any other value.

    :param fds: descriptors of the maps in force, by name.
    :raises OSError: the kernel or a guard refused.
    """
    if "enforcement" in fds:
        libbpf.store(fds["enforcement"], layout.Enforcement, "knob", value)
    knob.write(value)


def record(fds: dict[str, int], *, answers: bool) -> None:
    """Leave a note for all who look whether the policy was seen to answer, where there is a place for it."""
    with contextlib.suppress(OSError, KeyError):
        since = libbpf.read(fds["enforcement"], layout.Enforcement).unanswered_since
        if answers == bool(since):
            now = 0 if answers else time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            libbpf.store(fds["enforcement"], layout.Enforcement, "unanswered_since", now)


def close_net(fds: dict[str, int], policy: Policy | None, knob: native.Knob) -> bool:
    """Close the native knob below a policy that does not answer; return whether it was.

    In audit and in mode ``enabled`` it would refuse what the setting lets pass, and stays as it is.

    :raises OSError: the kernel or a guard refused.
    """
    if policy and (policy.audit or policy.mode is Mode.ENABLED):
        return False
    set_knob(fds, 0, knob)
    return True
