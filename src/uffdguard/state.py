"""How things stand: what is pinned, whether it belongs together, what is remembered, and what was decided.

What is in force lives in the kernel: links, programs and maps, pinned in a directory of bpffs that only root may
enter. What else must be remembered until stop lies in /run/uffdguard. Nothing here changes anything.

As in policy.py, the annotations are no strings.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

from uffdguard.conditions import Facts, Guard, failing
from uffdguard.errors import Failure
from uffdguard.kernel import layout, libbpf, native
from uffdguard.policy import Backend, Mode, Policy, Reason

PINS = native.BPFFS / "uffdguard"
#: The native knob as it was found at the first start: written once, removed by stop.
FOUND = native.RUN / "native"
#: The object that was loaded, by its hash: written when a start has come to its end.
LOADED = native.RUN / "object"
#: The server of the interface file holds a lock on this; it has its pid.
SERVER = native.RUN / "knob"

#: What the configuration said of audit at the last start: ``enforce`` or ``audit``.
CONFIGURED = native.RUN / "configured"

#: The mode that the backend ``native`` has set; there while that is in force.
NATIVE_MODE = native.RUN / "mode"

#: Each link is pinned under the name of its program; with the maps that its program uses.
LINKS: dict[str, set[str]] = {
    "grant": {"grants", "counts"},
    "granted": {"grants"},
    "administrators": set(),
    "guard_sysctl": {"counts", "policy", "witness", "events", "watching", "enforcement"},
    "decide": {"grants", "counts", "policy", "witness", "events", "watching"},
}
#: Pinned themselves, to be attached while the native knob is 0: then their links are pinned too, see :func:`link_of`.
COUNTERS = {name: {"grants", "counts", "policy", "witness", "events", "watching"} for name in ("native", "native32")}
USES = LINKS | COUNTERS
#: The order of pinning: ``decide`` last, so that a process that finds it finds all the others too.
PARTS = ("grants", "counts", "policy", "witness", "events", "watching", "enforcement", *COUNTERS, *LINKS)


def link_of(counter: str) -> str:
    """Return the name under which the link of a counter of native refusals is pinned."""
    return f"{counter}-link"


def is_counting(counter: str, program: libbpf.ProgramInfo) -> bool:
    """Tell whether a counter of native refusals is attached: by a pinned link of this PROGRAM."""
    try:
        link = libbpf.get(PINS / link_of(counter))
    except OSError:
        return False
    try:
        # Not by libbpf.program_of_link(), which needs CAP_SYS_ADMIN: the server of the interface file has none.
        return bool(libbpf.info(link, libbpf.LinkInfo).prog_id == program.id)
    finally:
        os.close(link)


class Pinned:
    """What is pinned: descriptors by name, and what is wrong with them."""

    def __init__(self) -> None:
        #: Of links and programs, the pinned ones; of maps, those that the pinned ``decide`` uses, else the pinned ones.
        self.fds: dict[str, int] = {}
        self.programs: dict[str, libbpf.ProgramInfo] = {}
        self.pins: set[str] = set()
        self.problems: list[str] = []
        #: Whether the refusals of the native knob are counted.
        self.counts_native = False
        #: Whether this kernel can guard sysctls, as far as it matters: where the guard is pinned it can.
        self.can_guard = True

    def has(self, *links: str) -> bool:
        """Tell whether these links are pinned, and use the maps in ``fds``."""
        return all(link in self.programs for link in links)

    @property
    def skipped(self) -> int:
        """How many times the kernel has skipped a program of ours."""
        return sum(program.recursion_misses for program in self.programs.values())

    @property
    def complete(self) -> bool:
        """Whether everything is there and belongs together."""
        return bool(self.pins) and not self.problems

    def policy(self) -> Policy | None:
        """Return the policy that is set, or None when its map is not there or says nothing known."""
        if "policy" not in self.fds:
            return None
        return read_policy(self.fds["policy"])


def backend() -> Backend | None:
    """Return what carries a policy out now, or is to, where it is damaged; for root alone.

    In a change from one to the other that is not done yet, both are there; it is done by a start of ``lsm``.
    """
    if LOADED.exists() or (PINS / "decide").exists():
        return Backend.LSM
    return Backend.NATIVE if NATIVE_MODE.exists() else None


def read_policy(fd: int) -> Policy | None:
    """Return what a ``policy`` map says, or None when it is nothing known."""
    try:
        return libbpf.read(fd, layout.Word).policy()
    except (OSError, IndexError):
        return None


def knob_of(policy: Policy) -> int:
    """Return what the native knob is to be under POLICY: as it was found, where nothing is enforced."""
    return found_knob(otherwise=0) if policy.audit else policy.mode.native_value


def found_knob(*, otherwise: int) -> int:
    """Return the native knob as it was found, or OTHERWISE where that is not recorded; what cannot be read is 0."""
    try:
        return int(FOUND.read_bytes().strip() == b"1")
    except FileNotFoundError:
        return otherwise


def server() -> int | None:
    """Return the pid of the running server of the interface file, or None when none runs.

    :raises Failure: one runs and its record is damaged.
    """
    try:
        fd = os.open(SERVER, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        record = os.read(fd, 20)
        # Empty: it has just begun.
        if record and not re.fullmatch(rb"[1-9][0-9]{0,6}\n", record):
            raise Failure(
                f"{SERVER} does not name the server of the interface file", "end uffdguard knob and run it again"
            ) from None
        return int(record or 0) or None
    finally:
        os.close(fd)
    return None


def foreign_pins() -> str | None:
    """Tell what is wrong with the directory of the pins: a bpffs may let anybody make one of that name."""
    try:
        found = PINS.lstat()
    except OSError:
        return None
    # One of root's that is closed to all others is what an older version or a kill has left.
    ours = found.st_uid == native.OWNER or (found.st_uid == 0 and not stat.S_IMODE(found.st_mode) & 0o077)
    return None if stat.S_ISDIR(found.st_mode) and ours else f"{PINS} is not a directory that only root may enter"


@contextlib.contextmanager
def pinned() -> Iterator[Pinned]:
    """Open everything that is pinned, and see whether it belongs together."""
    with contextlib.ExitStack() as stack:
        found = Pinned()
        if problem := foreign_pins():
            found.problems.append(problem)
            yield found
            return
        used: dict[str, dict[str, int]] = {}
        for part in PARTS:
            try:
                fd = found.fds[part] = libbpf.get(PINS / part)
            except OSError as error:
                if part == "guard_sysctl" and found.pins and not _can_guard():
                    found.can_guard = False
                    continue
                found.problems.append(f"{part} is not pinned ({os.strerror(error.errno or 0)})")
                continue
            stack.callback(os.close, fd)
            found.pins.add(part)
            if part not in USES:
                continue
            try:
                program = libbpf.program_of_link(fd) if part in LINKS else libbpf.info(fd, libbpf.ProgramInfo)
                if program.name.decode() != part:
                    raise OSError(errno.EINVAL, "")
                maps = libbpf.maps_of(program, {layout.map_name(name)[:15]: name for name in USES[part]})
            except OSError as error:
                kind = "link" if part in LINKS else "program"
                found.problems.append(f"{part} is not a {kind} of ours ({os.strerror(error.errno or 0)})")
                continue
            for fd in maps.values():
                stack.callback(os.close, fd)
            found.programs[part] = program
            used[part] = maps
        guarded = {name: fd for name, fd in used.get("guard_sysctl", {}).items() if name == "enforcement"}
        for name, fd in (guarded | used.get("decide", {})).items():
            if name in found.pins and not libbpf.same_map(fd, found.fds[name]):
                user = "guard_sysctl" if name in guarded else "decide"
                found.problems.append(f"{user} does not use the pinned {name}")
            found.fds[name] = fd
        for link, maps in used.items():
            strange = [name for name in USES[link] if not libbpf.same_map(maps.get(name), found.fds.get(name))]
            if strange:
                found.problems.append(f"{link} does not use the {' and '.join(sorted(strange))} of decide")
                del found.programs[link]
        found.counts_native = "native" in found.programs and is_counting("native", found.programs["native"])
        yield found


def _can_guard() -> bool:
    from uffdguard.kernel import features

    return features.has_sysctl_guard()


def not_in_force(reason: str | None = None) -> Failure:
    """Return what to say where no policy is in force: on a kernel without the hook, what start would say.

    :param reason: why it is not, as Status has it.
    """
    from uffdguard.kernel import features

    if backend() is Backend.NATIVE:
        return Failure(
            "the backend native is in force, by which nothing is counted, logged or served",
            "uffdguard start --backend lsm, on a kernel with bpf among its LSMs, can do that",
        )
    hook = features.hook()
    if hook.state == "missing":
        return Failure(f"the policy is not in force: {hook.fact}", hook.hint)
    return Failure(f"the policy is not in force{f': {reason}' if reason else ''}", "run uffdguard start")


def current_policy() -> Policy:
    """Return the policy in force.

    :raises Failure: none is in force, or it cannot be told.
    """
    native.need_root("can see the mode")
    if backend() is Backend.NATIVE:
        from uffdguard import native_backend

        if policy := native_backend.policy():
            return policy
    with pinned() as found:
        policy = found.policy()
        if policy is None or not found.has("decide"):
            raise not_in_force()
        return policy


#: What /proc/sys/vm/unprivileged_userfaultfd is: the kernel's own file, ours, or ours without a server.
Interface = Literal["native", "served", "dead"]


def interface() -> Interface:
    """Tell what the interface file is."""
    if not native.is_covered():
        return "native"
    return "served" if server() else "dead"


class Status(NamedTuple):
    """How things stand. The names are those of ``status --json``."""

    in_force: bool  # it was asked, and answered
    answers: bool | None  # None: a policy is set and could not be asked, so that nothing is known
    reason: str | None  # why it is not, where it should be
    mode: Mode | None
    user_mode_only: bool | None
    audit: bool | None  # refusals are counted and told, and let pass
    since: str | None  # local time, ISO 8601
    kernel: str
    native_knob: int | None  # None: it cannot be read
    drift: bool  # the native knob does not fit the mode
    pins: dict[str, bool]
    skipped: int  # times the kernel skipped a program
    lost: int  # grants that could not be recorded
    guard: Guard | None  # None: no policy is in force, or it could not be asked
    interface: Interface
    grants: int  # processes that are granted
    allowed: int
    refused: int
    decisions: dict[Reason, int]
    native: int  # refused by the native knob, before the policy was asked
    let_pass: int  # of the refused, those that audit let pass
    suppressed: int  # events over a limit
    sysctl_refused: int  # writes to sysctls that the guard refused
    problems: list[str]  # a sentence each
    failing: list[str]  # the names of the conditions that these are about, see conditions.py
    backend: Backend | None = Backend.LSM  # None: no policy is set
    device: str | None = None  # who may open /dev/userfaultfd, where the backend goes by that
    weaker: tuple[str, ...] = ()  # what the backend does not do of what lsm does, a sentence each


class Doubts(NamedTuple):
    """Why what is pinned is not in force, or may not be."""

    policy: str | None = None
    #: Whether the policy answered as it must; None: nothing is known.
    answers: bool | None = None
    guard: Guard = "attached"


def ask(found: Pinned, policy: Policy | None) -> Doubts:
    """Ask the policy and the guard of sysctls that are pinned; for whoever has the lock.

    Where the policy does not answer, the native knob is closed if that protects: :func:`uffdguard.proof.close_net`.
    """
    from uffdguard import proof

    if not native.in_initial("pid"):
        return Doubts("it cannot be asked from another pid namespace")
    guard: Guard = "attached"
    try:
        with proof.Asker() as asker, native.Knob() as knob:
            try:
                proof.ask_guard(found.fds["witness"], knob)
            except Failure:
                guard = "missing"
            try:
                proof.see(found.fds, policy, asker, knob)
            except proof.Silence:
                raise
            except Failure as error:
                return Doubts(error.what, False, guard)
    except (Failure, OSError) as error:
        return Doubts(f"it could not be asked: {error}", None, guard)
    return Doubts(None, True, guard)


def status() -> Status:
    """Find out how things stand, and ask the policy; below one that does not answer the native knob may be closed."""
    from uffdguard.lock import locked

    native.need_root("can see the state of the policy")
    with contextlib.ExitStack() as stack:
        doubts = None
        if backend() is Backend.NATIVE:
            from uffdguard import native_backend

            stack.enter_context(locked())
            return native_backend.status(interface())
        if PINS.exists():
            # Before the pins are opened: whoever stops the policy waits until nobody has it open any more.
            try:
                stack.enter_context(locked())
            except (Failure, OSError) as error:
                doubts = Doubts(f"it could not be asked: {error}")
        found = stack.enter_context(pinned())
        policy = found.policy() if found.has("decide") else None
        if not policy:
            doubts = Doubts("it is not pinned" if found.pins else None)
        doubts = doubts or ask(found, policy)
        counts = kept = None
        with contextlib.suppress(OSError, KeyError):
            counts = libbpf.read(found.fds["counts"], layout.Counts).total()
            kept = libbpf.read(found.fds["enforcement"], layout.Enforcement)
        knob = unread = None
        try:
            knob = native.read_knob()
        except Failure as error:
            unread = error.what
        left = bool(found.pins) or bool(foreign_pins()) or FOUND.exists() or LOADED.exists()
        due = knob_of(policy) if policy else None
        file = interface()
        damage = list(found.problems) if left else []
        if NATIVE_MODE.exists():
            damage.append("what the backend native has set is left over from a change to or from it")
        facts = Facts(policy=policy, damage=tuple(damage), interface_dead=file == "dead")
        facts = facts._replace(procfs_left=file == "native" and native.shows_procfs())
        if policy:
            if counts is None or kept is None:
                other = "the counts are those of another version of uffdguard"
                facts = facts._replace(damage=(*facts.damage, other))
            facts = _with_machine(facts)._replace(
                answers=doubts.answers,
                reason=doubts.policy,
                guard=doubts.guard if found.can_guard else "unsupported",
                knob=knob,
                due=due,
                knob_problem=unread,
                kvm=native.wrong_kvm() if policy.mode is Mode.KVM else None,
                native_counted=found.counts_native,
                start_complete=LOADED.exists(),
                found_recorded=FOUND.exists(),
                skipped=found.skipped,
                skips_seen=kept.skips_seen if kept else 0,
                lost=counts.lost if counts else 0,
                lost_seen=kept.lost_seen if kept else 0,
            )
        wrong = failing(facts)
        counts = counts or layout.Tally()
        decisions = counts.by_reason()
        return Status(
            in_force=bool(policy and doubts.answers),
            answers=doubts.answers if policy else False,
            reason=doubts.policy,
            mode=policy.mode if policy else None,
            user_mode_only=policy.user_mode_only if policy else None,
            audit=policy.audit if policy else None,
            since=_local_time(found.programs["decide"].load_time) if policy else None,
            kernel=os.uname().release,
            native_knob=knob,
            drift=due is not None and knob not in (due, None),
            pins={part: part in found.pins for part in PARTS},
            skipped=found.skipped,
            lost=counts.lost,
            guard=facts.guard if policy and doubts.answers is not None else None,
            interface=file,
            grants=len(granted(found)) if policy else 0,
            allowed=sum(number for reason, number in decisions.items() if reason.allowed),
            refused=counts.native + sum(number for reason, number in decisions.items() if not reason.allowed),
            decisions=decisions,
            native=counts.native,
            let_pass=counts.let_pass,
            suppressed=counts.suppressed,
            sysctl_refused=counts.sysctl,
            problems=[sentence for _, sentence in wrong],
            failing=list(dict.fromkeys(condition.name for condition, _ in wrong)),
            backend=Backend.LSM if policy else None,
        )


def granted(found: Pinned) -> set[int]:
    """Return the pids of the processes that are granted; none where their list is not pinned."""
    with contextlib.suppress(OSError, KeyError):
        return set(memoryview(libbpf.iterate(found.fds["granted"])).cast("i"))
    return set()


def _with_machine(facts: Facts) -> Facts:
    """Add what is known of the machine to FACTS."""
    from uffdguard.kernel import features

    facts = facts._replace(ftrace_enabled=features.ftrace_enabled())
    facts = facts._replace(preemption=features.preemption(), recursion_guard=False)
    # To look into the kernel's BTF takes 10 ms.
    if not facts.preempts:
        return facts
    return facts._replace(recursion_guard=features.recursion_guard(), grants_hidden=features.hides_grants())


def _local_time(since_boot: int) -> str:
    """Return a kernel's time since boot, in ns, as local time, ISO 8601 to the second."""
    seconds = time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - since_boot) / 1e9
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
