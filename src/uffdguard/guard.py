"""The life of the enforcement: start, stop, change, status.

What is in force lives in the kernel: three links and four maps, pinned in a directory of bpffs that only root
may enter. They keep deciding with no process of ours alive. What else must be remembered until stop lies in
/run/uffdguard: the native knob's value as it was found, and which object was loaded.

The rule for every order of steps here: a ``kill -9`` between any two of them leaves the system no laxer than
the laxer of the old and the new setting, and the next start or stop puts it right. So nothing is pinned before
it was seen to refuse, and the native knob is relaxed last and closed first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy, Reason, Request, decide

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("uffdguard")

PINS = native.BPFFS / "uffdguard"
#: The native knob as it was found at the first start: written once, removed by stop.
FOUND = native.RUN / "native"
#: The object that was loaded, by its hash: written when a start has come to its end.
LOADED = native.RUN / "object"

#: Each link is pinned under the name of its program; with the maps that its program uses.
LINKS = {
    "grant": {"grants", "counts"},
    "forget": {"grants", "counts"},
    "decide": {"grants", "counts", "policy", "witness"},
}
#: The order of pinning: ``decide`` last, so that who finds it finds all the others too.
PARTS = ("grants", "counts", "policy", "witness", *LINKS)

#: The steps of start, mode and stop. The log names each as it is taken, and tests kill at each.
STEPS = (
    "mount procfs",
    "mount bpffs",
    "record the native knob",
    "load",
    "attach grant",
    "attach forget",
    "seed",
    "attach decide",
    "ask strictly",
    "set the policy",
    "ask",
    *(f"pin {part}" for part in PARTS),
    "set the native knob",
    "ask by system call",
    "record the object",
    "close the native knob",
    *(f"unpin {part}" for part in reversed(PARTS)),
    "restore the native knob",
    "unmount procfs",
)


def step(name: str) -> None:
    """Say that the step NAME is about to be taken."""
    if name not in STEPS:
        raise ValueError(name)
    log.debug("%s", name)


@dataclass
class Pinned:
    """What is pinned: descriptors by name, and what is wrong with them."""

    fds: dict[str, int] = field(default_factory=dict)
    programs: dict[str, libbpf.ProgramInfo] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def has(self, *links: str) -> bool:
        """Tell whether these links are pinned, and with them the maps that their programs use."""
        return all(link in self.programs for link in links)

    @property
    def complete(self) -> bool:
        """Whether everything is there and belongs together."""
        return self.has(*LINKS)

    def policy(self) -> Policy | None:
        """Return the policy that is set, or None when its map is not there or says nothing known."""
        if "policy" not in self.fds:
            return None
        try:
            return libbpf.read(self.fds["policy"], layout.Word).policy()
        except (OSError, IndexError):
            return None


@contextlib.contextmanager
def pinned() -> Iterator[Pinned]:
    """Open everything that is pinned, and see whether it belongs together."""
    with contextlib.ExitStack() as stack:
        found = Pinned()
        ids = {}
        for part in PARTS:
            try:
                fd = found.fds[part] = libbpf.get(PINS / part)
            except OSError as error:
                found.problems.append(f"{part} is not pinned ({os.strerror(error.errno or 0)})")
                continue
            stack.callback(os.close, fd)
            if part not in LINKS:
                ids[part] = libbpf.info(fd, libbpf.MapInfo).id
                continue
            try:
                program, used = libbpf.program_of_link(fd)
            except OSError as error:
                found.problems.append(f"{part} is not a link ({os.strerror(error.errno or 0)})")
                continue
            strange = sorted(name for name in LINKS[part] if ids.get(name) not in used)
            if program.name.decode() != part:
                found.problems.append(f"{part} is the link of another program")
            elif strange:
                found.problems.append(f"{part} does not use the pinned {' and '.join(strange)}")
            else:
                found.programs[part] = program
        yield found


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Be the only one who changes anything: an flock(2) on /run/uffdguard, which is made if it is missing."""
    while True:
        native.RUN.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(native.RUN, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # A stop may have removed the directory while we waited for its lock.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), native.RUN.lstat()):
                    os.fchown(fd, 0, 0)
                    os.fchmod(fd, 0o700)
                    yield
                    return
        finally:
            os.close(fd)
            _remove_if_empty(native.RUN)


class Asker:
    """A child without privileges that asks for userfaultfds, to see what the policy answers. A context manager.

    It never opens /dev/kvm. /dev/userfaultfd is opened for it by root, because creations through it are not
    governed by the native knob: with the knob at 0 a refused system call would prove nothing of ours.
    """

    REQUEST = Request()

    def __enter__(self) -> Asker:
        import socket

        self._socket, theirs = socket.socketpair()
        device = os.open(native.DEV_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self._socket.close()
                self._serve(theirs, device)
                status = 0
            finally:
                os._exit(status)
        os.close(device)
        theirs.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        os.waitpid(self.pid, 0)

    @staticmethod
    def _serve(server: object, device: int) -> None:
        import socket

        from uffdguard.kernel import probe

        assert isinstance(server, socket.socket)
        nobody = 65534
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        native.drop_capabilities()
        while question := server.recv(1):
            answer = probe.device_ioctl(device) if question == b"d" else probe.syscall()
            server.send(bytes([answer]))

    def _answer(self, question: bytes) -> int:
        self._socket.send(question)
        answer = self._socket.recv(1)
        if not answer:
            raise Failure("the process that tries the policy has died", "try again")
        return answer[0]

    def ask(self, witness: int, expected: Reason, *, strict: bool = False, by_syscall: bool = False) -> None:
        """Ask once, and see that the kernel side decided just this, and that the answer followed.

        :param witness: the descriptor of the loaded programs' ``witness`` map.
        :param strict: be decided about as if the mode were ``disabled``, and refused with EACCES: only the programs
            of this ``witness`` refuse so, while an older load that is attached as well can but give EPERM.
        :raises Failure: the policy does not answer as it must.
        """
        libbpf.write(witness, layout.Witness(tgid=self.pid, strict=strict))
        answer = self._answer(b"s" if by_syscall else b"d")
        seen = libbpf.read(witness, layout.Witness)
        libbpf.write(witness, layout.Witness())
        if seen.decisions != 1:
            raise Failure(
                f"the policy does not answer: a trial process was {'refused' if answer else 'allowed'} a userfaultfd"
                f" and {seen.decisions} decisions were recorded",
                "nothing was put in force; is bpf among the LSMs of this kernel? see uffdguard doctor",
            )
        reason = layout.REASONS[seen.reason]
        refusal = errno.EACCES if strict else errno.EPERM
        if reason is not expected or answer != (0 if expected.allowed else refusal):
            raise Failure(
                f"the policy answers wrongly: a trial process got {os.strerror(answer) if answer else 'a userfaultfd'}"
                f" ({reason}) where {expected} was due",
                "nothing was put in force; please report this with the kernel's version",
            )


def start(configured: Policy, mode: Mode | None = None) -> bool:
    """Put the policy in force, or bring what is there to what is wanted.

    A mode that is set already stays as it is unless MODE is given; the options are the configuration's.

    :param configured: what the configuration files say.
    :param mode: the mode that was asked for on the command line.
    :returns: whether anything had to be done.
    :raises Failure: it could not be done; what was done is undone.
    """
    features.require()
    with locked(), pinned() as found, contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        current = found.policy() if found.has("decide") or LOADED.exists() else None
        wanted = Policy(mode or (current or configured).mode, configured.user_mode_only)
        check_mode(wanted.mode)
        _mount(undo)
        if not FOUND.exists():
            step("record the native knob")
            # With a policy in force and its record lost, the knob's value is ours and not what was found.
            _write(FOUND, str(0 if found.has("decide") else native.read_knob()))
            undo.callback(FOUND.unlink)
        if found.complete and _same_object():
            changed = current != wanted or native.read_knob() != native_value(wanted.mode)
            if changed:
                _change(found.fds, wanted, undo)
            undo.pop_all()
            return changed
        _replace(found, wanted, held, undo)
        undo.pop_all()
        return True


def _mount(undo: contextlib.ExitStack) -> None:
    """Make sure that our procfs and a bpffs are mounted."""
    try:
        if not native.PROC.is_mount():
            step("mount procfs")
            native.PROC.mkdir(mode=0o700, exist_ok=True)
            undo.callback(_remove_if_empty, native.PROC)
            native.mount("proc", native.PROC)
            undo.callback(native.unmount, native.PROC)
        if not native.is_bpffs(native.BPFFS):
            step("mount bpffs")
            native.mount("bpf", native.BPFFS)
            undo.callback(native.unmount, native.BPFFS)
    except OSError as error:
        raise Failure(
            f"cannot mount {error.filename}: {error.strerror}", "run it on the host itself, with CAP_SYS_ADMIN"
        ) from error


def _replace(found: Pinned, wanted: Policy, held: contextlib.ExitStack, undo: contextlib.ExitStack) -> None:
    """Load, attach, try and pin the programs of our object; the older ones decide until the new ones have proved.

    The maps are kept when no hook that fills them was ever missing, so that running virtual machines keep
    their grants. Otherwise the grants begin anew and empty: a repair grants nobody.
    """
    first = not found.has("decide") and not LOADED.exists()
    keep = {"grants", "counts"} if not first and found.has("grant", "forget") else set()
    if found.complete:
        keep.add("policy")
    try:
        obj = held.enter_context(libbpf.Object(features.OBJECT))
        layout.check(obj)
        for name in keep:
            obj.reuse(layout.map_name(name), found.fds[name])
        step("load")
        obj.load()
    except OSError as error:
        log.debug("%s", "\n".join(libbpf.messages))
        raise Failure(f"cannot load the policy: {features.load_error(error)}", features.load_hint(error)) from error
    fds = {name: obj.map_fd(layout.map_name(name)) for name in PARTS if name not in LINKS}
    try:
        for name in LINKS:
            if name == "decide" and first:
                step("seed")
                obj.run_iterator("seed")
            step(f"attach {name}")
            fds[name] = obj.attach(name)
            held.callback(os.close, fds[name])
    except OSError as error:
        raise Failure(f"cannot attach the policy: {error}", "see uffdguard doctor") from error
    _change(fds, wanted, undo, pin_over=found)
    step("record the object")
    undo.callback(LOADED.unlink, missing_ok=True)
    _write(LOADED, _object_hash())


def _change(fds: dict[str, int], wanted: Policy, undo: contextlib.ExitStack, *, pin_over: Pinned | None = None) -> None:
    """Set the policy of attached programs, see it answer, and only then let the native knob follow.

    :param pin_over: pin FDS in the place of these before the native knob is touched.
    On the way out after a failure the older policy stands again, and the native knob is no laxer than before.
    """
    expected = decide(wanted, Asker.REQUEST)
    try:
        with Asker() as asker:
            step("ask strictly")
            asker.ask(fds["witness"], Reason.DISABLED, strict=True)
            step("set the policy")
            before = libbpf.read(fds["policy"], layout.Word)
            libbpf.write(fds["policy"], layout.Word.of(wanted))
            undo.callback(libbpf.write, fds["policy"], before)
            step("ask")
            asker.ask(fds["witness"], expected)
            if pin_over:
                for part in PARTS:
                    step(f"pin {part}")
                    _pin(part, fds[part], pin_over.fds.get(part), undo)
            value = native.read_knob()
            if value != native_value(wanted.mode):
                step("set the native knob")
                # Whatever went wrong after this, an older policy of ours or none needs no more than it had.
                undo.callback(native.write_knob, value)
                native.write_knob(native_value(wanted.mode))
            if native_value(wanted.mode):
                step("ask by system call")
                asker.ask(fds["witness"], expected, by_syscall=True)
    except OSError as error:
        raise Failure(f"cannot put the policy in force: {error}", "see uffdguard doctor") from error


def _pin(part: str, fd: int, older: int | None, undo: contextlib.ExitStack) -> None:
    """Pin FD as PART in one move, so that at every instant the OLDER or the newer is pinned."""
    PINS.mkdir(mode=0o700, exist_ok=True)
    undo.callback(_remove_if_empty, PINS)
    fresh, place = PINS / f"new-{part}", PINS / part
    fresh.unlink(missing_ok=True)
    if older is None:
        undo.callback(place.unlink, missing_ok=True)
    else:
        undo.callback(fresh.rename, place)
        undo.callback(libbpf.pin, older, fresh)
    libbpf.pin(fd, fresh)
    fresh.rename(place)


def set_mode(mode: Mode) -> None:
    """Switch the mode of a policy that is in force.

    :raises Failure: none is in force, or it does not answer.
    """
    if os.geteuid() != 0:
        raise Failure("only root switches the mode", "run it as root, e.g. with sudo")
    check_mode(mode)
    with locked(), pinned() as found, contextlib.ExitStack() as undo:
        current = found.policy()
        if not found.complete or current is None or not native.PROC.is_mount():
            raise Failure(
                "the policy is not in force" if not found.fds else f"the policy is damaged: {found.problems[0]}",
                "run uffdguard start",
            )
        _change(found.fds, Policy(mode, current.user_mode_only), undo)
        undo.pop_all()


def stop() -> bool:
    """Take the policy out of force and give the native knob the value that it was found with.

    Needs neither libbpf nor a working policy.

    :returns: whether there was anything to take away.
    """
    if os.geteuid() != 0:
        raise Failure("only root takes the policy out of force", "run it as root, e.g. with sudo")
    with locked(), contextlib.ExitStack() as undo:
        left = sorted(PINS.iterdir()) if PINS.is_dir() else []
        if not (left or FOUND.exists() or native.PROC.exists() or LOADED.exists()):
            return False
        _mount(undo)
        undo.pop_all()
        # Without any of these a start was killed before it had changed the knob, or a stop after it had restored it.
        if left or FOUND.exists() or LOADED.exists():
            step("close the native knob")
            native.write_knob(0)
        for path in sorted(left, key=lambda path: PARTS.index(path.name) if path.name in PARTS else -1, reverse=True):
            if path.name in PARTS:
                step(f"unpin {path.name}")
            path.unlink()
        if PINS.is_dir():
            PINS.rmdir()
        LOADED.unlink(missing_ok=True)
        step("restore the native knob")
        if FOUND.exists():
            native.write_knob(int(FOUND.read_text()))
            FOUND.unlink()
        step("unmount procfs")
        native.unmount(native.PROC)
        native.PROC.rmdir()
        return True


def current_mode() -> Mode:
    """Return the mode in force.

    :raises Failure: none is in force, or it cannot be told.
    """
    _need_root("the mode")
    with pinned() as found:
        policy = found.policy()
        if policy is None or not found.has("decide"):
            raise Failure("the policy is not in force", "run uffdguard start")
        return policy.mode


def modes() -> tuple[Mode, ...]:
    """Return the modes that exist on this kernel: ``kvm`` only where there is KVM."""
    return tuple(mode for mode in Mode if mode is not Mode.KVM or native.has_kvm())


def check_mode(mode: Mode) -> None:
    """Make sure that MODE exists on this kernel.

    :raises Failure: it does not.
    """
    if mode not in modes():
        raise Failure("mode kvm does not exist here: this kernel has no KVM", "use disabled or enabled")


def native_value(mode: Mode) -> int:
    """Return the native knob's value that fits MODE: 0 refuses by itself, 1 leaves it to the policy above."""
    return 0 if mode is Mode.DISABLED else 1


@dataclass(frozen=True)
class Status:
    """How things stand. The names are those of ``status --json``."""

    in_force: bool
    mode: Mode | None
    user_mode_only: bool | None
    since: str | None  # local time, ISO 8601
    kernel: str
    native_knob: int
    drift: bool  # the native knob does not fit the mode
    pins: dict[str, bool]
    skipped: int  # times the kernel skipped grant or forget
    lost: int  # grants that could not be recorded
    grants: int
    allowed: int
    refused: int
    decisions: dict[Reason, int]
    problems: list[str]


def status() -> Status:
    """Find out how things stand. Changes nothing."""
    _need_root("the state of the policy")
    with pinned() as found:
        policy = found.policy() if found.has("decide") else None
        counts = libbpf.read(found.fds["counts"], layout.Counts) if "counts" in found.fds else layout.Counts()
        knob = native.read_knob()
        left = bool(found.fds) or FOUND.exists() or LOADED.exists()
        problems = list(found.problems) if left else []
        drift = policy is not None and knob != native_value(policy.mode)
        if policy and drift:
            problems.append(
                f"the native knob is {knob} and not {native_value(policy.mode)}: "
                + ("processes that the mode allows are refused" if knob == 0 else "the net below the policy is open")
            )
        if policy and not LOADED.exists():
            problems.append("the last start did not come to its end")
        if policy and not FOUND.exists():
            problems.append(f"{FOUND} is gone: stop will leave the native knob at 0")
        decisions = counts.by_reason()
        return Status(
            in_force=policy is not None,
            mode=policy.mode if policy else None,
            user_mode_only=policy.user_mode_only if policy else None,
            since=_local_time(found.programs["decide"].load_time) if policy else None,
            kernel=os.uname().release,
            native_knob=knob,
            drift=drift,
            pins={part: part in found.fds for part in PARTS},
            skipped=sum(program.recursion_misses for program in found.programs.values()),
            lost=counts.lost,
            grants=counts.grants,
            allowed=sum(number for reason, number in decisions.items() if reason.allowed),
            refused=sum(number for reason, number in decisions.items() if not reason.allowed),
            decisions=decisions,
            problems=problems,
        )


def _local_time(since_boot: int) -> str:
    """Return a kernel's time since boot, in ns, as local time, ISO 8601 to the second."""
    seconds = time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot) / 1e9
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Failure(f"only root can see {what}", "run it as root, e.g. with sudo")


def _object_hash() -> str:
    return hashlib.sha256(features.OBJECT.read_bytes()).hexdigest()


def _same_object() -> bool:
    return LOADED.exists() and LOADED.read_text() == _object_hash()


def _write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
