"""The fixtures of the tests on kernels that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import lab

from uffdguard import config, install, state
from uffdguard.kernel import native

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["lab"]

#: What would be left behind; the mount table shows the rest.
PLACES = (native.RUN, state.PINS, install.MANIFEST, install.COMPLETION, config.DEFAULT)


@pytest.fixture(autouse=True, params=[0, 1])
def knob(lab: None, request: pytest.FixtureRequest) -> Iterator[int]:
    """Give the value of the native knob, and see at the end that it, the mounts and the files are as they were."""
    native.FILE.write_text(f"{request.param}\n")
    mounts = Path("/proc/self/mountinfo").read_text()
    yield request.param
    assert native.FILE.read_text() == f"{request.param}\n"
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert not [path for path in (*PLACES, *(install.UNITS / name for name in install.NAMES)) if path.exists()]
