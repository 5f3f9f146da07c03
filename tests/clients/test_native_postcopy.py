"""QEMU by the backend native: from 8.1 on it opens /dev/userfaultfd where it may, and needs no system call."""

from __future__ import annotations

import postcopy
import pytest
from inside import KVM_GROUP, USER
from postcopy import Machine, Refused
from test_programs import QEMU_10

from uffdguard import guard, state
from uffdguard.kernel import native
from uffdguard.policy import Backend, Mode, Policy


def test_a_postcopy_migration_of_a_user_in_group_kvm_is_refused_when_disabled_and_completes_in_mode_kvm() -> None:
    native.DEV_KVM.chmod(0o660)
    machine = Machine(USER, [KVM_GROUP], QEMU_10)
    guard.start_native(Policy(), Mode.DISABLED)
    with pytest.raises(Refused, match="not available"):
        postcopy.migrate(machine)
    guard.set_mode(Mode.KVM)
    for _ in range(3):  # on a busy machine all pages may have come before the guest touches one
        migration = postcopy.migrate(machine)
        if migration.requests:
            break
    assert migration.requests > 0
    assert all(map(int.__lt__, migration.before, migration.after))
    status = state.status()
    assert (status.backend, status.in_force, status.native_knob, status.problems) == (Backend.NATIVE, True, 0, [])


def test_an_older_qemu_asks_by_the_system_call_and_is_refused_in_mode_kvm_too() -> None:
    native.DEV_KVM.chmod(0o660)
    guard.start_native(Policy(), Mode.KVM)
    with pytest.raises(Refused, match="Operation not permitted"):
        postcopy.migrate(Machine(USER, [KVM_GROUP]))
