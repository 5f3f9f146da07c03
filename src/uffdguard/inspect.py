"""Who holds what now; why would this process be refused. Creates nothing, changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import stat
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from uffdguard import state
from uffdguard.conditions import UNKNOWN
from uffdguard.errors import Failure, one_line
from uffdguard.kernel import execve, features, layout, libbpf, native
from uffdguard.lock import locked
from uffdguard.policy import Backend, Mode, Policy, Request, decide
from uffdguard.steps import log

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = TypeVar("Record", bound=ctypes.Structure)

OBJECT = Path(libbpf.__file__).with_name("inspect.bpf.o")

#: The reason of a verdict that the kernel's own knob gives.
NATIVE = "native"
#: The reason of a verdict where a refusal is not enforced.
AUDIT = "audit"


@dataclass(frozen=True)
class Setting:
    """What is in force: a policy or none, above the native knob."""

    policy: Policy | None
    knob: int | None  # None: it cannot be read
    #: Whether the option user-mode-only is known: it is root's to see, the mode is everybody's.
    option: bool = True
    #: The backend native has set the knob.
    native: bool = False


@dataclass(frozen=True)
class Verdict:
    """The answer to a request, and its reason: a policy.Reason, ``native`` or ``audit``."""

    allowed: bool
    reason: str


def verdict(setting: Setting, request: Request) -> Verdict:
    """Return what the system call answers: the kernel's own knob comes first, and can only refuse."""
    reason = decide(setting.policy, request) if setting.policy else None
    audited = setting.policy is not None and setting.policy.audit and reason is not None and not reason.allowed
    if reason and not reason.allowed and not audited:
        return Verdict(False, reason)
    if setting.knob == 0 and not (request.capability or request.user_mode_only):
        return Verdict(False, NATIVE)
    return Verdict(True, AUDIT if audited else reason or NATIVE)


def setting_of(found: state.Pinned) -> Setting:
    """Return what is in force; the caller may see the pins.

    :raises Failure: it cannot be told.
    """
    policy = found.policy() if found.has("decide") else None
    if policy is None and (found.pins or state.server()):
        problems = ", ".join(found.problems) or "its map cannot be read"
        raise Failure(f"the policy is damaged: {problems}", "run uffdguard start")
    by_native = state.backend() is Backend.NATIVE
    try:
        return Setting(policy, native.read_knob(), native=by_native)
    except Failure:
        return Setting(policy, None, native=by_native)


def answered(found: state.Pinned) -> Setting:
    """Return what is in force, and has answered.

    :raises Failure: it has not, or it cannot be told.
    """
    setting = setting_of(found)
    doubts = state.ask(found, setting.policy) if setting.policy else state.Doubts()
    if setting.policy and doubts.answers is None:
        raise Failure(f"cannot tell whether the policy is in force: {doubts.policy}", UNKNOWN)
    if doubts.policy:
        raise state.not_in_force(doubts.policy)
    return setting


@contextlib.contextmanager
def _pinned() -> Iterator[state.Pinned]:
    """Open what is pinned under the lock: whoever asks the policy has it."""
    with contextlib.ExitStack() as stack:
        if state.PINS.exists():
            stack.enter_context(locked())
        yield stack.enter_context(state.pinned())


def blindness() -> Failure | None:
    """Return what keeps this process from seeing the pins and all processes, if anything does."""
    for check in (features.privileges, features.namespaces):
        row = check()
        if row.state == "missing":
            return Failure(f"cannot see the policy and the processes: {row.fact}", row.hint)
    return None


# What the kernel tells.


@contextlib.contextmanager
def looking() -> Iterator[tuple[Setting, libbpf.Object]]:
    """Load the iterators, with the grants of the policy that is in force; give the setting and them.

    :raises Failure: nothing can be seen from here.
    """
    if failure := blindness():
        raise failure
    try:
        with libbpf.Object(OBJECT) as obj:
            layout.check_records(obj)
            # Not for longer: a descriptor of a link keeps its program deciding.
            with _pinned() as found:
                setting = answered(found)
                if setting.policy:
                    obj.reuse("grants", found.fds["grants"])
                obj.load()
            yield setting, obj
    except OSError as error:
        log.debug("%s", "\n".join(libbpf.messages))
        raise Failure(
            f"cannot look at the processes: {features.load_error(error)}", features.load_hint(error)
        ) from error


