"""The list of what must hold: what fails by which facts, and what is generated from it."""

from __future__ import annotations

import re

import prometheus
import pytest
import rules
from unit import test_cli

from uffdguard.cli import plain
from uffdguard.conditions import BY_NAME, CONDITIONS, UNKNOWN, Facts, failing
from uffdguard.policy import Backend, Mode, Policy

#: Facts by which a condition fails, and what is said then.
WRONG: tuple[tuple[str, Facts, str], ...] = (
    ("policy-answers", Facts(answers=False, reason="it was allowed"), "it was allowed"),
    ("policy-answers", Facts(answers=False), "the policy does not answer"),
    ("policy-answers", Facts(reason="no memory"), "cannot tell whether the policy answers: no memory"),
    (
        "ftrace-enabled",
        Facts(ftrace_enabled=0),
        "kernel.ftrace_enabled is 0: the kernel calls no program of the policy",
    ),
    (
        "guard-attached",
        Facts(guard="missing"),
        "the guard of sysctls does not refuse: kernel.ftrace_enabled and the native knob can be written",
    ),
    (
        "preemption",
        Facts(recursion_guard=True, preemption="full"),
        "this kernel preempts (full), and skips a decision while another one is preempted on the same CPU",
    ),
    (
        "preemption",
        Facts(recursion_guard=True),
        "this kernel may preempt, and skips a decision while another one is preempted on the same CPU",
    ),
    (
        "grants-found",
        Facts(grants_hidden=True, preemption="full"),
        "this kernel preempts (full), and finds no grant while another search is preempted on the same CPU",
    ),
    (
        "grants-found",
        Facts(grants_hidden=True),
        "this kernel may preempt, and finds no grant while another search is preempted on the same CPU",
    ),
    ("pins-complete", Facts(damage=("grants is not pinned",)), "grants is not pinned"),
    ("knob-fits", Facts(knob=1, due=0), "the native knob is 1 and not 0: the net below the policy is open"),
    (
        "knob-fits",
        Facts(knob=0, due=1),
        "the native knob is 0 and not 1: processes that the mode allows are refused",
    ),
    ("knob-fits", Facts(due=1, knob_problem="no procfs"), "no procfs"),
    (
        "knob-fits",
        Facts(backend=Backend.NATIVE, knob=1, due=0),
        "the native knob is 1 and not 0: everybody may use userfaultfd",
    ),
    ("device-fits", Facts(device="it is open"), "it is open"),
    ("rules-fit", Facts(rules=("a file is not there",)), "a file is not there"),
    ("kvm-device", Facts(kvm="/dev/kvm: no"), "/dev/kvm: no: it grants nobody"),
    ("native-counted", Facts(due=0, native_counted=False), "the refusals of the native knob are not counted"),
    ("native-counted", Facts(due=1, native_counted=True), "a counter is left over"),
    ("start-complete", Facts(start_complete=False), "the last start did not come to its end"),
    (
        "found-recorded",
        Facts(found_recorded=False),
        "the native knob as it was found is not recorded: stop will leave the native knob at 0",
    ),
    (
        "found-recorded",
        Facts(device_recorded=False),
        "/dev/userfaultfd as it was found is not recorded: stop will leave it to root alone",
    ),
    ("hooks-not-skipped", Facts(skipped=3, skips_seen=2), "the kernel skipped a program of the policy once"),
    (
        "grants-not-lost",
        Facts(lost=5, lost_seen=2),
        "an opener of /dev/kvm was not recorded, and is refused, 3 times",
    ),
    ("interface-answers", Facts(interface_dead=True), "the interface file does not answer: its server has died"),
    ("procfs-needed", Facts(procfs_left=True), "a procfs of ours is visible though the native file is not covered"),
)

#: Facts by which nothing fails.
RIGHT = (
    Facts(),
    Facts(policy=Policy(Mode.KVM), answers=True, ftrace_enabled=1, knob=1, due=1, native_counted=False),
    Facts(
        policy=Policy(), answers=True, knob=0, due=0, native_counted=True, skipped=2, skips_seen=2, lost=1, lost_seen=1
    ),
    # What has no recursion guard may preempt, and what does not preempt may have it.
    Facts(recursion_guard=False, preemption="full"),
    Facts(recursion_guard=None),
    *(Facts(recursion_guard=True, preemption=model) for model in ("none", "voluntary")),
    Facts(grants_hidden=False, preemption="full"),
    Facts(grants_hidden=True, preemption="voluntary"),
    # This kernel cannot have the guard.
    Facts(guard="unsupported"),
    # The knob cannot be read, which has its own sentence where it matters.
    Facts(knob=None, due=1, native_counted=False),
)


