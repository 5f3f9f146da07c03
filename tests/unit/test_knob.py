"""The text format of the interface file, and who serves it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdguard import guard, knob, proof, state
from uffdguard.errors import Failure
from uffdguard.kernel import layout, libbpf, native
from uffdguard.knob import LONGEST, parse
from uffdguard.policy import Mode, Policy
from uffdguard.proof import Asker, Silence

if TYPE_CHECKING:
    from pathlib import Path

WORDS = tuple(Mode)


@pytest.mark.parametrize("mode", WORDS)
@pytest.mark.parametrize("form", ["{}", "{}\n", " {} \n", "\t{}", "{}\n\n"])
def test_a_word_may_have_blanks_around_it(mode: Mode, form: str) -> None:
    assert parse(form.format(mode).encode(), WORDS) is mode


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"KVM",
        b"kv",
        b"kvm enabled",
        b"[kvm]",
        b"kvm\0",
        b"\xff\xfe",
        "kvm\u00a0".encode(),
        b"0",
        b"1",
        b"kvm" + b" " * LONGEST,
        b"[disabled] enabled kvm\n",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse(data, WORDS)


@given(st.binary(max_size=100))
def test_no_bytes_do_more_than_name_a_mode_or_be_refused(data: bytes) -> None:
    try:
        mode = parse(data, WORDS)
    except ValueError:
        return
    assert data.strip() == str(mode).encode()


def test_the_numbers_of_mainline_are_words_only_where_the_configuration_says_so() -> None:
    assert parse(b"0\n", WORDS, numeric=True) is Mode.DISABLED
    assert parse(b"1\n", WORDS, numeric=True) is Mode.ENABLED
    for data in (b"2", b"01", b"-1"):
        with pytest.raises(ValueError):
            parse(data, WORDS, numeric=True)


def test_kvm_is_no_word_on_a_kernel_without_it() -> None:
    with pytest.raises(ValueError, match="kvm"):
        parse(b"kvm", (Mode.DISABLED, Mode.ENABLED))


def server(**held: int) -> knob.Server:
    """Return a server that has not begun."""
    server = object.__new__(knob.Server)
    server.words = WORDS
    server.held = held
    server.directory = None
    return server


def test_only_threads_that_the_kernel_lists_may_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libbpf, "iterate", lambda link: struct.pack("=3i", 1, 7, 70000))
    for thread in (1, 7, 70000):
        server(administrators=3).check_writer(thread)
    for thread in (0, 2, 700, 0x10007, 0xFFFFFFFF):
        with pytest.raises(PermissionError):
            server(administrators=3).check_writer(thread)


class Watch:
    """A server whose policy answers or not, as the test says; what happens to the native knob and what is logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: Policy | None) -> None:
        self.error: Exception | None = None
        self.enforcement = layout.Enforcement(knob=1)
        self.knobs: list[int] = []
        self.records: list[bool] = []
        self.logged: list[str] = []
        self.server = server(policy=0, witness=0, enforcement=0)
        self.server.answers = None
        self.server.seen = time.monotonic()

        def locked(*, wait: bool) -> contextlib.AbstractContextManager[None]:
            if isinstance(self.error, BlockingIOError):
                raise self.error
            return contextlib.nullcontext()

        def ask(server: knob.Server) -> None:
            if self.error:
                raise self.error

        monkeypatch.setattr(knob, "locked", locked)
        monkeypatch.setattr(guard, "switch", lambda held, mode, asker, knob: self.set(1))
        monkeypatch.setattr(state, "read_policy", lambda fd: policy)
        monkeypatch.setattr(state, "knob_of", lambda policy: 1)
        monkeypatch.setattr(libbpf, "read", lambda fd, kind: self.enforcement)
        monkeypatch.setattr(proof, "set_knob", lambda held, value, knob: self.set(value))
        monkeypatch.setattr(proof, "record", lambda held, answers: self.records.append(answers))
        for name, value in (("hold", lambda server: None), ("ask", ask)):
            monkeypatch.setattr(knob.Server, name, value)
        self.server.asker = None  # type: ignore[assignment]
        self.server.native_knob = SimpleNamespace(read=lambda: self.enforcement.knob)  # type: ignore[assignment]
        log = SimpleNamespace(
            debug=lambda *text: None, **dict.fromkeys(("warning", "error", "critical"), self.remember)
        )
        monkeypatch.setattr(knob, "log", log)

    def set(self, value: int) -> None:
        self.enforcement.knob = value
        self.knobs.append(value)

    def remember(self, text: str, *values: object) -> None:
        self.logged.append(text % values)

    def look(self, error: Exception | None = None) -> None:
        self.error = error
        self.server.look()


