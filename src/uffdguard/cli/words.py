"""The words that a user may give, and what to say about others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from uffdguard.policy import Mode

if TYPE_CHECKING:
    Word = click.ParamType[Mode]
else:
    Word = click.ParamType  # generic only since click 8.2


#: Where the context has the words after ``--``.
COMMAND = "uffdguard.cli.words.command"


class TakesCommand(click.Command):
    """A verb whose words after ``--`` are a COMMAND, whatever they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the COMMAND aside before click looks at the words."""
        words: list[str] = []
        if "--" in args:
            where = args.index("--")
            args, words = args[:where], args[where + 1 :]
        ctx.meta[COMMAND] = tuple(words)
        return super().parse_args(ctx, args)


class ModeWord(Word):
    """One of the modes that exist on this kernel."""

    name = "MODE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mode:
        """Return the mode, or fail with the words that exist."""
        from uffdguard.kernel import native

        words = native.modes()
        if value not in words:
            raise click.UsageError(f"there is no mode {value!r}; the modes are {', '.join(words)}", ctx)
        return Mode(value)


MODE = ModeWord()
