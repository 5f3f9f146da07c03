"""A kernel on which the policy cannot be in force: each verb says so, says what to do, and leaves nothing behind."""

from __future__ import annotations

import json
import os

import pytest
from inside import USER, uffdguard

#: On arm64 the hook is there and no program can be attached to it.
ARM64 = os.uname().machine == "aarch64"
REMEDY = "boot Linux 6.4 or newer" if ARM64 else "boot Linux 5.12 or newer, with CONFIG_BPF_LSM"
FACT = "no program can be attached to functions" if ARM64 else "no inode_init_security_anon for BPF"
REFUSAL = f"{FACT}; {REMEDY}\n"


@pytest.mark.parametrize(
    "verb", ["start", "start --mode kvm", "mode", "mode kvm", "knob", "knob serve", "install", "install --mode kvm"]
)
def test_a_verb_that_needs_the_policy_names_the_kernel_and_the_remedy_on_one_line(verb: str) -> None:
    outcome = uffdguard(*verb.split())
    assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert outcome.err.endswith(f": {REFUSAL}")


def test_status_shows_the_native_knob_and_ends_with_the_refusal(knob: int) -> None:
    outcome = uffdguard("status")
    assert (outcome.status, outcome.err) == (1, "")
    assert f"native knob     {knob}\n" in outcome.out
    assert outcome.out.endswith(f"\nthe policy is not in force: {REFUSAL}")


def test_doctor_ends_with_the_one_remedy() -> None:
    outcome = uffdguard("doctor")
    assert (outcome.status, outcome.err) == (1, "")
    *_, row, remedy, answer = outcome.out.splitlines()
    assert row.startswith("program ")
    assert remedy == f"hook: {REMEDY}"
    assert answer.startswith("this machine cannot enforce the policy: ")
    rows = {row["name"]: row for row in json.loads(uffdguard("doctor", "--json").out)["rows"]}
    assert (rows["hook"]["state"], rows["program decide"]["state"]) == ("missing", "ok" if ARM64 else "missing")
    assert ARM64 or (rows["kernel"]["state"], rows["kernel"]["fact"]) == (
        "warning",
        f"{os.uname().release}: nobody has tried this line of kernels",
    )


def test_stop_has_nothing_to_do() -> None:
    outcome = uffdguard("stop")
    assert (outcome.status, outcome.out, outcome.err) == (0, "not in force; nothing to do\n", "")


def test_probe_tells_what_the_kernel_itself_answers(knob: int) -> None:
    outcome = uffdguard("probe", "--json", user=USER)
    answers = json.loads(outcome.out)
    assert (outcome.status, outcome.err) == (0, "")
    assert (answers["syscall"], answers["device"]) == ("allowed" if knob else "EPERM", "EACCES" if ARM64 else "ENOENT")
