"""The words that a user may give, and what to say about others."""

from __future__ import annotations

from typing import Any

import click

from uffdguard.policy import Mode


class ModeWord(click.ParamType[Mode]):
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
