"""What must hold for the policy to do what it promises: one list.

It drives the problems of ``status``, rows of ``doctor``, ``uffdguard_condition`` of ``metrics``, the alerting rules and
the table in docs/seeing.md; ``tests/rules.py`` writes the last two. To add a condition, add the facts that it goes by
to :class:`Facts` and a row to :data:`CONDITIONS`. Pure functions, no I/O.

As in policy.py, no dataclasses, and the annotations are no strings.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from uffdguard.policy import Backend, Policy

Severity = Literal["critical", "warning"]
#: The guard of sysctls: attached and seen to refuse, not so, or impossible on this kernel (no cgroup v2 for BPF).
Guard = Literal["attached", "missing", "unsupported"]
#: Whether a task can be preempted inside of a program; ``lazy`` and ``rt`` preempt as ``full`` does.
Preemption = Literal["none", "voluntary", "lazy", "full", "rt"]


class Facts(NamedTuple):
    """What was found out and not judged yet. By default nothing is amiss: leave out what does not apply."""

    #: What carries the policy out.
    backend: Backend = Backend.LSM
    #: The policy that is set; None where none is, or where it cannot be read.
    policy: Policy | None = None
    #: Whether the policy answered as it must; None where nothing is known.
    answers: bool | None = None
    #: Why it did not answer, or why nothing is known, in a sentence.
    reason: str | None = None
    guard: Guard = "attached"
    #: kernel.ftrace_enabled; None where there is no such sysctl or it cannot be read.
    ftrace_enabled: int | None = None
    #: Whether the kernel skips a program on the LSM hook while another one runs on the same CPU; None: unknown.
    recursion_guard: bool | None = False
    #: Whether no grant is found while another task that looks for one is preempted on the same CPU; None: unknown.
    grants_hidden: bool | None = False
    #: How the kernel preempts; None: unknown.
    preemption: Preemption | None = None
    #: What is wrong with the pins, a sentence each.
    damage: tuple[str, ...] = ()
    #: vm.unprivileged_userfaultfd and what it must be; None where it cannot be read, where nothing is due.
    knob: int | None = None
    due: int | None = None
    #: Why the native knob cannot be reached, in a sentence.
    knob_problem: str | None = None
    #: What is wrong with /dev/userfaultfd, in a sentence; the backend lsm does not go by it.
    device: str | None = None
    #: What is wrong with the files that keep what the backend native has set, a sentence each.
    rules: tuple[str, ...] = ()
    #: What is wrong with /dev/kvm, where that matters.
    kvm: str | None = None
    #: Whether refusals of the native knob are counted.
    native_counted: bool | None = None
    #: Whether the last start came to its end.
    start_complete: bool = True
    #: Whether the value of the native knob before the first start is recorded.
    found_recorded: bool = True
    #: Whether the permissions of /dev/userfaultfd before the first start are, where they matter.
    device_recorded: bool = True
    #: How often the kernel skipped a program, and how often it had when a start last took note.
    skipped: int = 0
    skips_seen: int = 0
    #: Grants that could not be recorded, likewise.
    lost: int = 0
    lost_seen: int = 0
    #: Whether the interface file is covered by a server that is gone.
    interface_dead: bool = False
    #: Whether a procfs besides /proc is mounted, as is needed only while the interface file covers the native one.
    procfs_left: bool = False

    @property
    def preempts(self) -> bool:
        """Whether a task may be preempted anywhere in the kernel; an unknown model counts as that."""
        return self.preemption not in ("none", "voluntary")


class Condition(NamedTuple):
    """Something that must hold."""

    name: str
    severity: Severity
    #: Of the alert.
    alert: str
    #: What is wrong when it fails, without a full stop.
    wrong: str
    #: What to do then, likewise.
    remedy: str
    #: Gives a sentence for each way in which it fails now.
    sentences: Callable[[Facts], Iterator[str]]
    #: Its row in ``doctor``; empty: it concerns the policy and not the machine.
    row: str = ""
    #: The backends that it concerns.
    backends: tuple[Backend, ...] = (Backend.LSM,)


def failing(facts: Facts) -> list[tuple[Condition, str]]:
    """Return each condition that fails, with what is wrong in a sentence; the order is that of the table."""
    return [(condition, sentence) for condition in CONDITIONS for sentence in condition.sentences(facts)]


def _policy_answers(facts: Facts) -> Iterator[str]:
    if facts.answers is False:
        yield facts.reason or "the policy does not answer"
    elif facts.answers is None and facts.reason:
        yield f"cannot tell whether the policy answers: {facts.reason}"


def _ftrace_enabled(facts: Facts) -> Iterator[str]:
    # LSM programs are ftrace direct calls: kernel/trace/ftrace.c makes each of them a nop then.
    if facts.ftrace_enabled == 0:
        yield "kernel.ftrace_enabled is 0: the kernel calls no program of the policy"


def _guard_attached(facts: Facts) -> Iterator[str]:
    if facts.guard == "missing":
        yield "the guard of sysctls does not refuse: kernel.ftrace_enabled and the native knob can be written"


def _preemption(facts: Facts) -> Iterator[str]:
    # Before 6.2 and 6.1.54 bpf_trampoline.c enters LSM programs by way of prog->active, one count a CPU.
    if facts.recursion_guard and facts.preempts:
        yield f"this kernel {_how(facts)}, and skips a decision while another one is preempted on the same CPU"


def _grants_found(facts: Facts) -> Iterator[str]:
    if facts.grants_hidden and facts.preempts:
        yield f"this kernel {_how(facts)}, and finds no grant while another search is preempted on the same CPU"


def _how(facts: Facts) -> str:
    return f"preempts ({facts.preemption})" if facts.preemption else "may preempt"


def _pins_complete(facts: Facts) -> Iterator[str]:
    yield from facts.damage


def _knob_fits(facts: Facts) -> Iterator[str]:
    if facts.knob_problem:
        yield facts.knob_problem
    if facts.due is not None and facts.knob not in (facts.due, None):
        what = "the net below the policy is open" if facts.knob else "processes that the mode allows are refused"
        if facts.knob and facts.backend is Backend.NATIVE:
            what = "everybody may use userfaultfd"
        yield f"the native knob is {facts.knob} and not {facts.due}: {what}"


def _device_fits(facts: Facts) -> Iterator[str]:
    if facts.device:
        yield facts.device


def _rules_fit(facts: Facts) -> Iterator[str]:
    yield from facts.rules


def _kvm_device(facts: Facts) -> Iterator[str]:
    if facts.kvm:
        yield f"{facts.kvm}: it grants nobody"


def _native_counted(facts: Facts) -> Iterator[str]:
    if facts.native_counted is not None and facts.native_counted is not (facts.due == 0):
        yield "a counter is left over" if facts.native_counted else "the refusals of the native knob are not counted"


def _start_complete(facts: Facts) -> Iterator[str]:
    if not facts.start_complete:
        yield "the last start did not come to its end"


def _found_recorded(facts: Facts) -> Iterator[str]:
    if not facts.found_recorded:
        yield "the native knob as it was found is not recorded: stop will leave the native knob at 0"
    if not facts.device_recorded:
        yield "/dev/userfaultfd as it was found is not recorded: stop will leave it to root alone"


def _hooks_not_skipped(facts: Facts) -> Iterator[str]:
    if facts.skipped > facts.skips_seen:
        yield f"the kernel skipped a program of the policy {_times(facts.skipped - facts.skips_seen)}"


def _grants_not_lost(facts: Facts) -> Iterator[str]:
    if facts.lost > facts.lost_seen:
        yield f"an opener of /dev/kvm was not recorded, and is refused, {_times(facts.lost - facts.lost_seen)}"


def _interface_answers(facts: Facts) -> Iterator[str]:
    if facts.interface_dead:
        yield "the interface file does not answer: its server has died"


def _procfs_needed(facts: Facts) -> Iterator[str]:
    if facts.procfs_left:
        yield "a procfs of ours is visible though the native file is not covered"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


START = "uffdguard start repairs it"
BOTH = (Backend.LSM, Backend.NATIVE)
#: What to do where nothing is known of ``policy-answers``.
UNKNOWN = "nothing is known of the policy, and nothing follows from that; see why it cannot be asked, and ask again"

#: In the order in which status lists them.
CONDITIONS = (
    Condition(
        "policy-answers",
        "critical",
        "UffdguardNotInForce",
        "No policy for userfaultfd is in force, or it does not answer",
        "uffdguard start puts it in force, or says why it cannot",
        _policy_answers,
        backends=BOTH,
    ),
    Condition(
        "ftrace-enabled",
        "critical",
        "UffdguardFtraceDisabled",
        "kernel.ftrace_enabled is 0, so that the kernel calls no program of the policy",
        "remove it from sysctl.d and run sysctl -w kernel.ftrace_enabled=1",
        _ftrace_enabled,
        row="ftrace",
    ),
    Condition(
        "guard-attached",
        "critical",
        "UffdguardGuardMissing",
        "The guard of sysctls does not refuse, so that the policy can be switched off by a sysctl",
        START,
        _guard_attached,
        row="guard of sysctls",
    ),
    Condition(
        "preemption",
        "critical",
        "UffdguardPreempts",
        "The kernel preempts and has the recursion guard on LSM programs, so that it skips decisions",
        "boot Linux 6.1.54, 6.2 or newer, or with preempt=voluntary where uname -v says PREEMPT_DYNAMIC",
        _preemption,
        row="preemption",
    ),
    Condition(
        "grants-found",
        "warning",
        "UffdguardHidesGrants",
        "The kernel preempts and may find no grant of a process that has one, which is then refused",
        "boot Linux 6.2 or newer, or with preempt=voluntary where uname -v says PREEMPT_DYNAMIC",
        _grants_found,
        row="grants",
    ),
    Condition(
        "pins-complete",
        "warning",
        "UffdguardPinsDamaged",
        "What is pinned of the policy is incomplete or does not belong together",
        START,
        _pins_complete,
        backends=BOTH,
    ),
    Condition(
        "knob-fits",
        "critical",
        "UffdguardDrift",
        "vm.unprivileged_userfaultfd does not fit the mode, or cannot be reached",
        START,
        _knob_fits,
        backends=BOTH,
    ),
    Condition(
        "device-fits",
        "critical",
        "UffdguardDevice",
        "The permissions of /dev/userfaultfd do not fit the mode, which the backend native goes by",
        START,
        _device_fits,
        backends=(Backend.NATIVE,),
    ),
    Condition(
        "rules-fit",
        "warning",
        "UffdguardRules",
        "The files in /run that keep what the backend native has set are not as they must be",
        START,
        _rules_fit,
        backends=(Backend.NATIVE,),
    ),
    Condition(
        "kvm-device",
        "warning",
        "UffdguardNoKvm",
        "The mode is kvm, and /dev/kvm is absent or another device",
        "load kvm_intel or kvm_amd, and let devtmpfs make /dev/kvm",
        _kvm_device,
        row="KVM",
        backends=BOTH,
    ),
    Condition(
        "native-counted",
        "warning",
        "UffdguardNativeUncounted",
        "The refusals of the native knob are not counted, or a counter of them is left over",
        START,
        _native_counted,
    ),
    Condition(
        "start-complete",
        "warning",
        "UffdguardStartIncomplete",
        "The last start did not come to its end",
        START,
        _start_complete,
        backends=BOTH,
    ),
    Condition(
        "found-recorded",
        "warning",
        "UffdguardFoundLost",
        "The native knob as it was found is not recorded, so that stop will leave it at 0",
        START,
        _found_recorded,
        backends=BOTH,
    ),
    Condition(
        "hooks-not-skipped",
        "warning",
        "UffdguardHooksSkipped",
        "The kernel skipped a program of the policy, so that an opener of /dev/kvm may lack its grant",
        "let whoever is refused open /dev/kvm again; uffdguard start takes note of it",
        _hooks_not_skipped,
    ),
    Condition(
        "grants-not-lost",
        "warning",
        "UffdguardGrantsLost",
        "Openers of /dev/kvm could not be recorded, and are refused",
        "see whether memory is short; let whoever is refused open /dev/kvm again; uffdguard start takes note of it",
        _grants_not_lost,
    ),
    Condition(
        "interface-answers",
        "warning",
        "UffdguardInterfaceDead",
        "The interface file does not answer: its server has died",
        "systemctl restart uffdguard-knob, or uffdguard knob, serves it again",
        _interface_answers,
    ),
    Condition(
        "procfs-needed",
        "warning",
        "UffdguardProcfsLeft",
        "A procfs is left over from the interface file, so that sandboxes may mount one where they otherwise may not",
        "uffdguard start or stop removes it",
        _procfs_needed,
    ),
)
BY_NAME = {condition.name: condition for condition in CONDITIONS}
