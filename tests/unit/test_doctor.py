"""doctor as far as it goes without a kernel that can enforce: each row, what it says, and the answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from unit.test_cli import run

from uffdguard import config
from uffdguard.conditions import BY_NAME, CONDITIONS
from uffdguard.errors import Failure
from uffdguard.kernel import features, libbpf, native
from uffdguard.kernel.features import Row
from uffdguard.policy import WEAKER

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = "#1 SMP {} Debian 6.1.38-1 (2023-07-14)"
VOLUNTARY = (
    "CONFIG_PREEMPT_BUILD=y\n# CONFIG_PREEMPT_NONE is not set\nCONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_DYNAMIC=y\n"
)


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return the exit status, what --json says, and its rows by their names."""
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    return status, found, {row["name"]: row for row in found["rows"]}


def test_it_has_a_row_for_each_thing_and_what_to_do_about_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "TRIED", ())
    monkeypatch.setattr(features, "HOOK", "no_such_hook")
    status, found, rows = doctor(capsys)
    assert (status, found["can_enforce"], rows["hook"]["state"]) == (1, False, "missing")
    assert (rows["kernel"]["state"], rows["kernel"]["fact"]) == (
        "warning",
        f"{os.uname().release}: nobody has tried this line of kernels",
    )
    assert all(row["hint"] for row in rows.values() if row["state"] != "ok")
    assert {"kernel", "hook", "LSM list", "BTF", "lockdown", "privileges", "bpffs", "libbpf", "KVM", "sysctl"} <= set(
        rows
    )
    assert {"namespaces", "program decide"} <= set(rows)
    assert {condition.row for condition in CONDITIONS if condition.row} | {"configuration"} <= set(rows)


@pytest.mark.parametrize("there", [True, False])
def test_each_program_that_start_loads_has_a_row(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(features, "has_sysctl_guard", lambda: there)
    with libbpf.Object(features.OBJECT) as obj:
        names = {f"program {name}" for name in obj.programs() if there or name != "guard_sysctl"}
    assert {row.name for row in features.program_rows()} == names


def test_where_the_object_is_missing_one_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "OBJECT", tmp_path / "guard.bpf.o")
    (row,) = features.program_rows()
    assert (row.name, row.state) == ("program decide", "missing")
    assert "reinstall" in row.hint


OK, WARNING = Row("a", "ok", ""), Row("b", "warning", "", "x")
CANNOT_TELL, MISSING = Row("c", "cannot tell", "", "mount it"), Row("d", "missing", "", "boot another")
NO_ROOT = Row("privileges", "missing", "", "run it as root")


@pytest.mark.parametrize(
    ("rows", "able", "line"),
    [
        ([OK, WARNING], True, "this machine can enforce the policy"),
        ([OK, CANNOT_TELL], None, "cannot tell whether this machine can enforce the policy"),
        ([NO_ROOT, OK], None, "cannot tell whether this machine can enforce the policy"),
        ([OK, MISSING], False, "this machine cannot enforce the policy: 1 thing is missing"),
        ([NO_ROOT, CANNOT_TELL, MISSING], False, "this machine cannot enforce the policy: 2 things are missing"),
    ],
)
def test_its_last_line_is_the_answer(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Row],
    able: bool | None,
    line: str,
) -> None:
    monkeypatch.setattr(features, "rows", lambda: rows)
    monkeypatch.setattr(features, "program_rows", list)
    status, out, _ = run(capsys, "doctor")
    *_, last = out.splitlines()
    assert last == line
    assert doctor(capsys)[:2] == (status, {"can_enforce": able, "rows": [row._asdict() for row in rows]})
    assert status == int(any(row.state == "missing" for row in rows))


