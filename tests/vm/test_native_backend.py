"""The backend native: the kernel's own knob and the permissions of /dev/userfaultfd, with and without bpf there.

What needs the backend lsm is skipped where bpf is not among the LSMs: tests/host boots such a kernel for the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import KVM_GROUP, USER, Outcome, forked, killed_at, uffdguard

from uffdguard import config, guard, native_backend, state
from uffdguard.errors import Failure
from uffdguard.kernel import features, native, probe
from uffdguard.native_backend import Permissions
from uffdguard.policy import WEAKER, Backend, Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODES = ("disabled", "enabled", "kvm")
CALL, USER_MODE_ONLY, DEVICE = "syscall", "user-mode-only", "device"
EVERY_WAY = {CALL, USER_MODE_ONLY, DEVICE}
NOBODY, MEMBER = (), (KVM_GROUP,)
#: What an ordinary process gets in each mode, and one in the group of /dev/kvm; before a start the device is 0666.
GETS: dict[str, dict[tuple[int, ...], set[str]]] = {
    "disabled": {NOBODY: {USER_MODE_ONLY}, MEMBER: {USER_MODE_ONLY}},
    "enabled": {NOBODY: EVERY_WAY, MEMBER: EVERY_WAY},
    "kvm": {NOBODY: {USER_MODE_ONLY}, MEMBER: {USER_MODE_ONLY, DEVICE}},
}
#: What everybody gets before a start, by the native knob.
BEFORE = {0: {USER_MODE_ONLY, DEVICE}, 1: EVERY_WAY}

has_lsm = features._lsm().state == "ok"
needs_lsm = pytest.mark.skipif(not has_lsm, reason="bpf is not among the LSMs of this kernel")


@pytest.fixture(autouse=True)
def kvm_is_for_its_group(nothing_in_force: None) -> None:
    native.DEV_KVM.chmod(0o660)


@pytest.fixture
def configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a configuration file, the only one."""
    for name in ("DEFAULT", "ADMINISTRATOR", "DROP_INS"):
        monkeypatch.setattr(config, name, tmp_path / name)
    return config.ADMINISTRATOR


def as_user(job: Callable[[], object], groups: tuple[int, ...] = NOBODY) -> str:
    """Do JOB as an ordinary user in GROUPS; return what it returned, as JSON."""
    with tempfile.TemporaryFile() as file:

        def become() -> None:
            os.setgroups(groups)
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            os.write(file.fileno(), json.dumps(job()).encode())

        assert os.waitpid(forked(become), 0)[1] == 0
        file.seek(0)
        return file.read().decode()


def tries() -> list[str]:
    answers = {CALL: probe.syscall(), USER_MODE_ONLY: probe.syscall(1), DEVICE: probe.device()}
    return [way for way, answer in answers.items() if not answer]


def gets(groups: tuple[int, ...] = NOBODY) -> set[str]:
    """Return the ways by which an ordinary user in GROUPS gets a userfaultfd."""
    return set(json.loads(as_user(tries, groups)))


def start(mode: str | None = None, *words: str) -> Outcome:
    return uffdguard("start", "--backend", "native", *(("--mode", mode) if mode else ()), *words)


def knob() -> int:
    return int(Path("/proc", native.KNOB).read_text())


def device() -> Permissions:
    return Permissions.of(native.DEV_USERFAULTFD)


def set_(mode: str) -> Callable[[], object]:
    return lambda: guard.start_native(Policy(), Mode(mode))


def all_is_right(mode: str) -> None:
    status = state.status()
    assert (status.in_force, status.mode, status.backend, status.problems) == (True, mode, Backend.NATIVE, [])
    assert {groups: gets(groups) for groups in (NOBODY, MEMBER)} == GETS[mode]


def acl(user: int) -> bytes:
    """Return an ACL by which USER may open a file: its owner, that user, the group, the mask, others."""
    entries = ((0x01, 6, -1), (0x02, 6, user), (0x04, 0, -1), (0x10, 6, -1), (0x20, 0, -1))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


class TestTheModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_each_lets_pass_what_it_says_and_refuses_everybody_else(self, mode: str) -> None:
        outcome = start(mode)
        assert (outcome.status, outcome.out) == (0, "")
        assert outcome.err == "backend native, which is weaker than lsm: uffdguard status says in what\n"
        all_is_right(mode)

    def test_are_switched_by_mode_which_names_the_backend(self) -> None:
        start("disabled")
        for mode in ("kvm", "enabled", "kvm", "disabled"):
            assert uffdguard("mode", mode).status == 0
            all_is_right(mode)
        shown = uffdguard("mode")
        assert shown.out == "[disabled] enabled kvm\n"
        assert "backend native" in shown.err

    def test_stay_and_so_does_the_backend_until_another_is_named(self) -> None:
        start("kvm")
        again = uffdguard("start")
        assert (again.status, again.out) == (0, "already in force; nothing to do\n")
        all_is_right("kvm")

    def test_the_backend_is_that_of_the_configuration(self, configuration: Path) -> None:
        configuration.write_text('backend = "native"\nmode = "kvm"\n')
        assert uffdguard("start").status == 0
        all_is_right("kvm")

    @pytest.mark.skipif(has_lsm, reason="bpf is among the LSMs of this kernel")
    def test_the_backend_is_never_taken_unasked(self) -> None:
        outcome = uffdguard("start", "--mode", "kvm")
        assert (outcome.status, outcome.out) == (1, "")
        assert "no bpf in" in outcome.err
        assert "--backend native" in outcome.err
        assert state.backend() is None

    def test_kvm_gives_nothing_where_the_group_of_kvm_may_not_open_that(self) -> None:
        native.DEV_KVM.chmod(0o600)
        start("kvm")
        assert gets(MEMBER) == {USER_MODE_ONLY}
        native.DEV_KVM.chmod(0o660)
        os.setxattr(
            native.DEV_KVM, native_backend.ACL, acl(USER)
        )  # whose group has no permission, though the mode says
        try:
            assert uffdguard("start").status == 0
            assert gets(MEMBER) == {USER_MODE_ONLY}
        finally:
            os.removexattr(native.DEV_KVM, native_backend.ACL)

    def test_kvm_is_refused_where_there_is_no_such_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As before Linux 6.1; other modes go by the knob alone there."""
        monkeypatch.setattr(native, "DEV_USERFAULTFD", Path("/dev/no-such-device"))
        outcome = start("kvm")
        assert (outcome.status, outcome.err.count("\n")) == (1, 1)
        assert "mode kvm does not exist here by the backend native" in outcome.err
        assert not native.RUN.exists()
        for mode in ("disabled", "enabled"):
            assert start(mode).status == 0
            assert (state.status().in_force, state.status().problems) == (True, [])
        assert uffdguard("mode", "kvm").status == 1

    def test_another_device_at_its_place_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "DEV_USERFAULTFD", Path("/dev/null"))
        before = Permissions.of(Path("/dev/null"))
        assert start("kvm").status == 1
        assert start("disabled").status == 0
        assert Permissions.of(Path("/dev/null")) == before


class TestStatus:
    def test_names_the_backend_and_what_it_is_weaker_in(self) -> None:
        start("kvm")
        shown = uffdguard("status")
        assert shown.status == 0
        for words in (
            "in force since",
            "native, which is weaker than lsm",
            str(native_backend.due_device(Mode.KVM)),
            *WEAKER,
        ):
            assert words in shown.out
        found = json.loads(uffdguard("status", "--json").out)
        assert (found["backend"], found["user_mode_only"], found["weaker"]) == ("native", True, list(WEAKER))
        assert 'uffdguard_backend{backend="native"} 1.0' in (metrics := uffdguard("metrics").out)
        assert "uffdguard_decisions" not in metrics
        assert 'uffdguard_condition{condition="device-fits"} 1.0' in metrics

    @pytest.mark.parametrize(
        ("change", "condition"),
        [
            (lambda: native.write_knob(1), "knob-fits"),
            (lambda: native.DEV_USERFAULTFD.chmod(0o666), "device-fits"),
            (lambda: native.DEV_USERFAULTFD.chmod(0o600), "device-fits"),
            (lambda: os.chown(native.DEV_USERFAULTFD, 0, USER), "device-fits"),
            (lambda: os.chown(native.DEV_USERFAULTFD, USER, 0), "device-fits"),
            (lambda: os.setxattr(native.DEV_USERFAULTFD, native_backend.ACL, acl(USER)), "device-fits"),
            (lambda: os.chown(native.DEV_KVM, 0, USER), "device-fits"),
        ],
        ids=["knob", "mode", "closed", "group", "owner", "acl", "kvm"],
    )
    @pytest.mark.parametrize("mode", ["kvm", "disabled"])
    def test_sees_what_somebody_has_changed_and_start_repairs_it(
        self, mode: str, change: Callable[[], object], condition: str
    ) -> None:
        start(mode)
        change()
        try:
            status = state.status()
            if gets() - GETS[mode][NOBODY]:
                assert not status.in_force
            if native_backend.fits(Mode(mode), native.Knob()):  # disabled is closed, and does not go by /dev/kvm
                assert mode == "disabled"
                assert status.in_force
            else:
                assert (status.in_force, condition in status.failing) == (False, True)
                assert uffdguard("status").status == 1
            assert uffdguard("start").status == 0
            status = state.status()
            assert (status.in_force, status.problems) == (True, [])
        finally:
            os.chown(native.DEV_KVM, 0, KVM_GROUP)

    @pytest.mark.parametrize("mode", Mode)
    def test_names_a_file_that_no_more_keeps_what_is_set_and_start_repairs_it(self, mode: Mode) -> None:
        start(mode)
        for path in (path for path in native_backend.RULES if path.exists()):
            for spoil in (path.unlink, lambda path=path: path.write_text("# nothing\n")):
                spoil()
                assert state.status().failing == ["rules-fit"]
                assert uffdguard("status").status == 1
                assert uffdguard("start").status == 0
                assert state.status().problems == []

    def test_does_not_mind_what_is_made_of_the_device_in_mode_enabled(self) -> None:
        found = device()
        start("enabled")
        try:
            native.DEV_USERFAULTFD.chmod(0o660)
            assert state.status().problems == []
            assert uffdguard("start").status == 0
            assert native_backend.Permissions.of(native.DEV_USERFAULTFD).mode == 0o660
        finally:
            found.give(native.DEV_USERFAULTFD)

    def test_asks_and_does_not_infer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All looks as it should, and an ordinary process is allowed."""
        start("kvm")
        for answers in ((0, 13), (1, 0)):
            monkeypatch.setattr(native_backend, "_answers", lambda group, answers=answers: answers)
            status = state.status()
            assert (status.in_force, status.answers, status.failing) == (False, False, ["policy-answers"])
            assert "an ordinary process gets a userfaultfd by" in str(status.reason)

    def test_cannot_tell_where_something_else_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        start("kvm")
        monkeypatch.setattr(native_backend, "_answers", lambda group: (38, 13))
        status = state.status()
        assert (status.in_force, status.answers) == (False, None)
        assert "CANNOT TELL" in uffdguard("status").out


