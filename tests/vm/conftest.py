"""The fixtures of the tests inside the lab: each test begins and ends without a policy.

They run as root on a kernel that is theirs: they change modes of devices and the native knob at will.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import ACTOR

from uffdguard import guard
from uffdguard.kernel import native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_sessionstart() -> None:
    """Refuse to run where root's changes would outlive the tests."""
    if "virtme" not in Path("/proc/cmdline").read_text():
        raise pytest.UsageError("tests/vm change the machine they run on: run them with `make test-vm`")
    shutil.copy(Path(__file__).parents[2] / "build/actor", ACTOR)
    ACTOR.chmod(0o755)


@pytest.fixture(autouse=True)
def nothing_in_force() -> Iterator[None]:
    """Begin and end each test without a policy, the devices open to everybody, the native knob at 0."""
    native.DEV_KVM.chmod(0o666)
    native.DEV_USERFAULTFD.chmod(0o666)
    Path("/proc", native.KNOB).write_text("0\n")
    yield
    guard.stop()
    assert not guard.PINS.exists()
    assert not native.RUN.exists()


@pytest.fixture
def in_force() -> Callable[..., None]:
    """Return a function that puts a policy in force, or changes the one that is."""

    def put(mode: Mode | str, *, user_mode_only: bool = False) -> None:
        guard.start(Policy(user_mode_only=user_mode_only), Mode(mode))

    return put
