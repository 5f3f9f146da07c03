"""holders and check on a live kernel: what they say is what the kernel does, and they do nothing themselves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis.stateful import invariant
from inside import ACTOR, USER, actor, family, force_knob, forked, uffdguard, waiting_actor
from vm.test_model import USERFAULTFD_IOC_NEW, Model, run, subjects

from uffdguard import inspect, state
from uffdguard.errors import Failure
from uffdguard.kernel import execve, libbpf, native
from uffdguard.policy import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["subjects"]

KVM = "open:/dev/kvm"
#: In place of markup, of a terminal's and of a line's end.
HOSTILE = "\x1b[31m\n<b>[red]"
ESCAPED = r"\x1b[31m\n<b>[red]"


def holders() -> dict[int, inspect.Holder]:
    with inspect.looking() as (setting, obj):
        return {holder.pid: holder for holder in inspect.holders(setting, obj)}


def check(pid: int) -> inspect.Answer:
    with inspect.looking() as (setting, obj):
        return inspect.check_process(setting, obj, pid)


def children() -> set[int]:
    """Return the processes that we have started, and those that they have."""
    return {int(task.parent.parent.name) for task in family(os.getpid())} - {os.getpid()}


@contextlib.contextmanager
def paused(job: Callable[[], object], user: int = USER) -> Iterator[int]:
    """Do JOB in a new process of USER, which then waits for its end; give its pid."""
    ready, done = os.pipe()

    def wait() -> None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        job()
        os.write(done, b"x")
        signal.pause()

    pid = forked(wait)
    try:
        os.close(done)
        assert os.read(ready, 1) == b"x"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Inspected(Model):
    """The model, and after each step what we say about each of its processes."""

    situations = 0

    def __init__(self) -> None:
        super().__init__()
        self.loaded_for: int | None = -1
        self.stack = contextlib.ExitStack()

    def teardown(self) -> None:
        self.stack.close()
        super().teardown()

    def looking(self) -> tuple[inspect.Setting, libbpf.Object]:
        """Give what inspect.looking() gives; the iterators take a second to load here, so only for other grants."""
        with state.pinned() as found:
            setting = inspect.setting_of(found)
            grants = libbpf.info(found.fds["grants"], libbpf.MapInfo).id if setting.policy else None
        if grants != self.loaded_for:
            self.stack.close()
            _, self.obj = self.stack.enter_context(inspect.looking())
            self.loaded_for = grants
        return setting, self.obj

    @invariant()
    def check_says_what_the_kernel_answers(self) -> None:
        setting, obj = self.looking()
        answers = [(subject, inspect.check_process(setting, obj, subject.tid)) for subject in self.free()]
        held = {holder.pid: holder for holder in inspect.holders(setting, obj)}
        for subject, answer in answers:
            type(self).situations += 1
            assert (answer.capability, answer.granted) == (
                subject.effective and subject.initial,
                subject.process.granted,
            )
            assert answer.user_mode_only
            for flags, allowed in ((0, answer.allowed), (1, answer.user_mode_only.allowed)):
                result = subject.call("userfaultfd", flags)
                assert result >= 0 if allowed else result == -errno.EPERM, (flags, answer)
                if result >= 0:
                    subject.call("close", result)
            result = subject.call("ioctl", self.device(subject, "passed"), USERFAULTFD_IOC_NEW, 0)
            if result >= 0:
                subject.call("close", result)
            # The device does not ask the native knob.
            assert (result >= 0) is (answer.allowed or answer.reason == inspect.NATIVE)
        for process in {subject.process for subject in self.subjects}:
            kvm, granted = bool(process.kvm), process.granted
            holder = held.get(process.pid)
            assert (holder and (holder.kvm, holder.granted, holder.userfaultfds)) == (
                (kvm, granted, 0) if kvm or granted else None
            )
            if holder:
                told = {answer.reason for subject, answer in answers if subject.process is process}
                assert told <= {verdict.reason for verdict in holder.verdicts}


def test_check_and_holders_agree_with_the_kernel_whatever_has_happened(
    subjects: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inspected, "situations", 0)
    run(200, Inspected)
    print(f"{Inspected.situations} situations")
    assert Inspected.situations >= 200


class TestHolders:
    @pytest.fixture(autouse=True)
    def mode(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")

    def one(self, steps: tuple[str, ...], user: int = USER) -> dict[int, inspect.Holder]:
        """Return the holders among the processes of an actor that goes STEPS."""
        with waiting_actor(*steps, "wait", user=user):
            mine = children()
            return {pid: holder for pid, holder in holders().items() if pid in mine}

    @pytest.mark.parametrize(
        ("steps", "expected"),
        [
            ((KVM,), [(0, True, True, "kvm")]),
            ((KVM, "close"), [(0, False, True, "kvm")]),
            (("receive:/dev/kvm",), [(0, True, False, "no-kvm")]),
            (("open-path:/dev/kvm",), []),
            (("open:/dev/userfaultfd",), []),
            ((KVM, "hold"), [(1, True, True, "kvm")]),
            ((KVM, "hold", "duplicate", "hold"), [(2, True, True, "kvm")]),
            ((KVM, "hold", "leader-leaves"), [(1, True, True, "kvm")]),
            ((KVM, "hold", "thread"), [(1, True, True, "kvm")]),
            ((KVM, "hold", "fork"), [(1, True, True, "kvm"), (1, True, False, "no-kvm")]),
            ((), []),
        ],
        ids=str,
    )
    def test_are_those_who_hold_something(
        self, steps: tuple[str, ...], expected: list[tuple[int, bool, bool, str]]
    ) -> None:
        found = self.one(steps)
        assert [
            (holder.userfaultfds, holder.kvm, holder.granted, "/".join(v.reason for v in holder.verdicts))
            for _, holder in sorted(found.items())
        ] == expected
        assert {(holder.command, holder.uid) for holder in found.values()} <= {("actor", USER)}

    def test_include_who_asked_before_the_mode_was_stricter(self, in_force: Callable[..., None]) -> None:
        in_force("enabled")
        with waiting_actor("hold", "wait"):
            in_force("disabled")
            (holder,) = holders().values()
        assert (holder.userfaultfds, holder.granted) == (1, False)
        assert holder.verdicts == [inspect.Verdict(False, "disabled")]

    def test_tell_each_verdict_where_threads_differ(self) -> None:
        with waiting_actor("older-thread", KVM, "become-with-ptrace:1000", "wait", user=0):
            (holder,) = holders().values()
        assert {verdict.reason for verdict in holder.verdicts} == {"capability", "kvm"}

    def test_hostile_names_are_escaped(self) -> None:
        group = Path("/run/cgroup")
        group.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", group], check=True)
        hostile = group / "\x1b[31m\r<b>[red].service"
        with Path("/etc/passwd").open("a") as file:
            file.write("\x1b[31m<b>[red]:x:4242:4242::/:/bin/sh\n")

        def job() -> None:
            ctypes.CDLL(None).prctl(15, HOSTILE.encode())  # PR_SET_NAME
            os.close(os.open(native.DEV_KVM, os.O_RDWR))

        try:
            hostile.mkdir()
            with paused(job, 4242) as pid:
                (hostile / "cgroup.procs").write_text(str(pid))
                out = uffdguard("holders").out
                (facts,) = json.loads(uffdguard("holders", "--json").out)
                answer = uffdguard("check", str(pid)).out
            hostile.rmdir()
        finally:
            subprocess.run(["umount", group], check=True)
        assert (facts["command"], facts["user"], facts["unit"]) == (
            ESCAPED,
            r"\x1b[31m<b>[red]",
            r"\x1b[31m\r<b>[red].service",
        )
        assert all(word in out for word in (facts["command"], facts["user"], facts["unit"]))
        assert ESCAPED in answer
        assert all(line.isprintable() for text in (out, answer) for line in text.splitlines())

    def test_are_all_there_when_they_are_many(self) -> None:
        with waiting_actor("crowd:2000", "wait", user=0):
            found = holders()
            grants = state.status().grants  # not all, where the kernel skipped the hook of one
        assert len(found) == 2000
        assert all(holder.kvm for holder in found.values())
        assert sum(holder.granted for holder in found.values()) == grants > 0

    def test_change_nothing(self) -> None:
        with waiting_actor(KVM, "wait"):
            before = state.status()
            assert uffdguard("holders").status == 0
            assert uffdguard("check", "1").status == 0
            assert state.status() == before


class TestCheck:
    def test_tells_the_row_the_facts_and_what_would_allow_it(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        with paused(lambda: None) as pid:
            outcome = uffdguard("check", str(pid))
        first, heading, *rest = outcome.out.splitlines()
        assert outcome.status == 1
        assert re.fullmatch(
            rf"refused \(no-kvm\): mode is kvm, and pid {pid} \(.*\) was not seen to open /dev/kvm since its last exec;"
            " it has no CAP_SYS_PTRACE effective",
            first,
        )
        assert heading == "would allow it:"
        assert [line.split(":")[0].split(",")[0].strip() for line in rest] == [
            "to open /dev/kvm itself",
            "CAP_SYS_PTRACE effective",
            "uffdguard mode enabled",
            "to ask with UFFD_USER_MODE_ONLY",
        ]

    def test_says_when_user_mode_only_would_get_more(self, in_force: Callable[..., None]) -> None:
        in_force("disabled", user_mode_only=True)
        with paused(lambda: None) as pid:
            assert "\nwith UFFD_USER_MODE_ONLY: allowed (user-mode-only)\n" in uffdguard("check", str(pid)).out

    @pytest.mark.parametrize(("knob", "allowed"), [(0, False), (1, True)])
    def test_without_a_policy_tells_what_the_kernel_itself_answers(self, knob: int, allowed: bool) -> None:
        Path("/proc", native.KNOB).write_text(f"{knob}\n")
        with paused(lambda: None) as pid:
            answer = check(pid)
        assert (answer.allowed, answer.reason, answer.mode, answer.native_knob) == (allowed, "native", None, knob)
        assert answer.user_mode_only == inspect.Verdict(True, "native")
        assert any(change.startswith("/dev/userfaultfd (crw") for change in answer.would_allow) is not allowed
        assert actor("syscall", "syscall:1", "device") == ["allowed" if allowed else "EPERM", "allowed", "allowed"]

    def test_names_a_native_knob_that_does_not_fit(self, in_force: Callable[..., None]) -> None:
        in_force("enabled")
        force_knob(0)
        with paused(lambda: None) as pid:
            answer = check(pid)
        assert (answer.allowed, answer.reason) == (False, "native")
        assert "does not fit mode enabled" in answer.why
        assert "uffdguard start, which sets the knob" in answer.would_allow
        assert actor("syscall", "device") == ["EPERM", "allowed"]

    def test_of_a_process_needs_root(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        for arguments in (("check", "1"), ("holders",)):
            outcome = uffdguard(*arguments, user=USER)
            assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
            assert "run it as root" in outcome.err

    def test_of_no_process_is_one_line(self) -> None:
        for pid in ("2", "4194304"):  # a kernel thread, and above the highest pid
            outcome = uffdguard("check", pid)
            assert (outcome.status, outcome.out) == (1, "")
            assert f"no process or thread {pid} that runs a program" in outcome.err

    def test_names_the_threads_of_a_process_whose_first_has_ended(self) -> None:
        before = children()  # those that were left to us, too
        with waiting_actor("leader-leaves", "wait"):
            (pid,) = children() - before
            with pytest.raises(Failure, match=f"the thread that began process {pid} has ended") as failure:
                check(pid)
            thread = int(failure.value.hint.split()[-1])
            assert check(thread).reason == "native"

    def test_of_a_policy_that_does_not_answer_says_so(
        self, silence: Callable[[bool], None], in_force: Callable[..., None]
    ) -> None:
        in_force("kvm")
        silence(True)
        for arguments in (("check", "1"), ("check", "--", "true"), ("holders",), ("watch",)):
            outcome = uffdguard(*arguments)
            assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
            assert outcome.err.startswith("uffdguard: the policy is not in force: ")

    def test_of_a_damaged_policy_says_so(self, in_force: Callable[..., None]) -> None:
        in_force("kvm")
        (state.PINS / "decide").unlink()
        assert "the policy is damaged: decide is not pinned" in uffdguard("check", "1").err

    def test_of_a_command_is_as_the_caller_would_start_it(
        self, in_force: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_force("kvm")
        assert uffdguard("check", "--", "sh", "-c", "x").status == 0
        assert "run it as root" in uffdguard("check", "--", "sh", user=USER).err
        # Where the interface file is served, everybody may see the mode.
        monkeypatch.setattr(native, "is_covered", lambda: True)
        monkeypatch.setattr(native, "FILE", Path("/run/served"))
        native.FILE.write_text("disabled enabled [kvm]\n")
        outcome = uffdguard("check", "--", "sh", user=USER)
        assert outcome.status == 1
        assert outcome.out.startswith("refused (no-kvm): mode is kvm, and sh, as the caller would start it, is yet to")
        assert "with UFFD_USER_MODE_ONLY: only root can tell" in outcome.out

    @pytest.mark.parametrize("words", [("no-such-program",), ("/etc/passwd",), ("/etc",)], ids=str)
    def test_of_no_program_is_one_line(self, words: tuple[str, ...]) -> None:
        outcome = uffdguard("check", "--", *words)
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)


PTRACE, OTHER = 1 << native.CAP_SYS_PTRACE, 1 << 13  # CAP_NET_RAW
SETS = (0, PTRACE, PTRACE | OTHER)


def attribute(permitted: int, inheritable: int, *, effective: bool) -> bytes:
    """Return capabilities as a file has them, revision 2."""
    return struct.pack("<5I", 0x02000000 | effective, permitted, inheritable, 0, 0)


def become(chance: random.Random) -> None:
    """Become one of any kind who could start a program."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prctl(*arguments: int) -> None:
        assert libc.prctl(*arguments, *[0] * (5 - len(arguments))) == 0, os.strerror(ctypes.get_errno())

    def capset(permitted: int, inheritable: int) -> None:
        halves = (permitted & 0xFFFFFFFF, permitted & 0xFFFFFFFF, inheritable, permitted >> 32, permitted >> 32, 0)
        assert libc.capset(struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *halves)) == 0

    prctl(28, 1 << 2 | chance.choice((0, 1)))  # PR_SET_SECUREBITS: SECBIT_NO_SETUID_FIXUP, SECBIT_NOROOT
    permitted, inheritable = chance.choices(SETS, k=2)
    capset(execve.Caller.current().permitted, inheritable)
    for bit in (native.CAP_SYS_PTRACE, 13):
        if chance.random() < 0.3:
            prctl(24, bit)  # PR_CAPBSET_DROP
    os.setgroups(chance.choice(((), (USER,))))
    real, effective = chance.choices((0, USER), k=2)
    os.setresgid(real, effective, effective)
    real, effective = chance.choices((0, USER), weights=(1, 3), k=2)
    os.setresuid(real, effective, effective)
    capset(permitted, inheritable)
    for bit in (native.CAP_SYS_PTRACE, 13):
        if permitted & inheritable & 1 << bit and chance.random() < 0.5:
            prctl(47, 2, bit)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE
    if chance.random() < 0.2:
        prctl(38, 1)  # PR_SET_NO_NEW_PRIVS