class TestStop:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("value", [0, 1])
    @pytest.mark.parametrize(
        "found",
        [
            Permissions(0, 0, 0o600),
            Permissions(0, 0, 0o666),
            Permissions(USER, KVM_GROUP, 0o640),
            Permissions(0, 0, 0o660, acl(USER)),
        ],
        ids=["root", "everybody", "user", "acl"],
    )
    def test_gives_everything_back_as_it_was_found(self, found: Permissions, value: int, mode: str) -> None:
        found.give(native.DEV_USERFAULTFD)
        native.write_knob(value)
        before = gets(), gets(MEMBER)
        try:
            set_("kvm")()
            set_(mode)()
            assert device() == (found if mode == "enabled" else native_backend.due_device(Mode(mode)))
            guard.stop()
            assert (device(), knob()) == (found, value)
            assert (gets(), gets(MEMBER)) == before
            assert not any(path.exists() for path in (*native_backend.RULES, native.RUN))
        finally:
            Permissions(0, 0, 0o666).give(native.DEV_USERFAULTFD)

    def test_leaves_the_device_to_root_where_what_was_found_is_lost(self) -> None:
        start("kvm")
        native_backend.FOUND_DEVICE.unlink()
        state.FOUND.unlink()
        assert state.status().failing == ["found-recorded"]
        guard.stop()
        assert (device(), knob()) == (native_backend.CLOSED, 0)

    def test_closes_the_knob_where_what_was_found_is_lost(self) -> None:
        start("enabled")
        state.FOUND.unlink()
        assert uffdguard("stop").status == 0
        assert knob() == 0

    @pytest.mark.parametrize("text", ["0 36 660 0200", "99999999999999999999 0 600", "0 0 7777777"])
    def test_ends_with_the_device_closed_where_the_record_of_it_is_damaged(self, text: str) -> None:
        start("kvm")
        native_backend.FOUND_DEVICE.write_text(text)
        outcome = uffdguard("stop")
        assert (outcome.status, outcome.err) == (0, "")
        assert (device(), state.backend()) == (native_backend.CLOSED, None)

    def test_a_record_of_the_mode_that_is_damaged_counts_as_the_strictest(self) -> None:
        start("enabled")
        state.NATIVE_MODE.write_text("no word\n")
        assert (state.status().mode, state.status().in_force) == ("disabled", False)
        assert uffdguard("start").status == 0
        all_is_right("disabled")


