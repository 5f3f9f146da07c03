"""docs/programs.md shows the table that the tests of programs are run from."""

from __future__ import annotations

from pathlib import Path

import programs

from uffdguard.policy import Mode

PAGE = Path(__file__).parents[2] / "docs/programs.md"


def test_the_page_shows_the_table_that_the_tests_are_run_from() -> None:
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert "\n".join(shown) + "\n" == programs.markdown()


def test_every_program_is_in_the_table_and_every_run_tries_it_in_each_mode() -> None:
    for program in programs.Program:
        rows = [row for row in programs.TABLE if row.program is program]
        for mode in Mode:
            assert any(mode not in row.long for row in rows), (program, mode)