SILENT = Failure("the policy does not answer", "")


@pytest.mark.parametrize("policy", [Policy(Mode.KVM), Policy(Mode.DISABLED), None])
def test_the_watch_keeps_the_knob_closed_while_the_policy_does_not_answer_and_sets_it_when_it_does_again(
    monkeypatch: pytest.MonkeyPatch, policy: Policy | None
) -> None:
    watch = Watch(monkeypatch, policy)
    for _ in range(3):
        watch.look(SILENT)
    assert watch.knobs == [0, 0, 0]
    assert watch.logged == [f"the policy does not refuse any more, and the native knob is closed: {SILENT}"]
    assert watch.records == [False] * 3
    if policy:
        watch.look()
        watch.look()
        assert watch.knobs[3:] == [1]
        assert watch.logged[1:] == ["the policy refuses again, and the native knob is 1"]
        assert watch.records[3:] == [True]
        watch.look(SILENT)
        assert (watch.knobs[4:], len(watch.logged)) == ([0], 3)


@pytest.mark.parametrize("policy", [Policy(Mode.ENABLED), Policy(Mode.KVM, audit=True)])
def test_the_watch_closes_nothing_where_all_are_let_pass(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    watch = Watch(monkeypatch, policy)
    watch.look(SILENT)
    watch.look(SILENT)
    assert watch.knobs == []
    (line,) = watch.logged
    assert line.startswith("the policy does not refuse any more, and the native knob stays as it is, because")
    watch.look()
    assert watch.logged[1:] == ["the policy refuses again, and the native knob is 1"]


@pytest.mark.parametrize("error", [Silence("no memory", ""), BlockingIOError()])
def test_the_watch_closes_nothing_where_nothing_is_known_and_tells_so_after_a_while(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    watch = Watch(monkeypatch, Policy(Mode.KVM))
    watch.look(error)
    assert (watch.knobs, watch.logged, watch.records) == ([], [], [])
    watch.server.seen = time.monotonic() - knob.BLIND - 1
    watch.look(error)
    watch.look(error)
    assert (watch.knobs, len(watch.logged), watch.records) == ([], 1, [])
    assert watch.logged[0].startswith("it cannot be seen whether the policy refuses: ")
    watch.look()
    assert (watch.knobs, watch.records) == ([], [True])


def test_the_watch_opens_again_what_another_has_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch, Policy(Mode.KVM))
    watch.look()
    watch.enforcement.knob, watch.enforcement.unanswered_since = 0, 1234
    watch.look()
    assert (watch.knobs, watch.records) == ([1], [True] * 2)
    assert watch.logged == ["the policy refuses again, and the native knob is 1"]


def test_a_server_begins_while_others_look_whether_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SERVER", tmp_path / "knob")
    with state.SERVER.open("w") as file, state.SERVER.open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        knob.claim(file.fileno())
        with state.SERVER.open() as other, pytest.raises(Failure, match="being served already"):
            knob.claim(other.fileno())


def test_a_trial_child_that_dies_is_replaced_also_where_the_kernel_waits_for_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A parent that ignores SIGCHLD hands that on; then nobody can wait for a child that has ended."""
    monkeypatch.setattr(native, "DEV_USERFAULTFD", "/dev/null")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Asker() as asker:
            process = os.pidfd_open(asker.pid)
            os.kill(asker.pid, signal.SIGKILL)
            assert select.select([process], [], [], 10)[0]
            os.close(process)
            with pytest.raises(Silence):
                asker._answer(b"d")
            asker.restart()
            assert asker._answer(b"d") == errno.ENOTTY
    finally:
        signal.signal(signal.SIGCHLD, before)