STEPS = ("record the native knob", *native_backend.STEPS, "set the native knob", "restore the native knob")


class TestKilled:
    """At each step nobody gets more than the laxer of before and after lets pass; the next start or stop repairs it."""

    @pytest.mark.parametrize("value", [0, 1])
    @pytest.mark.parametrize("step", ["record the native knob", *native_backend.STEPS[:5]])
    def test_a_first_start(self, step: str, value: int) -> None:
        native.write_knob(value)
        found = device()
        assert killed_at(step, set_("kvm"))
        assert gets() <= BEFORE[value]
        killed_at(step, set_("disabled"))  # twice in a row
        assert gets() <= BEFORE[value]
        set_("kvm")()
        all_is_right("kvm")
        guard.stop()
        assert (device(), knob()) == (found, value)

    @pytest.mark.parametrize("step", native_backend.STEPS[1:5])
    @pytest.mark.parametrize(
        ("old", "new"), [("disabled", "kvm"), ("kvm", "enabled"), ("enabled", "kvm"), ("kvm", "disabled")]
    )
    def test_a_change_of_the_mode(self, old: str, new: str, step: str) -> None:
        set_(old)()
        killed_at(step, set_(new))
        for groups in (NOBODY, MEMBER):
            assert gets(groups) <= GETS[old][groups] | GETS[new][groups]
        assert uffdguard("start").status == 0
        mode = state.current_policy().mode
        assert mode in (old, new)
        all_is_right(mode)

    @pytest.mark.parametrize("step", ["close the native knob", *native_backend.STEPS[5:], "restore the native knob"])
    def test_a_stop(self, step: str) -> None:
        found = device()
        set_("kvm")()
        assert killed_at(step, guard.stop)
        assert gets() <= BEFORE[0]
        set_("kvm")()
        all_is_right("kvm")
        assert killed_at(step, guard.stop)
        guard.stop()
        assert (device(), knob()) == (found, 0)
        assert not any(path.exists() for path in (*native_backend.RULES, native.RUN))

    def test_a_start_that_fails_is_undone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(mode: Mode) -> None:
            raise Failure("injected")

        found = device()
        native.write_knob(1)
        monkeypatch.setattr(native_backend, "ask", fail)
        assert start("kvm").status == 1
        assert (device(), knob(), state.backend()) == (found, 1, None)
        assert not any(path.exists() for path in (*native_backend.RULES, native.RUN))


