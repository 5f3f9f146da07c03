"""``uffdguard mode``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("mode")
@click.argument("mode", type=MODE, required=False)
def command(mode: Mode | None) -> None:
    """Show or switch the mode.

    Without MODE, print the modes that exist with the current one in brackets. With MODE (disabled, enabled, or
    on a kernel with KVM kvm), switch to it.
    """
    if mode:
        from uffdguard import guard, state
        from uffdguard.cli import render
        from uffdguard.policy import Backend

        if guard.set_mode(mode).audit:
            render.warn_of_audit()
        if state.backend() is Backend.NATIVE:
            render.warn_of_native()
    else:
        from uffdguard.cli import plain

        plain.mode()
