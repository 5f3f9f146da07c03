"""How facts are shown: aligned text, or JSON. Every verb that prints facts prints them through here."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Colours of the words that say how something stands; only on a terminal (click strips them elsewhere).
COLOURS = {"ok": "green", "allowed": "green", "warning": "yellow", "missing": "red"}


def as_json(facts: Any) -> None:
    """Print FACTS as one indented JSON document."""
    json.dump(facts, sys.stdout, indent=2)
    sys.stdout.write("\n")


def columns(rows: Iterable[Sequence[str]]) -> None:
    """Print ROWS of text as aligned columns, two blanks apart; a known word gets its colour."""
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (_coloured(text) + " " * (width - len(text)) for text, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _coloured(text: str) -> str:
    return click.style(text, fg=COLOURS[text]) if text in COLOURS else text
