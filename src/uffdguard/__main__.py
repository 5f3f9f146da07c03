"""The command, ``uffdguard`` and ``python -m uffdguard``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; but the server that stays in memory without it, which is 5 MiB."""
    if sys.argv[1:] == ["knob", "serve"]:
        from uffdguard.knob import main as serve

        serve()
    from uffdguard.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
