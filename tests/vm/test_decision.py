"""The decision on a live kernel, row by row, as an unprivileged user sees it."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest
from inside import actor, force_knob, waiting_actor

from uffdguard import state
from uffdguard.kernel import layout, libbpf, native
from uffdguard.policy import Mode, Policy, Reason, Request, decide

if TYPE_CHECKING:
    from collections.abc import Callable

KVM = "open:/dev/kvm"
#: Each way to ask, without and with UFFD_USER_MODE_ONLY.
PLAIN = ("syscall", "int80", "device", "device-int80")
USER_MODE_ONLY = tuple(f"{way}:1" for way in PLAIN)
ALL = PLAIN + USER_MODE_ONLY


def refused(answers: list[str]) -> bool:
    """Whether there are answers, and all of them are refusals."""
    assert answers
    return set(answers) == {"EPERM"}


def allowed(answers: list[str]) -> bool:
    """Whether there are answers, and none of them is a refusal."""
    assert answers
    return set(answers) == {"allowed"}


def number_of_keys(grants: int) -> int:
    """Count the entries of the map themselves."""
    number, key = 0, ctypes.c_uint64()
    position = None
    while not libbpf.library().bpf_map_get_next_key(grants, position, ctypes.byref(key)):
        number, position = number + 1, ctypes.byref(ctypes.c_uint64(key.value))
    return number


@pytest.mark.kept
class TestDisabled:
    @pytest.fixture(autouse=True)
    def mode(self, in_force: Callable[..., None]) -> None:
        in_force("disabled")

    def test_refuses_every_way(self) -> None:
        assert refused(actor(*ALL))

    def test_refuses_every_way_after_opening_kvm(self) -> None:
        opened, *answers = actor(KVM, *ALL)
        assert opened == "allowed"
        assert refused(answers)

    def test_refuses_by_our_own_hook_also_when_the_native_knob_is_open(self) -> None:
        force_knob(1)
        assert refused(actor(*ALL))


class TestEnabled:
    def test_allows_every_way(self, in_force: Callable[..., None]) -> None:
        in_force("enabled")
        assert allowed(actor(*ALL))
        assert allowed(actor(KVM, *ALL))


@pytest.mark.kept
class TestKvm:
    @pytest.fixture(autouse=True)
    def mode(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")

    def test_refuses_every_way_before_kvm_is_opened(self) -> None:
        assert refused(actor(*ALL))

    @pytest.mark.parametrize(
        "steps",
        [
            (KVM,),
            (KVM, "close"),
            (KVM, "close", "thread"),
            (KVM, "thread"),
            ("older-thread", KVM, "hand-over"),
            (KVM, "vfork"),
            (KVM, "clone-vm"),
            (KVM, "leader-leaves"),
        ],
        ids=" ".join,
    )
    def test_allows_the_address_space_that_has_opened_kvm(self, steps: tuple[str, ...]) -> None:
        assert allowed(actor(*steps, *ALL))

    def test_allows_who_opened_kvm_before_setuid(self) -> None:
        native.DEV_KVM.chmod(0o600)
        assert allowed(actor(KVM, "become:1000", *ALL, user=0))

    def test_allows_a_relative_when_the_other_one_opened_kvm(self) -> None:
        # The vforked child opens it; its parent, in the same address space, is asked by the older thread.
        assert allowed(actor("vfork", KVM, "thread", *ALL))

    @pytest.mark.parametrize(
        "steps",
        [
            (KVM, "fork"),
            (KVM, "exec"),
            (KVM, "thread", "exec"),
            (KVM, "fork", "exec"),
            (KVM, "vfork", "exec"),
            ("open-path:/dev/kvm",),
        ],
        ids=" ".join,
    )
    def test_refuses_another_address_space(self, steps: tuple[str, ...]) -> None:
        opened, *answers = actor(*steps, *ALL)
        assert opened == "allowed"
        assert refused(answers)

    def test_refuses_who_may_not_open_kvm(self) -> None:
        native.DEV_KVM.chmod(0o660)
        opened, *answers = actor(KVM, *ALL)
        assert opened == "EACCES"
        assert refused(answers)

    def test_refuses_who_received_a_descriptor(self) -> None:
        assert refused(actor("receive:/dev/kvm", *ALL))

    def test_refuses_who_inherited_a_descriptor(self) -> None:
        fd = os.open("/dev/kvm", os.O_RDWR)
        try:
            assert refused(actor(*ALL, pass_fds=(fd,)))
        finally:
            os.close(fd)

    def test_opening_another_misc_device_grants_nothing(self) -> None:
        opened, *answers = actor("open:/dev/userfaultfd", *ALL)
        assert opened == "allowed"
        assert refused(answers)

    def test_the_grant_ends_with_the_address_space(self) -> None:
        before = state.status().grants
        with waiting_actor(KVM, "wait"):
            assert state.status().grants == before + 1
        assert state.status().grants == before

    def test_the_number_of_grants_is_the_number_of_entries(self) -> None:
        with waiting_actor(KVM, KVM, "wait"), waiting_actor(KVM, "wait"), state.pinned() as pins:
            assert state.status().grants == number_of_keys(pins.fds["grants"]) >= 2


class TestHeldAtTheFirstStart:
    def test_who_holds_kvm_is_granted(self, in_force: Callable[..., None]) -> None:
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            in_force("kvm")
            assert allowed(go_on())

    @pytest.mark.parametrize("steps", [("open-path:/dev/kvm",), (KVM, "close")], ids=" ".join)
    def test_who_does_not_hold_it_open_is_not(self, in_force: Callable[..., None], steps: tuple[str, ...]) -> None:
        with waiting_actor(*steps, "wait", *ALL) as go_on:
            in_force("kvm")
            assert refused(go_on()[1:])

    @pytest.mark.parametrize("link", ["grant", "forget"])
    def test_a_repair_grants_nobody(self, in_force: Callable[..., None], link: str) -> None:
        in_force("kvm")
        (state.PINS / "grant").unlink()
        (state.PINS / link).unlink(missing_ok=True)
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            in_force("kvm")
            assert refused(go_on()[1:])

    def test_an_upgrade_grants_nobody_and_keeps_who_is_granted(self, in_force: Callable[..., None]) -> None:
        fd = os.open("/dev/kvm", os.O_RDWR)
        try:
            in_force("kvm")
            with waiting_actor(KVM, "wait", *ALL) as go_on:
                state.LOADED.write_text("another object")
                in_force("kvm")
                assert allowed(go_on())
                assert refused(actor(*ALL, pass_fds=(fd,)))
        finally:
            os.close(fd)


class TestPrivilege:
    @pytest.mark.parametrize("mode", list(Mode))
    def test_root_and_the_capability_are_allowed(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode)
        assert allowed(actor(*ALL, user=0))
        assert allowed(actor("become-with-ptrace:1000", *ALL, user=0))

    @pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
    def test_root_without_the_capability_is_refused(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode)
        force_knob(1)  # so that our hook is what is asked
        assert refused(actor("drop-ptrace", *ALL, user=0))

    @pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
    def test_root_of_a_user_namespace_is_refused(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode)
        force_knob(1)  # so that our hook is what is asked
        assert refused(actor("unshare-user", *ALL))
        assert refused(actor("unshare-user", "syscall", "int80", user=0))


class TestUserModeOnly:
    @pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
    def test_is_allowed_where_the_real_flags_say_so(self, in_force: Callable[..., None], mode: Mode) -> None:
        in_force(mode, user_mode_only=True)
        assert allowed(actor(*USER_MODE_ONLY))
        assert refused(actor(*PLAIN))

    @pytest.mark.parametrize("mode", [Mode.DISABLED, Mode.KVM])
    def test_gets_nothing_by_a_flag_where_another_abi_would_look(
        self, in_force: Callable[..., None], mode: Mode
    ) -> None:
        in_force(mode, user_mode_only=True)
        force_knob(1)  # so that our hook is what is asked
        misleading = [f"{way}-misleading" for way in ("syscall", "int80", "device-int80")]
        assert refused(actor(*misleading, "device-misleading"))
        assert allowed(actor("syscall-misleading:1", "int80-misleading:1", "device-misleading:1"))

    def test_is_refused_by_default(self, in_force: Callable[..., None]) -> None:
        in_force("disabled")
        assert refused(actor(*USER_MODE_ONLY))


@pytest.mark.parametrize("mode", list(Mode))
def test_other_anonymous_inodes_are_untouched(in_force: Callable[..., None], mode: Mode) -> None:
    before = actor("others")
    in_force(mode)
    decided = state.status().decisions
    assert len(before) == 9
    assert actor("others") == before
    assert state.status().decisions == decided


@pytest.mark.parametrize("mode", list(Mode))
def test_an_existing_userfaultfd_is_untouched(in_force: Callable[..., None], mode: Mode) -> None:
    in_force(mode)
    assert actor(f"use-existing:{1000}", user=0) == ["42", "handed"]


@pytest.mark.parametrize("user_mode_only", [False, True], ids=["deny", "allow"])
@pytest.mark.parametrize("mode", list(Mode))
def test_the_kernel_decides_as_the_model(in_force: Callable[..., None], mode: Mode, user_mode_only: bool) -> None:
    """Each combination of what the model asks about, against the kernel's answer and the reason it counted."""
    in_force(mode, user_mode_only=user_mode_only)
    for kvm in (False, True):
        for capability in (False, True):
            for flags in (0, 1):
                request = Request(capability=capability, user_mode_only=bool(flags), kvm=kvm)
                expected = decide(Policy(mode, user_mode_only), request)
                before = _decisions()
                become = "become-with-ptrace:1000" if capability else "become:1000"
                *_, answer = actor(*([KVM] if kvm else []), become, f"device:{flags}", user=0)
                assert answer == ("allowed" if expected.allowed else "EPERM"), request
                counted = {reason: n - before[reason] for reason, n in _decisions().items() if n != before[reason]}
                assert counted == {expected: 1}, request


def _decisions() -> dict[Reason, int]:
    with state.pinned() as pins:
        return libbpf.read(pins.fds["counts"], layout.Counts).total().by_reason()
