"""``uffdguard install``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("install")
@click.option(
    "--mode", type=MODE, help="The mode that /usr/lib/uffdguard.toml gets; what it has, or disabled, without this."
)
def command(mode: Mode | None) -> None:
    """Put units and defaults in place.

    Systemd units, the default configuration, manual pages and completion. The units are enabled, so that the
    policy is in force from the next boot on; nothing is started now.
    """
    import sys
    from pathlib import Path

    from uffdguard import config, install

    done = install.install(Path(sys.argv[0]).resolve(), mode, completion())
    change = {None: "", done.mode: ", as before"}.get(done.before, f"; it was {done.before}")
    click.echo(f"mode {done.mode} in {config.DEFAULT}{change}")
    if done.at_boot != done.mode:
        click.echo(f"but {config.ADMINISTRATOR} or {config.DROP_INS} says {done.at_boot}, and wins")
    click.echo(f"in force in mode {done.at_boot} from the next boot on; at once: systemctl start uffdguard")


def completion() -> str:
    """Return the completion for bash, as click makes it."""
    from click.shell_completion import BashComplete

    from uffdguard.cli.group import cli

    return BashComplete(cli, {}, "uffdguard", "_UFFDGUARD_COMPLETE").source()
