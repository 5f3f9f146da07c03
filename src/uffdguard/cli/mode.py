"""``uffdguard mode``."""

from __future__ import annotations

import os

import click

from uffdguard.cli.words import MODE
from uffdguard.policy import Mode, interface_line


@click.command("mode")
@click.argument("mode", type=MODE, required=False)
def command(mode: Mode | None) -> None:
    """Show or switch the mode.

    Without MODE, print the modes that exist with the current one in brackets. With MODE (disabled, enabled, or
    on a kernel with KVM kvm), switch to it.
    """
    if mode:
        from uffdguard import guard

        policy = guard.set_mode(mode)
    else:
        from uffdguard import state
        from uffdguard.kernel import native

        # What everybody may read; the pins are for root alone.
        if os.geteuid() and native.is_covered():
            click.echo(native.FILE.read_text(), nl=False)
            return
        policy = state.current_policy()
        click.echo(interface_line(policy.mode, native.modes()))
    if policy.audit:
        from uffdguard.cli import render

        click.echo(f"{render.coloured('audit')}: refusals are counted and told, and let pass", err=True)
