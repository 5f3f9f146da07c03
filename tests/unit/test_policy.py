"""The decision table: each row of the design, and what must hold for all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdguard.policy import Mode, Policy, Reason, Request, decide, interface_line

POLICIES = st.builds(Policy, st.sampled_from(Mode), st.booleans())
REQUESTS = st.builds(Request, st.booleans(), st.booleans(), st.booleans())


@pytest.mark.parametrize(
    ("policy", "request_", "reason"),
    [
        (Policy(Mode.DISABLED), Request(capability=True), Reason.CAPABILITY),
        (Policy(Mode.ENABLED), Request(), Reason.ENABLED),
        (Policy(Mode.ENABLED), Request(capability=True), Reason.CAPABILITY),
        (Policy(Mode.DISABLED, user_mode_only=True), Request(user_mode_only=True), Reason.USER_MODE_ONLY),
        (Policy(Mode.KVM, user_mode_only=True), Request(user_mode_only=True, kvm=True), Reason.USER_MODE_ONLY),
        (Policy(Mode.DISABLED), Request(user_mode_only=True), Reason.DISABLED),
        (Policy(Mode.KVM), Request(kvm=True), Reason.KVM),
        (Policy(Mode.KVM), Request(user_mode_only=True), Reason.NO_KVM),
        (Policy(Mode.KVM, user_mode_only=True), Request(), Reason.NO_KVM),
        (Policy(Mode.DISABLED), Request(kvm=True), Reason.DISABLED),
        (Policy(), Request(), Reason.DISABLED),
    ],
)
def test_the_first_row_that_fits_decides(policy: Policy, request_: Request, reason: Reason) -> None:
    assert decide(policy, request_) is reason


@given(POLICIES, REQUESTS, st.sampled_from(["capability", "user_mode_only", "kvm"]))
def test_one_more_fact_never_turns_allowed_into_refused(policy: Policy, request: Request, fact: str) -> None:
    assert decide(policy, request._replace(**{fact: True})).allowed >= decide(policy, request).allowed


@given(st.booleans(), REQUESTS)
def test_disabled_is_no_laxer_than_kvm_and_kvm_no_laxer_than_enabled(option: bool, request: Request) -> None:
    verdicts = [decide(Policy(mode, option), request).allowed for mode in (Mode.DISABLED, Mode.KVM, Mode.ENABLED)]
    assert verdicts == sorted(verdicts)


def test_only_disabled_and_no_kvm_refuse() -> None:
    assert {reason for reason in Reason if not reason.allowed} == {Reason.DISABLED, Reason.NO_KVM}


def test_the_interface_line_has_brackets_where_the_mode_is() -> None:
    assert interface_line(Mode.KVM, tuple(Mode)) == "disabled enabled [kvm]"
    assert interface_line(Mode.DISABLED, (Mode.DISABLED, Mode.ENABLED)) == "[disabled] enabled"
