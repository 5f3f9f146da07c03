"""``uffdguard start``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("start")
@click.option("--mode", type=MODE, help="The mode to set, whatever the configuration files say.")
@click.option(
    "--audit/--enforce",
    default=None,
    help="Count and tell refusals, and let them pass; or carry them out. Whatever the configuration files say.",
)
def command(mode: Mode | None, audit: bool | None) -> None:
    """Put the policy in force.

    Loads and attaches the programs, sees them refuse, pins them, and lets the native knob follow. Where a
    policy is in force already, repairs what is amiss and keeps the mode that is set unless --mode is given.

    In audit the native knob stays as it was found: what it refuses is refused.
    """

    from uffdguard import config, guard
    from uffdguard.cli import render

    configured = config.load()
    policy = configured.policy if audit is None else configured.policy._replace(audit=audit)
    if not guard.start(policy, mode, events_per_second=configured.events_per_second):
        click.echo("already in force; nothing to do")
    if policy.audit:
        render.warn_of_audit()
