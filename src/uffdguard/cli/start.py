"""``uffdguard start``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("start")
@click.option("--mode", type=MODE, help="The mode to set, whatever the configuration files say.")
def command(mode: Mode | None) -> None:
    """Put the policy in force.

    Loads and attaches the programs, sees them refuse, pins them, and lets the native knob follow. Where a
    policy is in force already, repairs what is amiss and keeps the mode that is set unless --mode is given.
    """
    from uffdguard import config, guard

    if not guard.start(config.load().policy, mode):
        click.echo("already in force; nothing to do")
