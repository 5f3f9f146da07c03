"""``uffdguard holders``."""

from __future__ import annotations

import click


@click.command("holders")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Show who has a userfaultfd, a grant or /dev/kvm.

    Each process that has a userfaultfd or /dev/kvm open, or a grant, and what it would be answered if it asked for a
    userfaultfd now. The units, pods and containers are those of its control group, outermost first.
    """
    from dataclasses import asdict

    from uffdguard import inspect
    from uffdguard.cli import render

    with inspect.looking() as (setting, obj):
        found = inspect.holders(setting, obj)
    if json:
        render.as_json([asdict(holder) for holder in found])
        return
    rows = [("pid", "user", "command", "userfaultfds", "kvm", "granted", "if it asked", "because", "unit or container")]
    for holder in found:
        told = {"allowed" if verdict.allowed else "refused": None for verdict in holder.verdicts}
        rows.append(
            (
                str(holder.pid),
                holder.user,
                holder.command,
                str(holder.userfaultfds),
                "open" if holder.kvm else "-",
                "yes" if holder.granted else "-",
                # Threads may differ in their capabilities.
                "/".join(told),
                "/".join(verdict.reason for verdict in holder.verdicts),
                holder.unit or "-",
            )
        )
    render.columns(rows, cut=[len(rows[0]) - 1])
