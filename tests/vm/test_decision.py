"""The decision on a live kernel, row by row, as an unprivileged user sees it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import ACTOR, USER, actor, force_knob, waiting_actor

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
            ("leader-leaves", KVM),
            ("leader-leaves", KVM, "vfork"),
            ("thread", KVM, "vfork", "thread"),
            (KVM, "vfork", "clone-vm", "vfork"),
            ("vfork", "child-opens"),
            ("child-opens", "vfork", "clone-vm"),
            ("vfork", "exec", KVM),
            (KVM, "be-traced"),
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

    @pytest.mark.parametrize(
        "steps",
        [
            ("leader-leaves", KVM, "fork"),
            ("leader-leaves", KVM, "exec"),
            (KVM, "leader-leaves", "exec"),
            (KVM, "vfork", "fork"),
            (KVM, "clone-vm", "thread", "exec"),
            (KVM, "clone-vm", "exec", "fork"),
            ("child-opens", "fork"),
            ("child-opens", "exec"),
            # Another is the parent by then: a subreaper that is granted, or init.
            (KVM, "subreaper", "orphan"),
            (KVM, "subreaper", "orphan", "thread"),
            (KVM, "orphan"),
        ],
        ids=" ".join,
    )
    def test_refuses_a_relative_that_has_another_address_space(self, steps: tuple[str, ...]) -> None:
        answers = actor(*steps, *ALL)
        assert answers[len(answers) - len(ALL) :] == ["EPERM"] * len(ALL)
        assert set(answers[: -len(ALL)]) <= {"allowed"}

    def test_refuses_who_goes_on_in_an_address_space_when_the_one_that_has_opened_kvm_has_ended(self) -> None:
        """The seed's flag would outlive it; ours is the process's, and whoever goes on can open it."""
        assert refused(actor(KVM, "orphan-vm", *ALL)[1:])
        assert allowed(actor("orphan-vm", KVM, *ALL))

    def test_refuses_who_is_traced_by_one_that_has_opened_kvm(self) -> None:
        assert refused(actor("be-traced", *ALL))

    def test_refuses_who_gets_the_pid_of_one_that_had_opened_kvm(self) -> None:
        def begin(*steps: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [ACTOR, *steps], user=USER, group=USER, extra_groups=[], stdout=subprocess.PIPE, text=True
            )

        for _ in range(100):
            with begin(KVM, "syscall") as first:
                assert first.communicate()[0].split() == ["allowed", "allowed"]
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(first.pid - 1))
            with begin(*ALL) as second:
                assert refused(second.communicate()[0].split())
            if second.pid == first.pid:
                return
        pytest.fail("no pid was used twice")

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

    def test_who_is_granted_is_listed_each_process_once(self) -> None:
        with state.pinned() as pins:
            before = state.granted(pins)  # ourselves, after a test above
            with (
                waiting_actor(KVM, KVM, "wait"),
                waiting_actor(KVM, "leader-leaves", "wait"),
                waiting_actor(KVM, "clone-vm", "thread", "wait"),  # two processes with one address space
                waiting_actor(KVM, "fork", "wait"),
                waiting_actor(KVM, "exec", "wait"),
            ):
                granted = state.granted(pins) - before
                assert len(granted) == state.status().grants - len(before) == 5
                assert {Path(f"/proc/{pid}/comm").read_text() for pid in granted} == {"actor\n"}


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

    def test_a_repair_grants_nobody(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        (state.PINS / "grant").unlink()
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            in_force("kvm")
            assert refused(go_on()[1:])

    def test_a_lost_list_of_who_is_granted_is_repaired_and_the_grants_stay(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            (state.PINS / "granted").unlink()
            in_force("kvm")
            assert state.status().grants == 1
            assert allowed(go_on())

    def test_an_upgrade_from_grants_of_another_kind_grants_nobody_and_leaves_none_of_the_older_programs(
        self, in_force: Callable[..., None], variant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context():
            variant("__type(value, __u64);\n} grants", "__type(value, __u64[2]);\n} grants")
            in_force("kvm")
        with waiting_actor(KVM, "wait", *ALL) as go_on:
            with state.pinned() as found:
                libbpf.pin(found.fds["grant"], state.PINS / "forget")
                older = {program.id for program in found.programs.values()}
            monkeypatch.undo()
            in_force("kvm")
            with state.pinned() as found:
                assert older.isdisjoint(program.id for program in found.programs.values())
            assert not (state.PINS / "forget").exists()
            assert state.status().problems == []
            assert refused(go_on()[1:])
            assert allowed(actor(KVM, *ALL))

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
