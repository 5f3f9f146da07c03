"""The command line as click has it: the verbs, their options and their help."""

from __future__ import annotations

import importlib

import click

from uffdguard import __version__
from uffdguard.cli import VERBS, fail


class Verbs(click.Group):
    """A group that imports a verb's module only when it is needed: start-up time is a feature."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of VERBS, not of the alphabet."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb, or None when there is none of that name."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"uffdguard.cli.{cmd_name}").command
        return command


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Print the version and end."""
    if value:
        click.echo(f"uffdguard {__version__}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Tell each step on stderr; show the traceback of an error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the version."
)
def cli(debug: bool) -> None:
    """Decide who may use userfaultfd(2): nobody, everybody, or who has opened /dev/kvm."""
    if debug:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")


def run(arguments: list[str]) -> int:
    """Run the command line and return its status.

    :raises Failure: and whatever else a verb raises.
    """
    try:
        return int(cli.main(arguments, prog_name="uffdguard", standalone_mode=False) or 0)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "uffdguard"
        fail(f"{where}: {error.format_message()}", 2)
    except click.ClickException as error:
        fail(f"uffdguard: {error.format_message()}", 1)
    except click.Abort:
        raise KeyboardInterrupt from None