@needs_lsm
class TestTheChangeOfTheBackend:
    @contextlib.contextmanager
    def asking(self) -> Iterator[set[str]]:
        """Ask all the time as an ordinary user; give the ways by which that was allowed, when it is over."""
        answers: set[str] = set()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
            done = Path(folder, "done")

            def ask() -> None:
                os.setresgid(USER, USER, USER)
                os.setresuid(USER, USER, USER)
                seen: set[str] = set()
                while not done.exists():
                    seen |= set(tries())
                    time.sleep(0.001)
                os.write(out.fileno(), json.dumps([*seen]).encode())

            Path(folder).chmod(0o755)
            pid = forked(ask)
            try:
                yield answers
            finally:
                done.touch()
                assert os.waitpid(pid, 0)[1] == 0
            answers |= set(json.loads(os.pread(out.fileno(), 1000, 0)))

    @pytest.mark.parametrize("mode", ["kvm", "disabled"])
    def test_has_no_instant_that_is_laxer(self, mode: str) -> None:
        native.write_knob(1)
        found = device()
        guard.start(Policy(), Mode(mode))
        with self.asking() as answers:
            for backend in ("native", "lsm") * 2:
                outcome = uffdguard("start", "--backend", backend)
                assert (outcome.status, outcome.out) == (0, "")
                status = state.status()
                assert (status.backend, status.mode, status.problems) == (backend, mode, [])
                assert status.in_force
        assert answers <= {USER_MODE_ONLY}
        assert device() == found
        guard.stop()
        assert (device(), knob()) == (found, 1)

    @pytest.mark.parametrize("to", ["native", "lsm"])
    @pytest.mark.parametrize(
        "step",
        [
            *("record the mode", "set the device", "uncover the native file", "unpin decide", "unpin policy"),
            *("try what is allowed", "attach decide", "set the policy", "pin decide", "set the native knob"),
            *("record the object", "remove the rules", "restore the device", "remove the mode"),
        ],
    )
    def test_killed_is_as_lax_as_the_laxer_and_done_by_the_next_start(self, to: str, step: str) -> None:
        found = device()
        steps: dict[str, Callable[[], object]] = {
            "native": set_("kvm"),
            "lsm": lambda: guard.start(Policy(), Mode.KVM),
        }
        steps["lsm" if to == "native" else "native"]()
        killed = killed_at(step, steps[to])
        assert gets() <= {USER_MODE_ONLY}
        state.status()
        assert uffdguard("start").status == 0
        status = state.status()
        assert (status.in_force, status.mode, status.problems) == (True, Mode.KVM, [])
        if not killed:
            assert status.backend == to
        assert gets() <= {USER_MODE_ONLY}
        guard.stop()
        assert (device(), knob()) == (found, 0)

    def test_that_was_killed_before_lsm_is_in_force_leaves_the_mode_to_native_and_is_named(self) -> None:
        set_("disabled")()
        killed_at("pin witness", lambda: guard.start(Policy(), Mode.ENABLED))
        assert state.backend() is Backend.NATIVE
        assert state.status().failing == ["pins-complete"]
        assert uffdguard("start").status == 0
        all_is_right("disabled")

    def test_to_lsm_that_fails_leaves_native_in_force(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise Failure("injected")

        start("kvm")
        monkeypatch.setattr(guard, "_limit", fail)
        with pytest.raises(Failure, match="injected"):
            guard.start(Policy(), None)
        all_is_right("kvm")


class TestWhatItCannotDo:
    """Each is refused in one line that says why and what to do."""

    def refused(self, outcome: Outcome, *words: str) -> None:
        assert (outcome.status, outcome.out, outcome.err.count("\n")) == (1, "", 1)
        for word in words:
            assert word in outcome.err

    def test_audit(self, configuration: Path) -> None:
        self.refused(start("kvm", "--audit"), "the backend native has no audit")
        configuration.write_text('backend = "native"\nenforce = false\n')
        self.refused(uffdguard("start"), "cannot keep enforce = false")
        assert state.backend() is None

    def test_to_refuse_user_mode_only_where_a_file_says_so_in_so_many_words(self, configuration: Path) -> None:
        """Never laxer than asked: by default nothing is asked, and the choice of the backend says it."""
        configuration.write_text('user-mode-only = "deny"\n')
        self.refused(start("kvm"), 'cannot keep user-mode-only = "deny"', 'say "allow"')
        assert state.backend() is None
        configuration.write_text('user-mode-only = "allow"\n')
        assert start("kvm").status == 0

    @pytest.mark.parametrize("verb", ["watch", "log", "knob"])
    def test_to_count_log_or_serve(self, verb: str) -> None:
        start("kvm")
        self.refused(uffdguard(verb), "the backend native is in force", "--backend lsm")

    def test_check_tells_what_the_knob_answers_to_the_system_call(self) -> None:
        start("kvm")
        for user, status in ((0, 0), (USER, 1)):
            with subprocess.Popen(["sleep", "1000"], user=user, group=user, extra_groups=[]) as process:
                outcome = uffdguard("check", str(process.pid))
                process.kill()
            assert outcome.status == status
            assert "by the backend native" in outcome.out
        assert "/dev/userfaultfd (crw-rw----), for who can open it" in outcome.out
        assert "uffdguard start --mode enabled, for everybody" in outcome.out
        assert uffdguard("holders").status == 0


class TestAnAttacker:
    """One without privileges, who is not in the group of /dev/kvm."""

    @pytest.fixture(autouse=True)
    def kvm(self) -> None:
        start("kvm")

    @staticmethod
    def unshared(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            user=USER,
            group=USER,
            extra_groups=[],
            capture_output=True,
            text=True,
        )

    def test_is_in_no_group_by_a_user_namespace(self) -> None:
        """Nobody without privileges maps more there than the own group."""

        def joins() -> list[str]:
            libc = ctypes.CDLL(None, use_errno=True)
            # Without PR_SET_DUMPABLE the files in /proc would be root's; CLONE_NEWUSER
            assert libc.prctl(4, 1, 0, 0, 0) == libc.unshare(0x10000000) == 0
            writes = [("gid_map", f"0 {KVM_GROUP} 1"), ("gid_map", "0 0 4294967295")]
            writes += [("setgroups", "deny"), ("gid_map", f"0 {USER} 1")]
            refused = []
            for name, text in writes:
                try:
                    Path("/proc/self", name).write_text(text)
                except PermissionError:
                    refused.append(text)
            return refused + tries()

        assert json.loads(as_user(joins)) == [f"0 {KVM_GROUP} 1", "0 0 4294967295", USER_MODE_ONLY]

    def test_gets_no_node_of_its_own(self) -> None:
        found = native.DEV_USERFAULTFD.stat()
        number = f"{os.major(found.st_rdev)} {os.minor(found.st_rdev)}"
        done = self.unshared(f"mount -t tmpfs none /mnt && mknod /mnt/x c {number}")
        assert "mknod: /mnt/x: Operation not permitted" in done.stderr
        assert self.unshared("mount -t devtmpfs none /mnt").returncode != 0

    def test_does_not_get_the_device_by_root_of_a_user_namespace(self) -> None:
        done = self.unshared(": <>/dev/userfaultfd")
        assert "Permission denied" in done.stderr
        assert self.unshared("chmod 666 /dev/userfaultfd").returncode != 0

    @pytest.mark.parametrize("how", ["received", "opened before"])
    def test_keeps_what_it_has_open(self, how: str) -> None:
        """In this the backend is weaker: the permission to open counts, and at the open."""
        member = os.open(native.DEV_USERFAULTFD, os.O_RDWR)
        try:
            if how == "opened before":
                start("disabled")
            assert json.loads(as_user(lambda: probe.device_ioctl(member))) == 0
        finally:
            os.close(member)

    def test_gets_a_node_that_root_has_made_for_it(self) -> None:
        """Another weakness: a second node, as in a container, has permissions of its own."""
        node = native.RUN.with_name("second")
        os.mknod(node, stat.S_IFCHR | 0o666, native.DEV_USERFAULTFD.stat().st_rdev)
        node.chmod(0o666)
        try:
            assert json.loads(as_user(lambda: probe.device_ioctl(os.open(node, os.O_RDWR)))) == 0
        finally:
            node.unlink()
