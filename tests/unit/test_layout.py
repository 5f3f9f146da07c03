"""The structures shared with the kernel side: the check at load finds every difference."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import pytest

from uffdguard.errors import Failure
from uffdguard.kernel import features, layout, libbpf
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def guard_object() -> Iterator[libbpf.Object]:
    with libbpf.Object(features.OBJECT) as obj:
        yield obj


def test_the_compiled_object_has_the_layout_that_is_declared_here(guard_object: libbpf.Object) -> None:
    layout.check(guard_object)


@pytest.mark.parametrize(
    ("attribute", "value", "what"),
    [
        ("MODES", tuple(reversed(layout.MODES)), "enum mode"),
        ("REASONS", layout.REASONS[:-1], "enum reason"),
        (
            "VALUES",
            {**layout.VALUES, "witness": type("Short", (ctypes.Structure,), {"_fields_": (("tgid", ctypes.c_int32),)})},
            "the size of witness",
        ),
        (
            "Tally",
            type("Swapped", (ctypes.Structure,), {"_fields_": tuple(reversed(layout.Tally._fields_))}),
            "struct tally",
        ),
    ],
)
def test_a_difference_is_told(
    guard_object: libbpf.Object, monkeypatch: pytest.MonkeyPatch, attribute: str, value: object, what: str
) -> None:
    monkeypatch.setattr(layout, attribute, value)
    with pytest.raises(Failure, match=f"differ in {what}") as failure:
        layout.check(guard_object)
    assert "reinstall uffdguard" in str(failure.value)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("user_mode_only", [False, True])
@pytest.mark.parametrize("audit", [False, True])
def test_a_policy_is_one_byte_that_reads_back_the_same(mode: Mode, user_mode_only: bool, audit: bool) -> None:
    policy = Policy(mode, user_mode_only, audit)
    word = layout.Word.of(policy)
    assert ctypes.sizeof(word) == 1
    assert layout.Word.from_buffer_copy(bytes(word)).policy() == policy


def test_zero_is_the_strictest_policy() -> None:
    """What a map holds before anything was written to it."""
    assert layout.Word().policy() == Policy(Mode.DISABLED, user_mode_only=False)


def test_the_total_of_the_counts_is_the_sum_of_each_tally() -> None:
    counts = layout.Counts()
    counts.of[0].decisions[1], counts.of[63].decisions[1] = 2, 3
    counts.of[9].lost = 6
    total = counts.total()
    assert (list(total.decisions), total.lost) == ([0, 5, 0, 0, 0, 0], 6)
