"""``uffdguard install``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("install")
@click.option("--mode", type=MODE, default="disabled", help="The mode that /usr/lib/uffdguard.toml gets.")
def command(mode: Mode) -> None:
    """Put units and defaults in place.

    Systemd units, the default configuration, manual pages and completion. The units are enabled, so that the
    policy is in force from the next boot on; nothing is started now.
    """
    import sys
    from pathlib import Path

    from uffdguard import install

    install.install(Path(sys.argv[0]).resolve(), mode, completion())
    click.echo("in force from the next boot on; at once: systemctl start uffdguard")


def completion() -> str:
    """Return the completion for bash, as click makes it."""
    from click.shell_completion import BashComplete

    from uffdguard.cli.group import cli

    return BashComplete(cli, {}, "uffdguard", "_UFFDGUARD_COMPLETE").source()
