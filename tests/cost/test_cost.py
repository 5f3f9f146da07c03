"""What a policy costs, in instructions: nothing where it has no business, and no more than docs/performance.json says.

In a VM that counts instructions only: ``make test-cost``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import guest, report
from uffdguard import state
from uffdguard.policy import Mode

MODES = [f"uffdguard {mode}" for mode in Mode]
#: Where the scheduler or the allocator have a say, two runs of the same differ by 1 % or so.
LEEWAY = dict.fromkeys(("fork, exit", "fork, exec, exit", "thread create, join"), 0.02)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    if "virtme" not in Path("/proc/cmdline").read_text():
        pytest.exit("these tests change the machine they run on: run them in the lab, with `make test-cost`", 4)
    guest.prepare()
    return guest.compare(guest.SHORT, guest.PATHS, 3)


def surplus(found: dict[str, Any], subject: str) -> dict[str, float]:
    """Return by how much SUBJECT makes those paths dearer to which it must add nothing."""
    added = {
        path: found[path][subject]["least"] - (1 + LEEWAY.get(path, 0)) * found[path][guest.NONE]["least"]
        for path in guest.FREE
        if path in found
    }
    return {path: value for path, value in added.items() if value > 2}


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_adds_nothing_to_what_creates_no_userfaultfd(found: dict[str, Any], mode: str) -> None:
    assert surplus(found, mode) == {}


def test_fork_exec_and_exit_run_no_program_of_ours() -> None:
    """How long these take differs by more than a program would; how often one was run does not."""

    def runs() -> dict[str, int]:
        with state.pinned() as pins:
            return {name: program.run_cnt for name, program in pins.programs.items()}

    def ran(*paths: str) -> dict[str, int]:
        """Measure PATHS, and return how often each program ran meanwhile; those that did not are left out."""
        before = runs()
        guest.measure(paths)
        return {name: number - before[name] for name, number in runs().items() if number > before[name]}

    statistics = Path("/proc/sys/kernel/bpf_stats_enabled")
    paths = ("fork, exit", "fork, exec, exit", "thread create, join")
    with guest.policy(Mode.KVM):
        statistics.write_text("1")
        try:
            # What measures a path opens /dev/userfaultfd first, which is a misc device, too.
            assert ran(*paths) == {"grant": len(paths)}
            assert set(ran("userfaultfd after /dev/kvm")) == {"decide", "grant"}
        finally:
            statistics.write_text("0")


def test_no_figure_has_grown_by_more_than_5_percent(found: dict[str, Any]) -> None:
    """Nor by more than 100 instructions: where a call takes a thousand, that is how two boots differ."""
    kept = json.loads(report.FIGURES.read_text())["calls"]

    grown = {
        (path, subject): (before, now)
        for path, row in found.items()
        for subject in row
        if (now := row[subject]["least"]) > max(1.05 * (before := kept[path][subject]["least"]), before + 100)
    }
    assert grown == {}


def test_an_allowed_creation_adds_what_is_kept_and_no_more(found: dict[str, Any]) -> None:
    """5 % of a call would be more than all that a policy adds; two runs of the same differ by 3."""
    kept = json.loads(report.FIGURES.read_text())["calls"]

    def added(row: dict[str, Any], mode: str) -> float:
        return float(row[mode]["least"] - row[guest.FLOOR]["least"])

    more = {
        (path, mode): (added(kept[path], mode), added(found[path], mode))
        for path in guest.CREATIONS
        for mode in MODES
        if not found[path][mode]["refused"] and added(found[path], mode) > added(kept[path], mode) + 8
    }
    assert more == {}


def test_a_refusal_costs_less_than_the_call_without_a_policy(found: dict[str, Any]) -> None:
    refusals = [(row[mode], row[guest.NONE]) for row in found.values() for mode in MODES if row[mode]["refused"]]
    assert len(refusals) == 8
    assert all(refusal["least"] < call["least"] for refusal, call in refusals)


def test_the_check_sees_one_more_hook() -> None:
    subjects = {guest.NONE: guest.Subject(), "intruder": guest.Subject(lambda: guest.attached("intruder"))}
    assert set(surplus(guest.compare(subjects, ("open tmpfs file", "open /dev/null", "getppid"), 1), "intruder")) == {
        "open tmpfs file",
        "open /dev/null",
    }
