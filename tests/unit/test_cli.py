"""The command line as far as it goes without root: usage, errors, output, and what is imported."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from uffdguard import cli
from uffdguard.cli import render
from uffdguard.errors import Failure
from uffdguard.kernel import libbpf, native, probe
from uffdguard.policy import Mode, Policy, Reason
from uffdguard.state import Status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import NoReturn

STATUS = Status(
    in_force=True,
    answers=True,
    reason=None,
    mode=Mode.KVM,
    user_mode_only=False,
    audit=True,
    since="2026-11-25T12:00:00+0000",
    kernel="6.12.1-amd64",
    native_knob=1,
    drift=True,
    pins={"grants": True, "decide": False},
    skipped=1,
    lost=2,
    guard="attached",
    interface="dead",
    grants=3,
    allowed=4,
    refused=5,
    decisions=dict.fromkeys(Reason, 1),
    native=2,
    let_pass=1,
    suppressed=0,
    sysctl_refused=0,
    problems=["one", "another"],
    failing=["pins-complete", "knob-fits"],
)

COMMAND = [sys.executable, "-c", "from uffdguard.cli import main; main()"]


def raising(error: Exception) -> Callable[[], NoReturn]:
    def function() -> NoReturn:
        raise error

    return function


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    status, out, err = run(capsys, verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: uffdguard {verb}")
    assert verb in run(capsys, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stat"], "No such command 'stat'"),
        (["status", "--yaml"], "No such option"),
        (["status", "now"], "unexpected extra argument"),
        (["mode", "kmv"], "there is no mode 'kmv'; the modes are disabled, enabled"),
        (["start", "--mode", ""], "there is no mode ''; the modes are disabled, enabled"),
        (["mode", "KVM"], "there is no mode 'KVM'"),
        (["mode", "k\nvm\x1b"], "there is no mode 'k\\nvm\\x1b'"),
        (["status", "--\n\x1b"], r"--\n\x1b"),
        (["mode", "[kvm]"], "there is no mode '[kvm]'"),
        (["check"], "give either a PID or, after --, a COMMAND"),
        (["check", "1", "--", "sh"], "give either a PID or, after --, a COMMAND"),
        (["check", "sh"], "'sh' is not a valid integer"),
        (["check", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_failure_is_one_line_and_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise Failure("it is so", "do that")

    monkeypatch.setattr("uffdguard.state.status", fail)
    assert run(capsys, "status") == (1, "", "uffdguard: it is so; do that\n")
    with pytest.raises(Failure, match="it is so"):
        cli.main(["--debug", "status"])
    monkeypatch.setattr("uffdguard.lab.kernels.get", fail)
    assert run(capsys, "lab", "--", "true", "--debug") == (1, "", "uffdguard: it is so; do that\n")


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed:
        done = subprocess.run([*COMMAND, "doctor"], stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["--version"], ["mode", "--help"]])
def test_only_what_a_verb_needs_is_imported(arguments: list[str]) -> None:
    script = f"""
import sys
from uffdguard.cli import main
try:
    main({arguments!r})
except SystemExit:
    ours = {{"guard", "state", "lab", "metrics"}}
    heavy = {{"rich", "msgspec", "ctypes", "prometheus_client", *(f"uffdguard.{{name}}" for name in ours)}}
    print(heavy & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).endswith("set()\n")


@pytest.mark.parametrize("verb", cli.PLAIN)
def test_alone_it_imports_neither_click_nor_what_makes_dataclasses(verb: str) -> None:
    script = f"""
import sys
from uffdguard import cli, policy, state
state.current_policy = lambda: policy.Policy(policy.Mode.KVM, audit=True)
state.status = lambda: state.Status(**{STATUS._asdict() | {"mode": None, "backend": None, "decisions": {}}!r})
try:
    cli.main([{verb!r}])
except SystemExit:
    print({{"click", "dataclasses", "inspect", "msgspec"}} & set(sys.modules))
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).endswith("set()\n")


OUTCOMES: dict[str, Callable[[], object]] = {
    "in force": lambda: STATUS,
    "not in force": lambda: STATUS._replace(in_force=False, audit=None, pins={}, problems=[]),
    "a mode": lambda: Policy(Mode.KVM),
    "a mode in audit": lambda: Policy(Mode.KVM, audit=True),
    "a failure": raising(Failure("it is so", "do\nthat")),
    "an error of a file": raising(OSError(errno.EIO, os.strerror(errno.EIO), "/a\x1b")),
    "an error of a call": raising(OSError(errno.EPERM, "bpf_obj_get: Operation not permitted")),
    "no reader": raising(BrokenPipeError()),
}


@pytest.mark.parametrize(
    ("verb", "outcome"),
    [
        (verb, outcome)
        for verb in cli.PLAIN
        for outcome in OUTCOMES
        if outcome not in {"mode": ("in force", "not in force"), "status": ("a mode", "a mode in audit")}[verb]
    ],
)
def test_alone_it_does_what_it_does_with_click(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, outcome: str
) -> None:
    monkeypatch.setattr("uffdguard.state.current_policy", OUTCOMES[outcome])
    monkeypatch.setattr("uffdguard.state.status", OUTCOMES[outcome])
    alone = run(capfd, verb)
    monkeypatch.setattr(cli, "PLAIN", ())
    assert run(capfd, verb) == alone


def test_columns_are_aligned_and_coloured_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    render.columns([("a", "x", "allowed"), ("longer", "EPERM", "ok")])
    assert click.unstyle(capsys.readouterr().out) == "a       x      allowed\nlonger  EPERM  ok\n"
    done = subprocess.run([*COMMAND, "doctor"], stdout=subprocess.PIPE)
    assert b"\x1b" not in done.stdout


def test_libbpf_missing_is_one_line_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    libbpf.library.cache_clear()
    monkeypatch.setattr(libbpf, "NAME", "libbpf.so.0.none")
    try:
        with pytest.raises(Failure, match=r"libbpf.so.0.none is missing.*apt install libbpf1"):
            libbpf.library()
    finally:
        libbpf.library.cache_clear()


@pytest.mark.parametrize(
    ("dep", "builtin", "expected"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_a_kernel_has_kvm_as_a_module_or_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dep: bool, builtin: bool, expected: bool
) -> None:
    modules = tmp_path / os.uname().release
    modules.mkdir()
    (modules / "modules.dep").write_text("kernel/arch/x86/kvm/kvm.ko.xz: x\n" if dep else "kernel/fs/fuse/fuse.ko:\n")
    (modules / "modules.builtin").write_text("kernel/arch/x86/kvm/kvm.ko\n" if builtin else "")
    monkeypatch.setattr(native, "MODULES", tmp_path)
    monkeypatch.setattr(native, "LOADED_KVM", tmp_path / "nowhere")
    assert native.has_kvm() is expected


def test_probe_prints_allowed_or_the_name_of_the_errno(capsys: pytest.CaptureFixture[str]) -> None:
    assert [probe.word(number) for number in (0, errno.EPERM, errno.EACCES)] == ["allowed", "EPERM", "EACCES"]
    status, out, _ = run(capsys, "probe", "--json")
    answers = json.loads(out)
    ways = ("syscall", "syscall-user-mode-only", "device")
    assert status == 0
    assert list(answers) == [*ways, "kvm", *(f"{way}-after-kvm" for way in ways)]
    assert all(answer == "allowed" or hasattr(errno, answer) for answer in answers.values())
