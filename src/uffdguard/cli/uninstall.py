"""``uffdguard uninstall``."""

from __future__ import annotations

import click


@click.command("uninstall")
def command() -> None:
    """Take away what install put in place, and nothing else.

    The units are stopped first. A file that was changed since is left, and named.
    """
    from uffdguard import install

    for path in install.uninstall():
        click.echo(f"left, because it was changed: {path}")
