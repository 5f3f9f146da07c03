"""The text format of the interface file, and who serves it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdguard import knob, state
from uffdguard.errors import Failure
from uffdguard.kernel import native
from uffdguard.knob import LONGEST, parse
from uffdguard.policy import Mode
from uffdguard.proof import Asker, Silence

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


@pytest.mark.parametrize("name", [b"\x1cCapEff:\t20000", b"\x0bCapEff:200000", b"\xc2\x85CapEff:20000", b"\xffx"])
def test_a_process_has_no_capability_by_its_name(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    """The name is of the process's own choice, and all but its newlines stand as they are in /proc/PID/status."""
    monkeypatch.setattr(native, "PROC", Path("/proc"))
    comm = Path(f"/proc/{os.getpid()}/comm")
    before = comm.read_bytes()
    comm.write_bytes(name)
    try:
        status = comm.with_name("status").read_bytes()
        assert name in status
        (true,) = re.findall(rb"^CapEff:\t(.*)$", status, re.MULTILINE)
        assert knob._status(os.getpid(), "CapEff") == true.decode()
    finally:
        comm.write_bytes(before)


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
