"""What ``mode`` and ``status`` do when no word follows, without click."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uffdguard import state
from uffdguard.cli import render
from uffdguard.conditions import BY_NAME, UNKNOWN
from uffdguard.kernel import native
from uffdguard.policy import Backend, interface_line

if TYPE_CHECKING:
    from uffdguard.state import Status


def mode() -> None:
    """Print the modes that exist with the current one in brackets.

    :raises Failure: no policy is in force, or it cannot be told.
    """
    # What everybody may read; the pins are for root alone.
    if os.geteuid() and native.is_covered():
        render.echo(native.FILE.read_text(), end="")
        return
    policy = state.current_policy()
    render.echo(interface_line(policy.mode, native.modes()))
    if policy.audit:
        render.warn_of_audit()
    if state.backend() is Backend.NATIVE:
        render.warn_of_native()


def status(*, json: bool = False) -> int:
    """Print how things stand; return 0 when the policy is in force and nothing is amiss, 1 otherwise."""
    found = state.status()
    if json:
        render.as_json(found._asdict())
    else:
        show(found)
    return 1 if found.problems or not found.in_force else 0


def show(status: Status) -> None:
    """Print STATUS as text."""
    rows = [("policy", f"in force since {status.since}" if status.in_force else "not in force")]
    if status.answers is None:
        rows = [("policy", "CANNOT TELL whether it is in force, see below")]
    elif status.reason:
        rows = [("policy", "NOT IN FORCE, see below")]
    elif status.audit:
        rows = [("policy", f"NOT ENFORCED (audit) since {status.since}: refusals are counted and told, and let pass")]
    if status.backend is Backend.NATIVE:
        rows.append(("backend", "native, which is weaker than lsm: see below"))
    if status.answers is not False or status.backend is Backend.NATIVE:
        rows.append(("mode", str(status.mode)))
        rows.append(("user-mode-only", "allow" if status.user_mode_only else "deny"))
    rows.append(("kernel", status.kernel))
    knob = "unknown" if status.native_knob is None else str(status.native_knob)
    rows.append(("native knob", f"{knob}{', which does not fit the mode' if status.drift else ''}"))
    if status.device:
        rows.append(("device", status.device))
    if status.guard:
        refused = f"; refused {status.sysctl_refused} writes" if status.sysctl_refused else ""
        rows.append(("guard of sysctls", f"{GUARD[status.guard]}{refused}"))
    rows.append(("interface file", status.interface))
    if any(status.pins.values()):
        missing = [part for part, there in status.pins.items() if not there]
        rows.append(("pins", f"{', '.join(missing)} missing" if missing else "all there"))
        rows.append(("grants", f"{status.grants}, {status.lost} lost; hooks skipped {status.skipped} times"))
        for verdict, total, allowed in (("allowed", status.allowed, True), ("refused", status.refused, False)):
            parts = [f"{reason} {n}" for reason, n in status.decisions.items() if n and reason.allowed is allowed]
            if not allowed and status.native:
                parts.append(f"native {status.native}")
            if not allowed and status.let_pass:
                parts.append(f"of these let pass {status.let_pass}")
            rows.append((verdict, f"{total} ({', '.join(parts)})" if parts else str(total)))
    render.columns(rows)
    for sentence in status.weaker:
        render.echo(f"weaker: {sentence}")
    for problem in status.problems:
        render.echo(f"{render.coloured('problem')}: {problem}")
    hints: dict[str, list[str]] = {}
    for name in status.failing:
        unknown = name == "policy-answers" and status.answers is None
        hints.setdefault(UNKNOWN if unknown else BY_NAME[name].remedy, []).append(name)
    for hint, names in hints.items():
        render.echo(f"{', '.join(names)}: {hint}")
    if not (status.in_force or status.problems):
        render.echo(str(state.not_in_force()))


GUARD = {
    "attached": "attached",
    "missing": "MISSING",
    "unsupported": "impossible: this kernel has no cgroup v2 for BPF, and kernel.ftrace_enabled=0 would end the policy",
}
