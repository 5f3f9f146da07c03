"""The targets of the fuzzer, each on its seeds: what once broke a promise is among them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import targets

SEEDS = Path(__file__).parents[1] / "fuzz/seeds"


@pytest.mark.parametrize("seed", sorted(SEEDS.glob("*/*")), ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_no_promise_is_broken(seed: Path) -> None:
    targets.TARGETS[seed.parent.name](seed.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {path.name for path in SEEDS.iterdir()} == set(targets.TARGETS)


def test_what_is_fuzzed_cannot_change_the_machine(tmp_path: Path) -> None:
    targets.scratch()
    for change in (lambda: (tmp_path / "a").write_bytes(b""), tmp_path.rmdir, lambda: tmp_path.chmod(0)):
        with pytest.raises(AssertionError), targets.watch:
            change()
    assert list(tmp_path.iterdir()) == []