def records(obj: libbpf.Object, program: str, kind: type[Record]) -> ctypes.Array[Record]:
    """Return what an iterator writes."""
    data = obj.run_iterator(program)
    return (kind * (len(data) // ctypes.sizeof(kind))).from_buffer_copy(data)


def command_of(thread: layout.Thread) -> str:
    """Return the name that a thread's process has given itself, which may be any bytes."""
    return one_line(thread.comm.decode(errors="backslashreplace"))


# Who holds what.


@dataclass(frozen=True)
class Holder:
    """A process that holds something. The names are those of ``holders --json``."""

    pid: int
    uid: int
    user: str
    command: str
    unit: str
    cgroup: str
    userfaultfds: int
    kvm: bool
    granted: bool
    #: What its threads would get; one unless they differ.
    verdicts: list[Verdict]


def holders(setting: Setting, obj: libbpf.Object) -> list[Holder]:
    """Return every process that has a userfaultfd or /dev/kvm open, or a grant."""
    files = {(one.tgid, one.file, one.kvm) for one in records(obj, "descriptors", layout.Descriptor)}
    threads = records(obj, "threads", layout.Thread)
    kvm = {pid for pid, _, is_kvm in files if is_kvm}
    numbers = Counter(pid for pid, _, is_kvm in files if not is_kvm)
    processes: dict[int, list[layout.Thread]] = {}
    for thread in threads:
        if thread.granted or thread.tgid in kvm or thread.tgid in numbers:
            processes.setdefault(thread.tgid, []).append(thread)
    return [_holder(setting, threads, numbers[pid], pid in kvm) for pid, threads in sorted(processes.items())]


def _holder(setting: Setting, threads: list[layout.Thread], userfaultfds: int, kvm: bool) -> Holder:
    first = threads[0]
    cgroup = _cgroup(first.tid)
    verdicts = {verdict(setting, Subject.of(thread).request): None for thread in threads}
    return Holder(
        pid=first.tgid,
        uid=first.uid,
        user=user_of(first.uid),
        command=command_of(first),
        unit=one_line(unit(cgroup)),
        cgroup=one_line(cgroup),
        userfaultfds=userfaultfds,
        kvm=kvm,
        granted=bool(first.granted),
        verdicts=list(verdicts),
    )


@functools.lru_cache(1024)
def user_of(uid: int) -> str:
    """Return the name of a user, or the uid where it has none."""
    import pwd

    try:
        return one_line(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _cgroup(tid: int) -> str:
    """Return the path of a thread's control group, or nothing where the thread has ended or has none."""
    try:
        with open(f"/proc/{tid}/cgroup", "rb") as file:
            return control_group(file.read().decode(errors="backslashreplace"))
    except OSError:
        return ""


def control_group(text: str) -> str:
    """Return the path in a /proc/PID/cgroup that systemd goes by: version 2's, or that of its own hierarchy."""
    rows = [line.split(":", 2) for line in text.split("\n") if line.count(":") >= 2]
    named = {controllers: path for _, controllers, path in rows}
    return named.get("name=systemd") or named.get("") or ""


@functools.lru_cache(1024)
def unit(cgroup: str) -> str:
    """Return the systemd units, pods and containers that a control group is in, outermost first.

    All of them, because who was given a control group names those below as it likes.
    """
    found = []
    for part in cgroup.split("/"):
        identifier = re.fullmatch(r"(?:(.+)-)?([0-9a-f]{12})[0-9a-f]{52}(?:\.scope)?", part)
        if pod := re.fullmatch(r"(?:kubepods.*-)?pod([0-9a-f_-]{32,36})(?:\.slice)?", part):
            found.append(f"pod {pod[1].replace('_', '-')}")
        elif identifier:
            found.append("-".join(filter(None, identifier.groups())))
        elif part.endswith((".service", ".scope")) or part.startswith("lxc.payload."):
            found.append(part)
    return "/".join(found)


# Why would this one be refused.


@dataclass(frozen=True)
class Subject:
    """Who would ask: what to call it, and what is asked about it."""

    name: str
    #: CAP_SYS_PTRACE, in whatever user namespace.
    effective: bool
    #: In the initial user namespace.
    initial: bool
    granted: bool = False
    #: It is there, and is no program that is yet to be started.
    running: bool = True

    @classmethod
    def of(cls, thread: layout.Thread) -> Subject:
        """Return a thread."""
        return cls(
            f"pid {thread.tid} ({command_of(thread)})",
            bool(thread.effective),
            bool(thread.initial),
            bool(thread.granted),
        )

    @property
    def request(self) -> Request:
        """What the decision asks about, for a request without flags."""
        return Request(capability=self.effective and self.initial, kvm=self.granted)

    @property
    def capability(self) -> str:
        """What is to be said of its capability, after its name."""
        if not self.initial:
            return "is not in the initial user namespace, where alone CAP_SYS_PTRACE counts"
        return f"has {'' if self.effective else 'no '}CAP_SYS_PTRACE effective"


@dataclass(frozen=True)
class Answer:
    """What a subject would get, and why. The names are those of ``check --json``."""

    subject: str
    allowed: bool
    reason: str
    why: str
    mode: Mode | None
    native_knob: int | None
    capability: bool
    granted: bool
    #: Of a request with UFFD_USER_MODE_ONLY; None: it cannot be told.
    user_mode_only: Verdict | None
    would_allow: list[str]


def check_process(setting: Setting, obj: libbpf.Object, pid: int) -> Answer:
    """Return what the thread PID would get.

    :raises Failure: there is none, or it cannot be told.
    """
    threads = [one for one in records(obj, "threads", layout.Thread) if pid in (one.tid, one.tgid)]
    for thread in threads:
        if thread.tid == pid:
            return answer(setting, Subject.of(thread))
    if threads:
        others = ", ".join(str(thread.tid) for thread in threads)
        raise Failure(f"the thread that began process {pid} has ended", f"ask about one of the others: {others}")
    raise Failure(f"no process or thread {pid} that runs a program", "see ps -eL")


def check_command(words: tuple[str, ...]) -> Answer:
    """Return what the program of WORDS would get, started by the caller.

    :raises Failure: there is none, or it cannot be told.
    """
    program = execve.find(words[0])
    initial = native.in_initial("user")
    capabilities = execve.effective(execve.Caller.current(), program) if initial else 0
    effective = bool(capabilities >> native.CAP_SYS_PTRACE & 1)
    return answer(visible_setting(), Subject(one_line(words[0]), effective, initial, running=False))


def visible_setting() -> Setting:
    """Return what is in force, as far as this process may see it.

    :raises Failure: it may not.
    """
    failure = blindness()
    if failure is None:
        with _pinned() as found:
            return answered(found)
    if native.is_covered():
        line = native.FILE.read_text()
        return Setting(Policy(Mode(line.split("[")[1].split("]")[0])), None, option=False)
    raise failure


def answer(setting: Setting, subject: Subject) -> Answer:
    """Put together the verdict on SUBJECT, the facts behind it, and what would allow it."""
    found = verdict(setting, subject.request)
    asked = subject.request._replace(user_mode_only=True)
    return Answer(
        subject=subject.name,
        allowed=found.allowed,
        reason=found.reason,
        why=why(setting, subject, found),
        mode=setting.policy.mode if setting.policy else None,
        native_knob=setting.knob,
        capability=subject.request.capability,
        granted=subject.granted,
        user_mode_only=verdict(setting, asked) if setting.option or found.allowed else None,
        would_allow=[] if found.allowed else list(would_allow(setting, subject)),
    )


def why(setting: Setting, subject: Subject, found: Verdict) -> str:
    """Return the facts behind a verdict, in words."""
    who = subject.name if subject.running else f"{subject.name}, as the caller would start it,"
    match found.reason:
        case "capability":
            return f"{who} {subject.capability}, in the initial user namespace"
        case "enabled":
            return "mode is enabled"
        case "kvm":
            return (
                f"mode is kvm, and {who} has opened /dev/kvm since its last exec,"
                " or held it when the policy was first put in force"
            )
        case "no-kvm":
            opened = (
                "was not seen to open /dev/kvm since its last exec" if subject.running else "is yet to open /dev/kvm"
            )
            return f"mode is kvm, and {who} {opened}; it {subject.capability}"
        case "audit" if setting.policy:
            enforced = replace(setting, policy=setting.policy._replace(audit=False))
            refusal = verdict(enforced, subject.request)
            return f"in audit a refusal is let pass; this one ({refusal.reason}): {why(enforced, subject, refusal)}"
        case "disabled":
            return f"mode is disabled, and {who} {subject.capability}"
    if setting.policy and setting.policy.audit:
        return f"in audit vm.unprivileged_userfaultfd is left as it was, which is 0, and {who} {subject.capability}"
    if setting.policy:
        return f"vm.unprivileged_userfaultfd is 0, which does not fit mode {setting.policy.mode}"
    if setting.native:
        return (
            f"by the backend native vm.unprivileged_userfaultfd is {setting.knob}, and {who} {subject.capability};"
            " the permissions of /dev/userfaultfd are not looked at"
        )
    return f"no policy is in force, vm.unprivileged_userfaultfd is {setting.knob}, and {who} {subject.capability}"


def would_allow(setting: Setting, subject: Subject) -> Iterator[str]:
    """Yield each single change that would have SUBJECT allowed, tried on the table itself."""
    opened = "to open /dev/kvm itself: a descriptor that it inherits or receives does not count"
    request = subject.request
    policy = setting.policy
    if verdict(setting, request._replace(kvm=True)).allowed:
        yield opened
    if verdict(setting, request._replace(capability=True)).allowed:
        yield "CAP_SYS_PTRACE effective, in the initial user namespace"
    audit = policy is not None and policy.audit
    if policy and audit:
        # Only the knob refuses there, and it stays as it was found.
        yield "to ask with UFFD_USER_MODE_ONLY"
        if verdict(Setting(policy._replace(audit=False), 1), request).allowed:
            yield "uffdguard start --enforce, which sets the knob"
    elif not setting.native and verdict(replace(setting, knob=1), request).allowed:
        yield "uffdguard start, which sets the knob" if policy else "vm.unprivileged_userfaultfd = 1, for everybody"
    for mode in native.modes():
        if (policy and mode is policy.mode) or (setting.native and mode is not Mode.ENABLED):
            continue
        command = f"uffdguard {'start --enforce --mode' if audit else 'mode' if policy else 'start --mode'} {mode}"
        other = Setting(Policy(mode, bool(policy and policy.user_mode_only)), mode.native_value)
        if verdict(other, request).allowed:
            yield command + (", for everybody" if mode is Mode.ENABLED else "")
        elif verdict(other, request._replace(kvm=True)).allowed:
            yield f"{command}, and {opened}"
    if policy and not audit and setting.option and not policy.user_mode_only:
        other = replace(setting, policy=policy._replace(user_mode_only=True))
        if verdict(other, request._replace(user_mode_only=True)).allowed:
            yield 'to ask with UFFD_USER_MODE_ONLY, with user-mode-only = "allow" in the configuration'
    device = Setting(policy, None)
    if verdict(device, request).allowed:
        with contextlib.suppress(OSError):
            mode_of = stat.filemode(native.DEV_USERFAULTFD.stat().st_mode)
            yield f"/dev/userfaultfd ({mode_of}), for who can open it: it does not ask the knob"
