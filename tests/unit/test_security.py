"""docs/security.md: each line of its tables names tests, and each test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/security.md").read_text().splitlines()
    if line.startswith("|") and not re.match(r"\|(-|.*\| test \|$)", line)
]


def names_in(path: str) -> set[str]:
    """Return the tests in a file, as pytest names them."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.split("::")[-1].startswith("test_")}


@pytest.mark.parametrize(("attempt", "tests"), ROWS, ids=[row[0] for row in ROWS])
def test_each_line_names_tests_that_exist(attempt: str, tests: str) -> None:
    for test in tests.split(", "):
        path, _, name = test.partition("::")
        assert name in names_in(path)


def test_no_line_is_overlooked() -> None:
    assert len(ROWS) == (ROOT / "docs/security.md").read_text().count("| tests/") > 40