@pytest.mark.parametrize(("name", "facts", "sentence"), WRONG)
def test_a_condition_fails_by_its_own_facts_and_says_what_is_wrong(name: str, facts: Facts, sentence: str) -> None:
    assert [(condition.name, text) for condition, text in failing(facts)] == [(name, sentence)]


@pytest.mark.parametrize("facts", RIGHT)
def test_nothing_fails_where_nothing_is_amiss(facts: Facts) -> None:
    assert failing(facts) == []


@pytest.mark.parametrize("model", ["lazy", "full", "rt", None])
def test_what_preempts_or_cannot_be_told_does_not_go_with_the_recursion_guard(model: str | None) -> None:
    facts = Facts(recursion_guard=True, preemption=model)  # type: ignore[arg-type]
    assert [condition.name for condition, _ in failing(facts)] == ["preemption"]


def test_several_things_are_listed_in_the_order_of_the_table() -> None:
    found = failing(Facts(answers=False, damage=("one", "another"), lost=1, ftrace_enabled=0))
    names = [condition.name for condition, _ in found]
    assert names == ["policy-answers", "ftrace-enabled", "pins-complete", "pins-complete", "grants-not-lost"]


def test_each_condition_is_tried_above_and_names_are_unique() -> None:
    assert {name for name, _, _ in WRONG} == set(BY_NAME)
    assert len(BY_NAME) == len(CONDITIONS) == len({condition.alert for condition in CONDITIONS})
    for condition in CONDITIONS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", condition.name)
        assert re.fullmatch(r"Uffdguard[A-Z][A-Za-z]+", condition.alert)
        assert not condition.wrong.endswith(".")
        assert not condition.remedy.endswith(".")
        assert "|" not in condition.wrong + condition.remedy


def test_status_says_what_to_do_about_each_condition_once(capsys: pytest.CaptureFixture[str]) -> None:
    plain.show(test_cli.STATUS._replace(failing=["ftrace-enabled", "pins-complete", "knob-fits"]))
    *_, ftrace, pins = capsys.readouterr().out.splitlines()
    assert ftrace == f"ftrace-enabled: {BY_NAME['ftrace-enabled'].remedy}"
    assert pins == "pins-complete, knob-fits: uffdguard start repairs it"


@pytest.mark.parametrize("guard", plain.GUARD)
def test_status_says_how_the_guard_of_sysctls_is(guard: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain.show(test_cli.STATUS._replace(guard=guard, sysctl_refused=2))  # type: ignore[arg-type]
    assert re.search(rf"^guard of sysctls +{plain.GUARD[guard]}; refused 2 writes$", capsys.readouterr().out, re.M)


def test_a_policy_that_does_not_answer_is_not_said_to_be_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    status = test_cli.STATUS._replace(
        in_force=False, answers=False, reason="so it is", problems=["so it is"], failing=["policy-answers"]
    )
    plain.show(status)
    out = capsys.readouterr().out
    assert re.match(r"policy +NOT IN FORCE, see below\n", out)
    assert "problem: so it is\npolicy-answers: uffdguard start puts it in force" in out


def test_a_policy_that_could_not_be_asked_is_not_said_to_be_out_of_force(capsys: pytest.CaptureFixture[str]) -> None:
    status = test_cli.STATUS._replace(
        in_force=False, answers=None, reason="so it is", problems=["so it is"], failing=["policy-answers"]
    )
    plain.show(status)
    out = capsys.readouterr().out
    assert re.match(r"policy +CANNOT TELL whether it is in force, see below\nmode +kvm\n", out)
    assert out.endswith(f"problem: so it is\npolicy-answers: {UNKNOWN}\n")
    assert "not in force" not in out.lower()


def test_the_alerting_rules_are_those_of_the_list() -> None:
    assert prometheus.RULES.read_text() == rules.rules(), "run .venv/bin/python tests/rules.py"


def test_the_manual_page_has_the_list() -> None:
    page = rules.SEEING.parents[1] / "man/uffdguard.8"
    names = re.findall(r"^\.It Li ([a-z-]+)$", page.read_text(), re.MULTILINE)
    assert names == [condition.name for condition in CONDITIONS]


def test_the_documentation_has_the_list() -> None:
    assert rules.SEEING.read_text() == rules.seeing(), "run .venv/bin/python tests/rules.py"
    assert rules.table() in rules.seeing()
