"""The model against the kernel: what happens to live processes in any order, and after each step what each may do.

hypothesis makes the order up, and shrinks one that fails to a short script, which it prints. To replay one, paste
its lines into a function that has ``state = Model()``.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from inside import BUILD, USER, load, preemptible
from subjects import (
    ABIS,
    AT_FDCWD,
    CLONE_NEWUSER,
    Abi,
    At,
    How,
    Kind,
    Process,
    Subject,
    await_end,
    descriptor_of,
    first_subject,
    kill,
    reap,
)

from uffdguard import guard, state
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy, Reason, Request, decide

if TYPE_CHECKING:
    from collections.abc import Iterator

PTRACE_SEIZE = 0x4206
USERFAULTFD_IOC_NEW = 0xAA00
UFFD_USER_MODE_ONLY = 1
#: What userfaultfd(2) knows: O_CLOEXEC and O_NONBLOCK too.
KNOWN = 0x80000 | 0x800 | UFFD_USER_MODE_ONLY

FLAGS = (0, 1, 0x80000, 0x80801, 2, 3, 1 << 31, 1 << 32, 1 << 32 | 1, (1 << 64) - 1)

#: Another node of the same device, as a container has it.
NODE = "/run/kvm"

#: Which programs may open KVM: its driver tells 32-bit ones ENODEV on arm64, kvm_no_compat_open() of
#: virt/kvm/kvm_main.c.
KVM_BITS = (64,) if os.uname().machine == "aarch64" else (64, 32)

#: What each register says that the call does not use: the flags and the command, for whoever looks there.
MISLEADING = dict.fromkeys(("bx", "dx", "di", "bp", "r10", "r8", "r9"), 1) | dict.fromkeys(
    ("cx", "si"), USERFAULTFD_IOC_NEW
)

OPEN_FLAGS = {
    "read-write": os.O_RDWR,
    "read": os.O_RDONLY,
    "cloexec": os.O_RDWR | os.O_CLOEXEC,
    "path": os.O_PATH,
    "direct": os.O_RDWR | os.O_DIRECT,  # fails after the driver's open has succeeded
    "directory": os.O_RDONLY | os.O_DIRECTORY,  # these fail before it
    "exclusive": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}
WAYS = ("open", "openat", "openat2", "io_uring", "worker", "kernel thread", *(["int80"] if Abi.INT80 in ABIS else []))
PLACES = ("/dev/kvm", NODE, "held", "held path", "/dev/userfaultfd", "/dev/null")

who = st.integers(0, 7)

WAY_OF = {Abi.NATIVE_64: "syscall", Abi.INT80: "compat", Abi.X32: "x32"}


class Told(NamedTuple):
    """What an event says of the call."""

    way: str
    flags: int
    reason: str


class Model(RuleBasedStateMachine):
    """Live processes, the policy, and what must follow from what has happened."""

    origin: ClassVar[Subject]
    has_x32: ClassVar[bool]
    #: Whether others open /dev/kvm meanwhile, so that the kernel may skip a hook of ours.
    loaded: ClassVar[bool] = False
    steps: ClassVar[int] = 0
    #: Two builds of the same programs.
    objects: ClassVar[tuple[Path, Path]]

    def __init__(self) -> None:
        super().__init__()
        self.subjects: list[Subject] = []
        self.sockets: list[Subject] = []
        self.policy: Policy | None = None
        self.maps: dict[str, int] = {}
        native.DEV_KVM.chmod(0o666)
        native.DEV_USERFAULTFD.chmod(0o666)

    @initialize(mode=st.sampled_from((*Mode, Mode.KVM, Mode.KVM)), user_mode_only=st.booleans())
    def begin(self, mode: Mode, user_mode_only: bool) -> None:
        self.start(Policy(mode, user_mode_only))
        self.spawn(root=False)

    def teardown(self) -> None:
        for subject in self.sockets:
            kill(subject.process)
            subject.socket.close()
        reap()
        self.close_maps()

    # Who there is.

    def free(self) -> list[Subject]:
        """Return those who do not wait for a vforked child."""
        return [subject for subject in self.subjects if not subject.waits_for]

    def one(self, number: int) -> Subject:
        """Return one of those who can be asked; there is always one."""
        free = self.free()
        return free[number % len(free)]

    def add(self, subject: Subject) -> Subject:
        self.subjects.append(subject)
        self.sockets.append(subject)
        return subject

    def gone(self, subject: Subject) -> None:
        """Note that a thread has ended, or runs another program: who waited for it, or was traced by it, goes on."""
        for other in self.subjects:
            if other.waits_for is subject:
                other.waits_for = None
                assert other.receive().result > 0

    def remove(self, subject: Subject) -> None:
        self.subjects.remove(subject)
        subject.process.ended = all(other.process is not subject.process for other in self.subjects)
        self.gone(subject)
        for other in self.subjects:
            if other.traced_by is subject:
                other.traced_by = None

    # Steps.

    @precondition(lambda self: len(self.subjects) < 6)
    @rule(root=st.booleans())
    def spawn(self, root: bool) -> None:
        subject = self.add(self.origin.spawn(How.FORK))
        if not root:
            self.become_user(subject)

    @precondition(lambda self: len(self.subjects) < 8)
    @rule(who=who, how=st.sampled_from(How))
    def clone(self, who: int, how: How) -> None:
        self.add(self.one(who).spawn(how))

    @rule(who=who, bits=st.sampled_from((64, 32)))
    def exec(self, who: int, bits: int) -> None:
        subject = self.one(who)
        subject.exec(bits)
        for other in [other for other in self.subjects if other.process is subject.process and other is not subject]:
            self.remove(other)
        self.gone(subject)
        if subject.initial and subject.root and not subject.traced_by:
            subject.permitted = subject.effective = True
        elif not subject.traced_by:
            subject.permitted = subject.effective = False
        # Who is traced by one with fewer capabilities gains none.
        permitted, effective = subject.capabilities()
        if subject.traced_by:
            subject.permitted, subject.effective = permitted, effective
        if subject.initial:
            assert (permitted, effective) == (subject.permitted, subject.effective)

    @rule(
        who=who,
        place=st.sampled_from(PLACES),
        way=st.sampled_from(WAYS),
        flags=st.sampled_from(sorted(OPEN_FLAGS)),
    )
    def open(self, who: int, place: str, way: str, flags: str) -> None:
        subject = self.one(who)
        process = subject.process
        held = {"held": process.kvm, "held path": process.paths}.get(place)
        if held is not None:
            place = f"/proc/self/fd/{next(iter(held), 999)}"
        result = open_by(way, subject, place, OPEN_FLAGS[flags])
        kvm = place not in ("/dev/userfaultfd", "/dev/null")
        if held is None and result != -errno.EACCES:
            foreign = kvm and flags != "path" and process.bits not in KVM_BITS
            assert (result < 0) is (foreign or flags in ("direct", "directory", "exclusive"))
        if result < 0:
            # The driver's open comes last but for this.
            if kvm and flags == "direct" and result == -errno.EINVAL:
                self.opened_kvm(process)
            return
        if not kvm:
            subject.call("close", result)
        elif flags == "path":
            process.paths[result] = False
        else:
            process.kvm[result] = flags == "cloexec"
            self.opened_kvm(process)

    def opened_kvm(self, process: Process) -> None:
        if self.policy is not None:
            process.granted = True

    @precondition(lambda self: len(self.subjects) < 8)
    @rule(who=who)
    def fork_after_open(self, who: int) -> None:
        """Hand on what is not inherited: the other rules seldom come to it in 400 steps."""
        self.open(who, "/dev/kvm", "open", "read-write")
        self.clone(who, How.FORK)

    @rule(who=who)
    def duplicate(self, who: int) -> None:
        subject = self.one(who)
        for fd in list(subject.process.kvm)[:1]:
            subject.process.kvm[subject.call("dup", fd)] = False

    @rule(who=who)
    def close(self, who: int) -> None:
        subject = self.one(who)
        for fd in [*subject.process.kvm, *subject.process.paths]:
            assert subject.call("close", fd) == 0
        subject.process.kvm.clear()
        subject.process.paths.clear()

    @rule(giver=who, who=who)
    def pass_kvm(self, giver: int, who: int) -> None:
        process = self.one(giver).process
        subject = self.one(who)
        for fd in list(process.kvm)[:1]:
            with descriptor_of(process, fd) as ours:
                subject.process.kvm[subject.take(ours)] = True

    @rule(who=who, permitted=st.booleans(), effective=st.booleans())
    def set_capability(self, who: int, permitted: bool, effective: bool) -> None:
        subject = self.one(who)
        possible = (subject.permitted or not permitted) and (permitted or not effective)
        assert subject.set_capability(permitted, effective) == (0 if possible else -errno.EPERM)
        if possible:
            subject.permitted, subject.effective = permitted, effective

    @rule(who=who)
    def set_user(self, who: int) -> None:
        self.become_user(self.one(who))

    def become_user(self, subject: Subject) -> None:
        if subject.call("setresuid", USER, USER, USER) == 0:
            if subject.root:
                subject.permitted = subject.effective = False
            subject.root = False
        else:
            assert not subject.initial

    @rule(who=who)
    def unshare_user(self, who: int) -> None:
        subject = self.one(who)
        # EINVAL where others share the address space, EPERM where the new one's owner has no name in the outer one.
        if subject.call("unshare", CLONE_NEWUSER) == 0:
            subject.permitted = subject.effective = True
            subject.initial = False

    @rule(who=who)
    def leave(self, who: int) -> None:
        """End a thread, be it the leader of others."""
        subject = self.one(who)
        last = not any(other.process is subject.process for other in self.subjects if other is not subject)
        if last and len({other.process for other in self.free()}) == 1:
            return
        subject.leave()
        if last:
            await_end(subject.process)
        self.remove(subject)

    @rule(who=who)
    def kill(self, who: int) -> None:
        process = self.one(who).process
        if {other.process for other in self.free()} == {process}:
            return
        kill(process)
        for other in [other for other in self.subjects if other.process is process]:
            self.remove(other)

    @rule(who=who, whom=who)
    def attach(self, who: int, whom: int) -> None:
        tracer, traced = self.one(who), self.one(whom)
        alone = [other.process for other in self.subjects].count(traced.process) == 1
        # Nobody is traced who traces: the end of a traced process would stop it.
        chained = tracer.traced_by or any(other.traced_by is traced for other in self.subjects)
        if traced.traced_by or chained or not alone or tracer.process is traced.process:
            return
        if tracer.call("ptrace", PTRACE_SEIZE, traced.process.pid, 0, 0) == 0:
            traced.traced_by = tracer

    @rule(change=st.sampled_from((*Mode, *Mode, Mode.KVM, Mode.KVM, Mode.KVM, "option", "audit", "upgrade", "stop")))
    def change(self, change: Mode | str) -> None:
        """Change the policy by one rule: these steps take longer than the others together."""
        match change, self.policy:
            case "stop", _:
                guard.stop()
                self.policy = None
                for subject in self.subjects:
                    subject.process.opened = False
            case Mode(), Policy():
                guard.set_mode(Mode(change))
                self.policy = self.policy._replace(mode=Mode(change))
            case Mode(), None:
                self.start(Policy(Mode(change)))
            case "option", Policy():
                self.start(self.policy._replace(user_mode_only=not self.policy.user_mode_only))
            case "audit", Policy():
                self.start(self.policy._replace(audit=not self.policy.audit))
            case "upgrade", Policy():
                features.OBJECT = next(path for path in self.objects if path != features.OBJECT)
                self.start(self.policy)

    def start(self, policy: Policy) -> None:
        guard.start(policy, policy.mode)
        if self.policy is None:  # a first start grants those who hold /dev/kvm
            for subject in self.subjects:
                if subject.process.kvm:
                    subject.process.granted = True
        self.policy = policy
        self.close_maps()
        with state.pinned() as found:
            self.maps = {name: os.dup(found.fds[name]) for name in ("counts", "events", "watching", "granted")}
        for limit in ("per_owner", "total"):
            libbpf.store(self.maps["watching"], layout.Watching, limit, 1 << 30)

    @rule(mode=st.sampled_from((0o666, 0o600)))
    def set_mode_of_kvm(self, mode: int) -> None:
        native.DEV_KVM.chmod(mode)

    @rule(
        who=who,
        flags=st.sampled_from(FLAGS),
        misleading=st.booleans(),
    )
    def ask(self, who: int, flags: int, misleading: bool) -> None:
        """Ask in every way there is."""
        subject = self.one(who)
        for abi in [Abi.INT80] if subject.process.bits == 32 else ABIS:
            if abi is not Abi.X32 or self.has_x32:
                for device in ("", "own", "passed"):
                    self.ask_by(subject, abi, device, flags, misleading)

    # What must follow.

    def ask_by(self, subject: Subject, abi: Abi, device: str, flags: int, misleading: bool) -> None:
        """Compare one answer, and the reason that was counted, with the model's."""
        call, arguments = "userfaultfd", [flags]
        if device:
            call, arguments = "ioctl", [self.device(subject, device), USERFAULTFD_IOC_NEW, flags]
        registers = dict(zip(abi.arguments, arguments, strict=False)) | {"ax": abi.number(call)}
        before, told = self.decisions(), self.told()
        result: int = subject.enter(abi, MISLEADING | registers if misleading else registers).result
        after = self.decisions()
        counted = [word for word in after for _ in range(after[word] - before[word])]
        if result >= 0:
            subject.call("close", result)
            result = 0

        flags &= 0xFFFFFFFF  # an int
        request = Request(
            capability=subject.effective and subject.initial,
            user_mode_only=bool(flags & UFFD_USER_MODE_ONLY),
            kvm=subject.process.granted,
        )
        # What the kernel asks before any hook: fs/userfaultfd.c.
        native_allows = bool(device) or request.user_mode_only or request.capability
        native_allows |= self.policy is not None and not self.policy.audit and self.policy.mode.native_value == 1
        reason: str | None = None
        if not native_allows:
            expected = -errno.EPERM
            reason = "native" if self.policy else None
        elif flags & ~KNOWN:
            expected = -errno.EINVAL
        elif self.policy is None:
            expected = 0
        else:
            reason = decide(self.policy, request)
            expected = 0 if reason.allowed or self.policy.audit else -errno.EPERM
        if self.loaded and reason is Reason.KVM and counted == [Reason.NO_KVM] and skipped():
            subject.process.granted = False  # a grant may be lost
            expected, reason = -errno.EPERM, Reason.NO_KVM
        question = (abi, device, hex(flags), misleading)
        assert (*question, result, counted) == (*question, expected, [reason] if reason else [])
        refused = reason is not None and not (isinstance(reason, Reason) and reason.allowed)
        assert self.told() - told == refused
        if refused:
            self.compare_event(subject, request, Told("device" if device else WAY_OF[abi], flags, str(reason)))

    def compare_event(self, subject: Subject, request: Request, told: Told) -> None:
        """Compare the newest event with what the subject has asked and what it is."""
        assert self.policy
        number = self.told()
        event = libbpf.read_locked(self.maps["events"], number % 2048, layout.Slot).event
        reason = "native" if event.reason == len(Reason) else layout.REASONS[event.reason]
        assert event.number == number
        assert Told(layout.WAYS[event.way], event.flags, str(reason)) == told
        assert (event.pid, event.tid) == (subject.process.pid, subject.tid)
        assert layout.MODES[event.mode] is self.policy.mode
        assert event.enforced == (told.reason == "native" or not self.policy.audit)
        assert (event.initial, event.capability) == (subject.initial, request.capability)
        assert self.loaded or event.granted == request.kvm

    @invariant()
    def everybody_gets_what_the_model_says(self) -> None:
        type(self).steps += 1
        for subject in self.free():
            self.ask_by(subject, subject.abi, "passed", 0, misleading=False)

    @invariant()
    def every_grant_is_of_a_live_process(self) -> None:
        if self.policy and not self.loaded:
            granted = {subject.process.pid for subject in self.subjects if subject.process.granted}
            assert set(memoryview(libbpf.iterate(self.maps["granted"])).cast("i")) == granted

    # Helpers.

    def device(self, subject: Subject, kind: str) -> int:
        """Return a descriptor of /dev/userfaultfd: of the subject's own opening, or passed to it."""
        devices = subject.process.devices
        if kind not in devices:
            if kind == "own":
                devices[kind] = subject.call("open", At(), os.O_RDWR, data=b"/dev/userfaultfd"), False
            else:
                fd = os.open(native.DEV_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
                devices[kind] = subject.take(fd), True
                os.close(fd)
        assert devices[kind][0] >= 0
        return devices[kind][0]

    def decisions(self) -> dict[str, int]:
        if not self.policy:
            return {}
        counts = libbpf.read(self.maps["counts"], layout.Counts).total()
        return {str(reason): number for reason, number in counts.by_reason().items()} | {"native": counts.native}

    def told(self) -> int:
        """Return the number of the newest event."""
        return libbpf.read(self.maps["watching"], layout.Watching).told if self.policy else 0

    def close_maps(self) -> None:
        for fd in self.maps.values():
            os.close(fd)
        self.maps = {}


def open_by(way: str, subject: Subject, path: str, flags: int) -> int:
    """Let SUBJECT open PATH; return the descriptor, or an errno negative."""
    data = path.encode()
    match way:
        case "open":
            return subject.call("open", At(), flags, 0, data=data)
        case "openat":
            return subject.call("openat", AT_FDCWD, At(), flags, 0, data=data)
        case "openat2":
            open_how = struct.pack("QQQ", flags, 0, 0)
            data = data.ljust(128, b"\0") + open_how
            return subject.call("openat2", AT_FDCWD, At(), At(128), len(open_how), data=data)
        case "int80":
            return subject.call("open", At(), flags, 0, data=data, abi=Abi.INT80)
        case _:
            asynchronous, polled = 1 << 4, 1 << 1  # IOSQE_ASYNC, IORING_SETUP_SQPOLL
            how = {"bx": flags, "cx": asynchronous * (way == "worker"), "dx": polled * (way == "kernel thread")}
            subject.send(Kind.URING, how, data=data)
            result: int = subject.receive().result
            return result


def skipped() -> bool:
    """Whether the kernel has ever skipped a hook of ours."""
    return state.status().skipped > 0


@pytest.fixture
def subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the model what it begins with: another build of our programs, another node of /dev/kvm, a subject."""
    again = tmp_path / "again.bpf.o"
    again.write_bytes(features.OBJECT.read_bytes() + b"\0")
    monkeypatch.setattr(Model, "objects", (features.OBJECT, again), raising=False)
    monkeypatch.setattr(features, "OBJECT", features.OBJECT)
    for name in ("driver", "driver32"):
        shutil.copy(BUILD / name, "/run")
    node = Path(NODE)
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(10, 232))
    node.chmod(0o666)
    with first_subject() as subject:
        monkeypatch.setattr(Model, "origin", subject, raising=False)
        monkeypatch.setattr(Model, "has_x32", subject.call("getpid", abi=Abi.X32) > 0, raising=False)
        monkeypatch.setattr(Model, "steps", 0)
        yield
    node.unlink()
    assert Model.has_x32 == ("syscall.x32=y" in Path("/proc/cmdline").read_text())


def run(steps: int, machine: type[Model] = Model) -> None:
    """Go about STEPS steps, in runs of 50."""
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=steps // 40 + 2,  # some end early
                stateful_step_count=50,
                deadline=None,
                database=None,
                derandomize=steps <= 1000,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(f"{machine.steps} steps, {'with' if Model.has_x32 else 'without'} x32")
    assert machine.steps >= steps


@pytest.mark.parametrize("place", ["/dev/kvm", NODE, "held", "held path"])
@pytest.mark.parametrize("bits", [64, 32])
def test_every_way_to_open_kvm_grants_who_may_open_it(subjects: None, place: str, bits: int) -> None:
    model = Model()
    try:
        model.begin(Mode.KVM, False)
        model.exec(0, bits)
        (subject,) = model.subjects
        for way in WAYS:
            model.exec(0, bits)  # which ends the grant, and keeps what is held
            model.close(0)
            if place.startswith("held"):
                model.exec(0, 64)
                model.open(0, NODE, "open", "path" if place == "held path" else "read-write")
                model.exec(0, bits)
            assert not subject.process.granted
            model.open(0, place, way, "read-write")
            assert subject.process.granted is (bits in KVM_BITS)
            model.ask(0, 0, misleading=False)
    finally:
        model.teardown()


@pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
@pytest.mark.parametrize("user_mode_only", [False, True])
@pytest.mark.parametrize("bits", [64, 32])
def test_every_way_with_every_flag(subjects: None, mode: Mode, user_mode_only: bool, bits: int) -> None:
    model = Model()
    try:
        model.begin(mode, user_mode_only)
        model.exec(0, bits)
        for flags, misleading in itertools.product(FLAGS, (False, True)):
            model.ask(0, flags, misleading)
    finally:
        model.teardown()


def test_the_kernel_answers_as_the_model_does(subjects: None, steps: int) -> None:
    run(steps)


def test_and_so_does_a_preemptible_kernel_under_load(
    subjects: None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "loaded", True)
    with preemptible(), load():
        run(steps // 4)
