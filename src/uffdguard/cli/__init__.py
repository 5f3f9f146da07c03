"""The command line: one small module a verb, imported only when that verb is asked for."""

from __future__ import annotations

import gc
import io
import itertools
import os
import sys
from typing import TYPE_CHECKING

from uffdguard.errors import Failure, one_line

if TYPE_CHECKING:
    from typing import NoReturn

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

#: Alone, these do without click, whose import takes longer than all they do: they are functions of plain.py.
PLAIN = ("mode", "status")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done or allowed, 1 refused or failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the locale's encoding does not have
    # Ours come before the verb; a verb may have a word of its own that looks so.
    debug = "--debug" in itertools.takewhile(lambda word: word.startswith("-"), arguments)
    try:
        if len(arguments) == 1 and arguments[0] in PLAIN:
            # They end before there is anything to collect, and need no look for it then: a tenth of what they take.
            gc.disable()
            try:
                from uffdguard.cli import plain

                sys.exit(getattr(plain, arguments[0])())
            finally:
                gc.freeze()
                gc.enable()
        from uffdguard.cli import group

        sys.exit(group.run(arguments))
    except Failure as error:
        if debug:
            raise
        fail(f"uffdguard: {error}", 1)
    except KeyboardInterrupt:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    except BrokenPipeError:
        # The reader has gone: nobody to tell. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        what = f"{error.filename}: " if error.filename else ""
        fail(f"uffdguard: {what}{error.strerror or error}; --debug shows where", 1)


def fail(line: str, status: int) -> NoReturn:
    """Print one line on stderr and exit."""
    if sys.stderr:  # a closed one is None, for which print() takes stdout
        print(one_line(line), file=sys.stderr, flush=True)
    sys.exit(status)
