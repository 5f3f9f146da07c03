"""The kernels: one table in the lab, and what the documents and the other parts say agrees with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matrix
import pytest
import readme

from uffdguard.kernel import features
from uffdguard.lab import architectures, kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdguard.lab.architectures import Architecture

    Whole = Callable[..., tuple[int, list[tuple[str, str]]]]

PAGE = readme.ROOT / "docs/kernels.md"
RELEASES = {
    (line, architecture): kernels.Kernel(f"{line.name.replace('x', '9')}.9-{architecture.name}", Path("/none"))
    for line, architecture in matrix.ROWS
}


def rows(text: str) -> list[list[str]]:
    """Return the cells of the table in TEXT, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_the_documented_lines_are_those_of_the_table_with_what_is_refused() -> None:
    found = rows(PAGE.read_text())
    for (name, policy, release, *_), (line, architecture) in zip(found, matrix.ROWS, strict=True):
        assert kernels.belongs(release, line)
        assert architectures.of_release(release) == architecture
        assert (name, policy) == (
            kernels.line_name(release),
            "supported" if line.supported(architecture) else "refused",
        )


def test_the_oldest_supported_line_is_what_the_readme_and_the_product_say() -> None:
    tried = tuple(name for name, policy, *_ in rows(PAGE.read_text())[: len(kernels.LINES)] if policy == "supported")
    assert tried == features.TRIED
    assert f"It needs Linux {kernels.oldest().name} or newer" in (readme.ROOT / "README.md").read_text()
    assert [line.supported() for line in kernels.LINES] == sorted(line.supported() for line in kernels.LINES)


@pytest.mark.parametrize(
    ("status", "log", "expected"),
    [
        (0, "=== 12 passed in 61.50s (0:01:01) ===\n", (True, "12 passed, 1:02")),
        (0, "12 passed, 3 skipped in 5.00s\nmore\n", (True, "12 passed, 3 skipped, 0:05")),
        (2, "=== 1 failed, 12 passed in 5.00s ===\n", (False, "1 failed, 12 passed, 0:05")),
        (2, "=== 12 passed in 5.00s ===\nuffdguard: lab: not done\n", (False, "12 passed, 0:05")),
        (0, "=== 3 skipped in 5.00s ===\n", (False, "3 skipped, 0:05")),
        (0, "", (False, "not finished, status 0")),
        (2, "== 12 passed\n", (False, "not finished, status 2")),
    ],
)
def test_a_suite_has_passed_when_pytest_and_the_exit_status_say_so(
    status: int, log: str, expected: tuple[bool, str]
) -> None:
    assert matrix.summary(status, log) == matrix.Result(*expected)


@pytest.fixture
def whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    """Return a function that runs the matrix without VMs, the suites on the line given failing."""

    def whole(failing: str = "") -> tuple[int, list[tuple[str, str]]]:
        ran = []

        def run(line: str, architecture: Architecture, suite: str) -> matrix.Result:
            ran.append((f"{line}-{architecture.name}", suite))
            return matrix.Result(passed=line != failing, text="3 passed, 1 skipped, 0:05")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(matrix, "run", run)
        monkeypatch.setattr(matrix, "debian_version", lambda kernel: "1-1")
        monkeypatch.setattr(kernels, "get", lambda word, architecture: RELEASES[kernels.find_line(word), architecture])
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--write", "page", "tests/vm", "tests/refused"])
        return matrix.main(), sorted(ran)

    return whole


def test_each_line_runs_the_suites_that_are_for_it(whole_run: Whole, tmp_path: Path) -> None:
    status, ran = whole_run()
    names = [kernels.line_name(RELEASES[row].release) for row in matrix.ROWS]
    expected = [
        (f"{name}-{architecture.name}", "tests/vm" if line.supported(architecture) else "tests/refused")
        for name, (line, architecture) in zip(names, matrix.ROWS, strict=True)
    ]
    assert ran == sorted(expected)
    assert status == 0
    written = rows((tmp_path / "page").read_text())
    assert [row[0] for row in written] == names
    assert written[0][-2:] == ["", "3 passed, 1 skipped, 0:05"]
    assert written[1][-2:] == ["3 passed, 1 skipped, 0:05", ""]


def test_a_failed_run_leaves_the_page_as_it_was(whole_run: Whole, tmp_path: Path) -> None:
    (tmp_path / "page").write_text("as it was")
    assert whole_run("7.0")[0] == 1
    assert (tmp_path / "page").read_text() == "as it was"


def test_the_debian_version_is_read_from_the_image_itself(tmp_path: Path) -> None:
    other = tmp_path / "boot/vmlinuz-6.12.9+deb13-arm64"
    other.parent.mkdir()
    other.write_bytes(bytes(64) + b"Linux version 6.12.9+deb13-arm64 #1 SMP PREEMPT Debian 6.12.9-1 (2026-11-20)\0rest")
    assert matrix.debian_version(kernels.Kernel("6.12.9+deb13-arm64", tmp_path)) == "6.12.9-1"
    image = tmp_path / "boot/vmlinuz-6.1.0-9-amd64"
    words = b"6.1.0-9-amd64 (debian-kernel@lists.debian.org) #1 SMP Debian 6.1.27-1 (2023-05-08)\0rest"
    image.write_bytes(bytes(0x20E) + (0x100).to_bytes(2, "little") + bytes(0xF0) + words)
    assert matrix.debian_version(kernels.Kernel("6.1.0-9-amd64", tmp_path)) == "6.1.27-1"
