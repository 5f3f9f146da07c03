"""README.md, taken apart: its blocks are what the tests execute."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def block(language: str, words: str) -> str:
    """Return the one block in LANGUAGE that has WORDS in it."""
    (text,) = [text for kind, text in BLOCKS if kind == language and words in text]
    return str(text)


#: Each block, by what is special about it; a test executes each.
DEMO = block("sh", "make demo")
TEST = block("sh", "make test")
INSTALL = block("sh", "pip install")
DIALOGUE = block("console", "uffdguard start")
CONFIGURATION = block("toml", "mode =")


def check_demo(out: str) -> None:
    """See that OUT, what `make demo` printed, shows what the README says it shows."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    refused_but_enabled, allowed = ["EPERM", "allowed", "EPERM"], ["allowed"] * 3
    assert [row[2:] for row in rows[:-1]] == [allowed, allowed, *[refused_but_enabled] * 3, ["EPERM", *allowed[1:]]]
    disabled, *others = rows[-1][2:]
    assert disabled == "refused"
    assert all(cell.startswith("completed, ") for cell in others)