def program(chance: random.Random, folder: Path) -> Path:
    """Return one of any kind of program, which asks when it is run."""
    path = folder / "actor"
    path.unlink(missing_ok=True)
    shutil.copy(ACTOR, path)
    os.chown(path, *chance.choices((0, USER), k=2))
    path.chmod(0o755 | chance.choice((0, 0, 0o4000, 0o2000, 0o6000)))
    if chance.random() < 0.5:
        value = attribute(chance.choice(SETS), chance.choice(SETS), effective=chance.random() < 0.6)
        os.setxattr(path, execve.XATTR, value)
    if chance.random() < 0.2:
        script = folder / "script"
        script.write_text(f"#! {path} device\n")
        script.chmod(0o4755)
        return script
    return path


def test_a_started_command_has_the_capability_that_was_foretold(in_force: Callable[..., None]) -> None:
    """The answers of 200 programs of any kind, each started by a caller of any kind, in mode ``disabled``."""
    in_force("disabled")
    folders = [Path("/run/suid"), Path("/run/nosuid")]
    for folder in folders:
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", folder.name, "tmpfs", folder], check=True)
    seen: list[tuple[str, str]] = []
    try:
        for number in range(200):
            chance = random.Random(number)
            path = program(chance, chance.choices(folders, weights=(4, 1))[0])
            seen.append(foretold_and_answered(chance, path))
            assert seen[-1][0] in (seen[-1][1], "unknown"), f"situation {number}: {seen[-1]}"
    finally:
        for folder in folders:
            subprocess.run(["umount", folder], check=True)
            folder.rmdir()
    found = Counter(live for told, live in seen if told == live)
    print(dict(found), [told for told, _ in seen].count("unknown"), "unknown")
    assert min(found[answer] for answer in ("allowed", "EPERM", "not started")) >= 3
    assert found.total() >= 170


