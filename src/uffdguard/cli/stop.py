"""``uffdguard stop``."""

from __future__ import annotations

import click


@click.command("stop")
def command() -> None:
    """Take the policy out of force.

    The native knob vm.unprivileged_userfaultfd gets the value that it was found with at the first start.
    """
    from uffdguard import guard

    if not guard.stop():
        click.echo("not in force; nothing to do")
