"""The manual page and --help agree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from uffdguard import cli, config
from uffdguard.cli import group

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = Path(__file__).parents[2] / "man"
PAGE = PAGES / "uffdguard.8"


def described() -> dict[str, set[str]]:
    """Return the words of each verb's heading in the manual page: options, and arguments in capitals."""
    verbs = PAGE.read_text().split(".Sh VERBS")[1].split(".Sh FILES")[0]
    headings = re.findall(r"^\.It (?:Cm ([^\n]*)|Xo\n(.*?)\n\.Xc)$", verbs, re.MULTILINE | re.DOTALL)
    found = {}
    for heading in ("".join(pair) for pair in headings):
        words = heading.replace(".Cm ", "").split()
        verb = " ".join(words[: next((i for i, word in enumerate(words) if word in (".Op", "Op", "Ar")), len(words))])
        found[verb] = set(re.findall(r"(?:Fl|\|) -([\w-]+)", heading)) | set(re.findall(r"Ar ([A-Z]+)", heading))
    return found


def existing() -> Iterator[tuple[str, set[str]]]:
    """Give each verb of the command line with the same."""
    for verb in cli.VERBS:
        command = group.cli.get_command(click.Context(group.cli), verb)
        assert command
        yield from words_of(verb, command)


def words_of(name: str, command: click.Command) -> Iterator[tuple[str, set[str]]]:
    words: set[str] = set()
    for parameter in command.params:
        flag = isinstance(parameter, click.Option) and parameter.is_flag
        options = (*parameter.opts, *parameter.secondary_opts)
        words.update(option.removeprefix("--") for option in options if option.startswith("--"))
        if not flag:
            words.update(re.findall("[A-Z]+", parameter.make_metavar(click.Context(command))))
    if isinstance(command, click.Group):
        if name == "lab":
            words.add("COMMAND")
        for inner, subcommand in command.commands.items():
            yield from words_of(f"{name} {inner}", subcommand)
    yield name, words


def test_the_manual_page_has_each_verb_with_its_options_and_no_other() -> None:
    assert described() == dict(existing())


def test_the_configuration_page_has_each_key() -> None:
    keys = re.findall(r"^\.It Va (\S+)$", (PAGES / "uffdguard.toml.5").read_text(), re.MULTILINE)
    assert tuple(keys) == config.File.__struct_encode_fields__


@pytest.mark.parametrize("page", sorted(PAGES.iterdir()), ids=lambda page: page.name)
def test_a_manual_page_is_without_errors(page: Path) -> None:
    done = subprocess.run(["groff", "-mdoc", "-Tutf8", "-ww", page], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f".Dt {page.stem.upper()} {page.suffix[1:]}\n" in page.read_text()
    assert len(done.stdout) > 500