def foretold_and_answered(chance: random.Random, path: Path) -> tuple[str, str]:
    """Become a caller, say what PATH would be answered, and start it."""
    read, write = os.pipe()

    def job() -> None:
        os.dup2(write, 1)
        become(chance)
        try:
            capable = execve.effective(execve.Caller.current(), execve.find(str(path))) & PTRACE
            told = "allowed" if capable else "EPERM"
        except Failure as failure:
            told = "not started" if "would not start" in failure.what else "unknown"
        os.write(1, f"{told}\n".encode())
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # of a script, its path is one step too many
        try:
            os.execv(path, [str(path), *(["device"] if path.name == "actor" else [])])
        except PermissionError:
            os.write(1, b"not started\n")

    pid = forked(job)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as answers:
        told, live, *_ = answers.read().splitlines()
    return told, live


def test_check_agrees_with_probe(in_force: Callable[..., None]) -> None:
    """In the same process, in each mode, before and after it has opened /dev/kvm."""
    for mode, option in itertools.product(Mode, (False, True)):
        in_force(mode, user_mode_only=option)
        with probing() as (pid, ask):
            for opens in (False, True):
                answers = ask(opens)
                answer = check(pid)
                assert answer.user_mode_only
                assert answers == [
                    "allowed" if allowed else "EPERM"
                    for allowed in (answer.allowed, answer.user_mode_only.allowed, answer.allowed)
                ]


@contextlib.contextmanager
def probing() -> Iterator[tuple[int, Callable[[bool], list[str]]]]:
    """Give an ordinary process, and what has it try each way, with /dev/kvm opened before or not."""
    from multiprocessing import Pipe

    from uffdguard.kernel import probe

    ours, theirs = Pipe()

    def serve() -> None:
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        while True:
            if theirs.recv():
                assert probe.open_kvm() == 0
            theirs.send([probe.word(way) for way in (probe.syscall(), probe.syscall(1), probe.device())])

    def ask(opens: bool) -> list[str]:
        ours.send(opens)
        answers: list[str] = ours.recv()
        return answers

    pid = forked(serve)
    try:
        yield pid, ask
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_iterators_load_without_a_policy_and_with_one(in_force: Callable[..., None]) -> None:
    with inspect.looking() as (setting, _):
        assert setting == inspect.Setting(None, 0)
    in_force("kvm")
    with inspect.looking() as (setting, obj), state.pinned() as found:
        assert setting.policy
        assert setting.policy.mode is Mode.KVM
        assert libbpf.same_map(obj.map_fd("grants"), found.fds["grants"])
