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
@click.option(
    "--lsm", is_flag=True, help="Only have GRUB boot with bpf among the LSMs; uninstall takes that away, too."
)
@click.pass_context
def command(ctx: click.Context, mode: Mode | None, lsm: bool) -> None:
    """Put units and defaults in place.

    Systemd units, the default configuration, manual pages and completion. The units are enabled, so that the
    policy is in force from the next boot on; nothing is started now.

    With --lsm, a drop-in of GRUB's configuration adds bpf to the LSMs that this kernel has now, and update-grub is run.
    """
    import sys
    from pathlib import Path

    from uffdguard import config, install

    if lsm:
        if mode:
            raise click.UsageError("--lsm changes nothing but the boot loader's configuration: it takes no --mode", ctx)
        parameter = install.add_lsm()
        if parameter is None:
            click.echo("bpf is among the LSMs already; nothing to do")
        else:
            click.echo(f"{parameter} in {install.GRUB_FILE}, and update-grub was run: so it is from the next boot on")
            click.echo("uffdguard uninstall takes it away again")
        return
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
