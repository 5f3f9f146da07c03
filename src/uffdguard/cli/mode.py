"""``uffdguard mode``."""

from __future__ import annotations

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

        guard.set_mode(mode)
    else:
        from uffdguard import state
        from uffdguard.kernel import native

        click.echo(interface_line(state.current_mode(), native.modes()))
