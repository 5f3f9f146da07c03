"""``uffdguard status``."""

from __future__ import annotations

import click


@click.command("status")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Show how things stand.

    The policy, the native knob, the interface file, the grants, and what was decided.

    Exits with 0 when the policy is in force and nothing is amiss, with 1 otherwise.
    """
    from uffdguard.cli import plain

    raise SystemExit(plain.status(json=json))
