"""The fixtures of the tests inside the lab."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import in_force, lab, nothing_in_force
from mutations import mutant

import hatch_build
from uffdguard import state
from uffdguard.kernel import features, layout, libbpf

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_force", "lab", "nothing_in_force"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--steps", type=int, default=400, help="steps of the model against the kernel")
    parser.addoption("--mutant", type=Path, help="the object to load: tests/mutations.py")


def pytest_configure(config: pytest.Config) -> None:
    if mutant := config.getoption("--mutant"):
        from hypothesis import Phase, settings

        features.OBJECT = mutant
        # That it fails is enough: to make the example short takes minutes.
        settings.register_profile("mutant", phases=[Phase.generate])
        settings.load_profile("mutant")


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> int:
    """Return how many steps the model shall go."""
    number: int = request.config.getoption("--steps")
    return number


@functools.cache
def compiled(text: str, by: str) -> Path:
    """Return the object of guard.bpf.c and grants.h with one TEXT replaced; the compiler takes long here."""
    changed = Path(tempfile.mkdtemp(), "guard.bpf.c")
    changed.write_text(mutant({text: by}))
    hatch_build.compile_bpf(changed, changed.with_suffix(".o"))
    return changed.with_suffix(".o")


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that has start load guard.bpf.c with one text replaced by another."""

    def replace(text: str, by: str) -> None:
        monkeypatch.setattr(features, "OBJECT", compiled(text, by))

    return replace


@pytest.fixture
def silence(variant: Callable[..., None]) -> Callable[[bool], None]:
    """Return a function that lets `decide` decide nothing any more, though it is attached, and decide again."""
    variant("\tif (ret)\n\t\treturn ret;\n", "\tif (ret || enforcement.room[0])\n\t\treturn ret;\n")

    def silence(wanted: bool) -> None:
        fd = libbpf.get(state.PINS / "enforcement")
        kept = libbpf.read(fd, layout.Enforcement)
        kept.room[0] = wanted
        libbpf.write(fd, kept)
        os.close(fd)

    return silence
