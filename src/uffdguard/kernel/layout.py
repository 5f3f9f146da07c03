"""The structures shared with guard.bpf.c and inspect.bpf.c, one definition each, compared with their BTF at load."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_uint8, c_uint32, c_uint64
from typing import TYPE_CHECKING, Any, get_args

from uffdguard.errors import Failure
from uffdguard.policy import Mode, Policy, Reason, Way

if TYPE_CHECKING:
    from uffdguard.kernel.libbpf import Object

MODES = tuple(Mode)
REASONS = tuple(Reason)


class Word(ctypes.Structure):
    """``struct policy_bits``: the mode and the options in one byte."""

    _fields_ = (("mode", c_uint8, 2), ("user_mode_only", c_uint8, 1), ("audit", c_uint8, 1))

    @classmethod
    def of(cls, policy: Policy) -> Word:
        """Return POLICY as the kernel side keeps it."""
        return cls(MODES.index(policy.mode), policy.user_mode_only, policy.audit)

    def policy(self) -> Policy:
        """Return the policy that this word says."""
        return Policy(MODES[self.mode], bool(self.user_mode_only), bool(self.audit))


class Tally(ctypes.Structure):
    """``struct tally``: what has been decided since the first start, on some CPUs or on all."""

    _fields_ = (
        ("decisions", c_uint64 * len(REASONS)),
        ("native", c_uint64),
        ("let_pass", c_uint64),
        ("suppressed", c_uint64),
        ("lost", c_uint64),
        ("sysctl", c_uint64),
        ("unused", c_uint64 * 5),
    )

    def by_reason(self) -> dict[Reason, int]:
        """Return the number of decisions for each reason."""
        return dict(zip(REASONS, self.decisions, strict=True))


class Counts(ctypes.Structure):
    """``struct counts``: a tally for each CPU, or for some of them together."""

    _fields_ = (("of", Tally * 64),)

    def total(self) -> Tally:
        """Return the sum of all."""
        numbers = ctypes.sizeof(Tally) // 8
        all_of = memoryview(self).cast("B").cast("Q").tolist()
        sums = (sum(all_of[number::numbers]) for number in range(numbers))
        return Tally.from_buffer((c_uint64 * numbers)(*sums))


class Witness(ctypes.Structure):
    """``struct witness``: whose decisions are watched, and what was decided; until when those of all are."""

    _fields_ = (
        ("tgid", c_int32),
        ("all_until", c_uint32),  # s since boot
        ("strict", c_uint32),
        ("decisions", c_uint32),
        ("reason", c_uint32),
        ("questions", c_uint32),
        ("until", c_uint32),  # s since boot
        ("unused", c_uint32),
    )


class Enforcement(ctypes.Structure):
    """``struct enforcement``: what keeps the policy in force, beside the policy itself."""

    _fields_ = (
        ("knob", c_uint32),
        ("zero", c_uint32),
        ("unanswered_since", c_uint64),  # ns since boot; 0: it answers
        ("skips_seen", c_uint64),
        ("lost_seen", c_uint64),
        ("room", c_uint64 * 4),
    )


class Event(ctypes.Structure):
    """``struct event``: a decision, or a refused sysctl, for events.py."""

    _fields_ = (
        ("number", c_uint64),
        ("time", c_uint64),  # ns since boot
        ("cgroup", c_uint64),
        ("exe_inode", c_uint64),
        ("exe_device", c_uint32),  # the kernel's own dev_t: 12 bits, 20 bits
        ("pid", c_int32),
        ("tid", c_int32),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("owner", c_uint32),
        ("flags", c_uint32),
        ("way", c_uint8),
        ("reason", c_uint8),
        ("mode", c_uint8),
        ("enforced", c_uint8),
        ("initial", c_uint8),
        ("capability", c_uint8),
        ("granted", c_uint8),
        ("sysctl", c_uint8),
        ("command", c_char * 16),
        ("executable", c_char * 40),
    )


class Slot(ctypes.Structure):
    """``struct slot``: a value of the map ``events``."""

    _fields_ = (("lock", c_uint32), ("event", Event))


class Watching(ctypes.Structure):
    """``struct watching``: the number of the newest event, and the limits."""

    _fields_ = (
        ("told", c_uint64),
        ("window", c_uint64),
        ("per_owner", c_uint32),
        ("total", c_uint32),
        ("round", c_uint32),
        ("unused", c_uint32),
    )


class Thread(ctypes.Structure):
    """``struct thread`` of inspect.bpf.c: what the decision asks about, for one thread."""

    _fields_ = (
        ("tgid", c_int32),
        ("tid", c_int32),
        ("uid", c_uint32),
        ("granted", c_uint8),
        ("effective", c_uint8),
        ("initial", c_uint8),
        ("unused", c_uint8),
        ("comm", c_char * 16),
    )


class Descriptor(ctypes.Structure):
    """``struct descriptor`` of inspect.bpf.c: one of a userfaultfd or of /dev/kvm."""

    _fields_ = (("file", c_uint64), ("tgid", c_int32), ("kvm", c_uint32))


#: The maps of global data, each of one value, and what that value is. In the object: ``.data.NAME``.
VALUES: dict[str, type[ctypes.Structure]] = {
    "policy": Word,
    "counts": Counts,
    "witness": Witness,
    "watching": Watching,
    "enforcement": Enforcement,
}

#: The other maps, and what their values are.
ENTRIES: dict[str, type[ctypes.Structure]] = {"events": Slot}

#: The ways to ask, in the order of ``enum way``.
WAYS: tuple[Way, ...] = get_args(Way)

#: The sysctls that are guarded, in the order of ``enum sysctl``, from 1: 0 is none of them.
SYSCTLS = ("kernel.ftrace_enabled", "vm.unprivileged_userfaultfd")

#: The same of inspect.bpf.c: what its iterators write.
RECORDS: dict[str, type[ctypes.Structure]] = {"thread": Thread, "descriptor": Descriptor}


def map_name(name: str) -> str:
    """Return the object's name of one of our maps."""
    return f".data.{name}" if name in {**VALUES, **RECORDS} else name


