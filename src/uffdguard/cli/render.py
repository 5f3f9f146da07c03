"""How facts are shown: aligned text, or JSON. Every verb that prints facts prints them through here."""

from __future__ import annotations

import itertools
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

#: Colours of the words that say how something stands, as ECMA-48 numbers them; only on a terminal.
RED, GREEN, YELLOW = 31, 32, 33
COLOURS = dict.fromkeys(("ok", "allowed"), GREEN)
COLOURS |= dict.fromkeys(("warning", "cannot tell", "audit", "let pass"), YELLOW)
COLOURS |= dict.fromkeys(("missing", "refused", "problem"), RED)


def echo(text: str, end: str = "\n") -> None:
    """Print TEXT at once, so that a reader who has gone is seen here."""
    print(text, end=end, flush=True)


def as_json(facts: Any) -> None:
    """Print FACTS as one indented JSON document."""
    import json

    json.dump(facts, sys.stdout, indent=2)
    sys.stdout.write("\n")


def columns(rows: Iterable[Sequence[str]], *, cut: Sequence[int] = ()) -> None:
    """Print ROWS of text as aligned columns, two blanks apart; a known word gets its colour.

    :param cut: the columns that give way on a terminal that is too narrow, the widest first.
    """
    rows = [tuple(row) for row in rows]
    widths = [max(map(cells_of, column)) for column in zip(*rows, strict=True)]
    if cut and sys.stdout.isatty():
        import shutil

        room = shutil.get_terminal_size().columns - 2 * len(widths) + 2
        while sum(widths) > room and max(widths[column] for column in cut) > 7:
            widths[max(cut, key=widths.__getitem__)] -= 1
    for row in rows:
        cells = (_cell(text, width) for text, width in zip(row, widths, strict=True))
        echo("  ".join(cells).rstrip())


def line(cells: Sequence[str], widths: Sequence[int], limit: int | None) -> str:
    """Return one line of columns whose rows come one by one; a known word gets its colour.

    :param widths: of the columns; a longer cell has its own width, unless there is a limit.
    :param limit: how long the line may be: the terminal's width.
    """
    shown = []
    left = limit
    for text, width in zip(cells, widths, strict=True):
        if left is None:
            shown.append(_cell(text, max(width, cells_of(text))))
            continue
        if left <= 0:
            break
        shown.append(_cell(text, min(width or left, left)))
        left -= width + 2
    return "  ".join(shown).rstrip()


def bar(part: int, whole: int, width: int) -> str:
    """Return a bar of PART in WHOLE, which would take WIDTH columns; what is not 0 shows."""
    eighths = max(part * width * 8 // whole, 1) if part else 0
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def cells_of(text: str) -> int:
    """Return how many columns of a terminal TEXT takes, or a few more where it has combining characters."""
    if text.isascii():
        return len(text)
    from unicodedata import east_asian_width

    return len(text) + sum(east_asian_width(character) in "WF" for character in text)


def _beginning(text: str, width: int) -> str:
    ends = itertools.accumulate(map(cells_of, text))
    return text[: sum(end <= width for end in ends)]


def _cell(text: str, width: int) -> str:
    if cells_of(text) > width:
        # The end of a path tells most.
        text = f"…{_beginning(text[::-1], width - 1)[::-1]}" if text[0] == "/" else f"{_beginning(text, width - 1)}…"
    return coloured(text) + " " * (width - cells_of(text))


def warn_of_audit() -> None:
    """Say on standard error that refusals are not carried out."""
    print(f"{coloured('audit')}: refusals are counted and told, and let pass", file=sys.stderr)


def warn_of_native() -> None:
    """Say on standard error that the backend is weaker than another, and where it is said in what."""
    print("backend native, which is weaker than lsm: uffdguard status says in what", file=sys.stderr)


def coloured(word: str) -> str:
    """Return WORD in its colour, if it has one and the user has not said NO_COLOR (no-color.org)."""
    if word not in COLOURS or os.environ.get("NO_COLOR") or not (sys.stdout and sys.stdout.isatty()):
        return word
    return f"\x1b[{COLOURS[word]}m{word}\x1b[0m"