def test_for_the_backend_native_it_asks_what_that_needs_and_says_that_it_is_weaker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("DEFAULT", "ADMINISTRATOR", "DROP_INS"):
        monkeypatch.setattr(config, name, tmp_path / name)
    config.ADMINISTRATOR.write_text('backend = "native"\n')
    monkeypatch.setattr(features, "NATIVE_CHECKS", (features._device_for_native,))
    for device, state in (("/dev/null", "ok"), ("/dev/no-such-device", "warning")):
        monkeypatch.setattr(native, "DEV_USERFAULTFD", Path(device))
        status, found, rows = doctor(capsys)
        assert (status, found["can_enforce"]) == (0, True)
        assert set(rows) == {"userfaultfd device", "configuration", "backend"}
        assert rows["userfaultfd device"]["state"] == state
        assert (rows["backend"]["state"], rows["backend"]["fact"]) == ("warning", "native, which is weaker than lsm")
    _, out, _ = run(capsys, "doctor")
    assert all(f"\nweaker: {sentence}\n" in out for sentence in WEAKER)
    assert out.endswith("this machine can enforce the policy by the weaker backend native\n")
    config.ADMINISTRATOR.write_text('backend = "native"\nuser-mode-only = "deny"\n')
    status, _, rows = doctor(capsys)
    assert (status, rows["configuration"]["state"]) == (1, "missing")


# What cannot be told is not taken for right, nor for wrong.


def row(name: str) -> Row:
    return next(row for row in features.rows() if row.name == name)


def test_without_securityfs_it_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SECURITYFS", tmp_path)
    for name in ("LSM list", "lockdown"):
        assert row(name)[1:3] == ("cannot tell", "securityfs is not mounted")
        assert row(name).hint.startswith("mount -t securityfs")
    (tmp_path / "lsm").write_text("capability,bpf\n")
    assert row("lockdown") == Row("lockdown", "ok", "this kernel has none")
    for text, state in (
        ("[none] integrity confidentiality\n", "ok"),
        ("none integrity [confidentiality]\n", "missing"),
    ):
        (tmp_path / "lockdown").write_text(text)
        assert row("lockdown").state == state


def test_without_btf_it_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> bool:
        raise OSError(1, "btf__load_vmlinux_btf: Operation not permitted")

    monkeypatch.setattr(libbpf, "kernel_has_function", fail)
    for name in ("hook", "preemption", "guard of sysctls"):
        assert row(name).state == "cannot tell"


def test_it_names_a_sysctl_that_switches_the_policy_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ftrace = tmp_path / "ftrace_enabled"
    monkeypatch.setattr(features, "FTRACE_ENABLED", ftrace)
    assert row("ftrace").state == "ok"  # not there: this kernel has no ftrace
    ftrace.write_text("1\n")
    assert row("ftrace") == Row("ftrace", "ok", "kernel.ftrace_enabled = 1")
    ftrace.write_text("0\n")
    wrong = "kernel.ftrace_enabled is 0: the kernel calls no program of the policy"
    assert row("ftrace") == Row("ftrace", "missing", wrong, BY_NAME["ftrace-enabled"].remedy)
    monkeypatch.setattr(features, "CHECKS", (features._ftrace,))
    with pytest.raises(Failure, match=r"ftrace: kernel.ftrace_enabled is 0.*; remove it from sysctl.d"):
        features.require()


def test_the_jit_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "JIT_ENABLED", tmp_path / "bpf_jit_enable")
    for text in (None, "0\n", "1\n", "2\n"):
        if text:
            features.JIT_ENABLED.write_text(text)
        assert row("JIT").state == "ok"
    assert "interprets" not in row("JIT").fact
    features.JIT_ENABLED.write_text("0\n")
    assert "interprets" in row("JIT").fact


def test_it_names_the_file_the_line_and_the_key_of_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("DEFAULT", "usr.toml"), ("ADMINISTRATOR", "etc.toml"), ("DROP_INS", "etc.d")):
        monkeypatch.setattr(config, name, tmp_path / path)
    monkeypatch.setattr(native, "has_kvm", lambda: True)
    assert row("configuration") == Row("configuration", "ok", "mode disabled (no file)")
    config.DEFAULT.write_text('mode = "kvm"\n')
    config.ADMINISTRATOR.write_text("enforce = false\n")
    assert row("configuration").fact == f"mode kvm, audit ({tmp_path}/usr.toml, {tmp_path}/etc.toml)"
    config.ADMINISTRATOR.write_text('\nmode = "kmv"\n')
    wrong = row("configuration")
    assert (wrong.state, wrong.fact) == (
        "missing",
        f"{tmp_path}/etc.toml, line 2: mode: must be one of disabled, enabled, kvm, in quotes",
    )
    config.ADMINISTRATOR.unlink()
    monkeypatch.setattr(native, "has_kvm", lambda: False)
    assert row("configuration")[1:3] == ("missing", "mode kvm does not exist here: this kernel has no KVM")


