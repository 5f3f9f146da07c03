"""QEMU on arm64, of Debian: a postcopy migration on KVM itself, of an ordinary user."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import postcopy
import pytest
from inside import KVM_GROUP, USER
from postcopy import Machine, Refused

from uffdguard.policy import Mode

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(os.uname().machine != "aarch64", reason="test_programs.py has it for x86-64")


def test_a_postcopy_migration_is_refused_when_disabled_and_completes_in_mode_kvm(in_force: Callable[..., None]) -> None:
    machine = Machine(USER, [KVM_GROUP])
    in_force(Mode.DISABLED)
    with pytest.raises(Refused, match="Operation not permitted"):
        postcopy.migrate(machine)
    in_force(Mode.KVM)
    migration = postcopy.migrate(machine)
    assert migration.requests > 0
    assert all(map(int.__lt__, migration.before, migration.after))
