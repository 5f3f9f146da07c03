"""``uffdguard status``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from uffdguard.state import Status


@click.command("status")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Show how things stand.

    The policy, the native knob, the interface file, the grants, and what was decided.

    Exits with 0 when the policy is in force and nothing is amiss, with 1 otherwise.
    """
    from dataclasses import asdict

    from uffdguard import state
    from uffdguard.cli import render

    status = state.status()
    if json:
        render.as_json(asdict(status))
    else:
        show(status)
    if status.problems or not status.in_force:
        raise SystemExit(1)


def show(status: Status) -> None:
    """Print STATUS as text."""
    from uffdguard import state
    from uffdguard.cli import render

    rows = [("policy", f"in force since {status.since}" if status.in_force else "not in force")]
    if status.audit:
        rows = [("policy", f"NOT ENFORCED (audit) since {status.since}: refusals are counted and told, and let pass")]
    if status.in_force:
        rows.append(("mode", str(status.mode)))
        rows.append(("user-mode-only", "allow" if status.user_mode_only else "deny"))
    rows.append(("kernel", status.kernel))
    knob = "unknown" if status.native_knob is None else str(status.native_knob)
    rows.append(("native knob", f"{knob}{', which does not fit the mode' if status.drift else ''}"))
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
    for problem in status.problems:
        click.echo(f"{render.coloured('problem')}: {problem}")
    if status.problems:
        click.echo("uffdguard start repairs what is its own; uffdguard stop ends it")
    elif not status.in_force:
        click.echo(state.not_in_force())