# How the kernel preempts.


def no_configuration() -> str | None:
    raise AssertionError("it is not needed")


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("none (voluntary) full", "voluntary"),
        ("(none) voluntary full\n", "none"),
        ("full (lazy)\n", "lazy"),
        ("none voluntary (full) lazy\n", "full"),
        ("none voluntary full", None),
        ("(eager)", None),
        ("", None),
    ],
)
def test_the_model_that_debugfs_shows_is_in_brackets(text: str, model: str | None) -> None:
    assert features.preemption_in_debugfs(text) == model


@pytest.mark.parametrize(
    ("flag", "line", "model"),
    [
        ("", "quiet preempt=full", "none"),  # it cannot choose
        ("PREEMPT", "preempt=none", "full"),
        ("PREEMPT_RT", "preempt=none", "rt"),
        ("PREEMPT_DYNAMIC", "quiet preempt=full", "full"),
        ("PREEMPT_DYNAMIC", "preempt=none quiet", "none"),
        ("PREEMPT_DYNAMIC", "preempt=none preempt=full", "full"),
        ("PREEMPT_DYNAMIC", "preempt=full preempt=voluntary preempt=eager", "voluntary"),
        ("PREEMPT_DYNAMIC", "preempt=voluntary -- preempt=full", "voluntary"),
    ],
)
def test_the_model_at_boot_is_the_last_of_the_command_line(flag: str, line: str, model: str) -> None:
    assert features.preemption_at_boot(VERSION.format(flag), line, no_configuration) == model


@pytest.mark.parametrize(
    ("built", "model"),
    [
        (VOLUNTARY, "voluntary"),
        (VOLUNTARY.replace("_VOLUNTARY", "_NONE"), "none"),
        (VOLUNTARY.replace("_VOLUNTARY", "_LAZY"), "lazy"),
        (VOLUNTARY.replace("_VOLUNTARY", ""), "full"),
        ("CONFIG_PREEMPT_DYNAMIC=y\n", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("line", ["quiet", "xpreempt=full", "preempt=eager", "-- preempt=none", ""])
def test_without_a_word_the_model_is_what_the_kernel_was_built_with(
    line: str, built: str | None, model: str | None
) -> None:
    assert features.preemption_at_boot(VERSION.format("PREEMPT_DYNAMIC"), line, lambda: built) == model


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Row]:
    """Return a function that gives the row of a kernel that preempts as debugfs says, with a recursion guard or not."""
    monkeypatch.setattr(features, "PREEMPT", tmp_path / "preempt")
    monkeypatch.setattr(features, "CHECKS", (features._preemption,))

    def kernel(preempt: str, *, guard: bool) -> Row:
        monkeypatch.setattr(libbpf, "kernel_has_function", lambda name: not guard)
        features.PREEMPT.write_text(preempt)
        return row("preemption")

    return kernel


def test_start_refuses_where_a_preempted_decision_hides_the_next_one(kernel: Callable[..., Row]) -> None:
    for preempt in ("none (voluntary) full", "(none) voluntary full"):
        assert kernel(preempt, guard=True).state == "ok"
        features.require()
    assert kernel("none voluntary (full)", guard=False).state == "ok"
    features.require()
    wrong = kernel("none voluntary (full)", guard=True)
    assert (wrong.state, wrong.hint) == ("missing", BY_NAME["preemption"].remedy)
    with pytest.raises(
        Failure, match=r"preemption: this kernel preempts \(full\), and skips a decision.*; boot Linux 6.1.54"
    ):
        features.require()