def _bits(field: Any) -> int:
    """Return a member's offset in bits; ctypes keeps a bit-field's in the low half of its size."""
    offset: int = field.offset * 8 + (field.size & 0xFFFF if field.size >> 16 else 0)
    return offset


def _members(kind: type[ctypes.Structure]) -> dict[str, int]:
    return {field[0]: _bits(getattr(kind, field[0])) for field in kind._fields_}


def check(obj: Object) -> None:
    """Compare the definitions here with those in guard.bpf.o.

    :raises Failure: they differ; the object was built from another source.
    """
    expected: dict[str, object] = {
        "enum mode": {f"MODE_{word.name}": number for number, word in enumerate(MODES)},
        "enum reason": {f"REASON_{word.name}": number for number, word in enumerate(REASONS)}
        | {"NR_REASONS": len(REASONS)},
        "enum way": {f"WAY_{word.upper()}": number for number, word in enumerate(WAYS)},
        "enum sysctl": {"SYSCTL_NONE": 0, "SYSCTL_FTRACE_ENABLED": 1, "SYSCTL_NATIVE": 2},
        "struct event": _members(Event),
        "struct tally": _members(Tally),
    }
    found: dict[str, object] = {f"enum {name}": obj.enumerators(name) for name in ("mode", "reason", "way", "sysctl")}
    found |= {f"struct {name}": obj.members(name) for name in ("event", "tally")}
    _compare(obj, "guard.bpf.o", VALUES | ENTRIES, expected, found)


def check_records(obj: Object) -> None:
    """Compare the definitions here with those in inspect.bpf.o.

    :raises Failure: they differ; the object was built from another source.
    """
    _compare(obj, "inspect.bpf.o", RECORDS, {}, {})


def _compare(
    obj: Object,
    name_of_object: str,
    values: dict[str, type[ctypes.Structure]],
    expected: dict[str, object],
    found: dict[str, object],
) -> None:
    for name, kind in values.items():
        expected[f"the size of {name}"] = ctypes.sizeof(kind)
        found[f"the size of {name}"] = obj.map_size(map_name(name))[0]
        struct = {Word: "policy_bits", Slot: "slot"}.get(kind, name)
        expected[f"struct {struct}"] = _members(kind)
        found[f"struct {struct}"] = obj.members(struct)
    for what, value in expected.items():
        if found[what] != value:
            raise Failure(
                f"{name_of_object} and layout.py differ in {what}: {found[what]} and {value}",
                "reinstall uffdguard, or run make in its source",
            )
