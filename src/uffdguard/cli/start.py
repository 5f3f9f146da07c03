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
    help="Count and report refusals and let them pass, or carry them out, until it is said otherwise.",
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
    done = guard.start(configured.policy, mode, audit=audit, events_per_second=configured.events_per_second)
    if not done.changed:
        click.echo("already in force; nothing to do")
    if done.before and done.before.audit and not done.policy.audit:
        click.echo("audit has ended: refusals are carried out")
    if done.policy.audit:
        render.warn_of_audit()
