"""QEMU, unedited, as an ordinary user: refused or migrated as the mode says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from inside import KVM_GROUP, USER
from postcopy import Refused, migrate

from uffdguard.kernel import native
from uffdguard.policy import Mode

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(autouse=True)
def kvm_has_a_group() -> None:
    """Have /dev/kvm as Debian has it: for a group, not for everybody."""
    native.DEV_KVM.chmod(0o660)


@pytest.mark.parametrize("mode", [Mode.ENABLED, Mode.KVM])
def test_a_postcopy_migration_completes_and_the_guest_goes_on(in_force: Callable[..., None], mode: Mode) -> None:
    in_force(mode)
    migration = migrate(USER, [KVM_GROUP])
    assert migration.requests > 0
    assert all(map(int.__lt__, migration.before, migration.after))


def test_postcopy_is_refused_in_mode_disabled(in_force: Callable[..., None]) -> None:
    in_force("disabled")
    with pytest.raises(Refused, match="Operation not permitted"):
        migrate(USER, [KVM_GROUP])
