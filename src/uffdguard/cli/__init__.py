"""The command line: one small module a verb, imported only when that verb is asked for."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import signal
import sys
from typing import Any

import click

from uffdguard import __version__
from uffdguard.errors import Failure, one_line

#: The verbs, in the order in which a user meets them. Each is ``uffdguard.cli.VERB:command``.
VERBS = (
    "start",
    "stop",
    "mode",
    "status",
    "holders",
    "check",
    "watch",
    "log",
    "report",
    "metrics",
    "probe",
    "doctor",
    "knob",
    "install",
    "uninstall",
    "lab",
)


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


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit: 0 done or allowed, 1 refused or failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the locale's encoding does not have
    # Ours come before the verb; a verb may have a word of its own that looks so.
    debug = "--debug" in itertools.takewhile(lambda word: word.startswith("-"), arguments)
    try:
        sys.exit(cli.main(arguments, prog_name="uffdguard", standalone_mode=False))
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "uffdguard"
        fail(f"{where}: {error.format_message()}", 2)
    except click.ClickException as error:
        fail(f"uffdguard: {error.format_message()}", 1)
    except Failure as error:
        if debug:
            raise
        fail(f"uffdguard: {error}", 1)
    except (KeyboardInterrupt, click.Abort):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BrokenPipeError:
        # The reader has gone: nobody to tell. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        what = f"{error.filename}: " if error.filename else ""
        fail(f"uffdguard: {what}{error.strerror or error}; --debug shows where", 1)


def fail(line: str, status: int) -> None:
    """Print one line on stderr and exit."""
    click.echo(one_line(line), err=True)
    sys.exit(status)
