"""The interface file, with the programs that people use on it."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import USER, actor, force_knob, forked, hold_maps_only, uffdguard, until

from uffdguard import cli, config, guard, knob, state
from uffdguard.kernel import native
from uffdguard.lock import locked
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE = native.FILE
#: How many descriptors a service manager keeps: those of the connection and of the native knob.
KEPT = 2
KVM = "open:/dev/kvm"
NATIVE = re.compile(r"[01]\n")


def sh(script: str, *, user: int = 0) -> tuple[int, str, str]:
    """Run SCRIPT as USER; return its status and what it printed."""
    done = subprocess.run(
        ["sh", "-c", script], user=user, group=user, extra_groups=[], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def serving(in_force: Callable[..., None], log: Path) -> Iterator[int]:
    """Have `uffdguard knob` run on a policy in mode disabled; give its pid."""
    in_force("disabled")
    pid = forked(lambda: uffdguard_knob(log))
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    yield pid
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    assert NATIVE.fullmatch(FILE.read_text())


def uffdguard_knob(log: Path) -> None:
    """Run the command in this process, a forked one, without pytest's hold on its messages."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    logging.root.handlers.clear()
    cli.main(["knob"])


def test_the_dialogue_of_the_seed(serving: int) -> None:
    assert FILE.read_text() == "[disabled] enabled kvm\n"
    assert sh(f"echo kvm > {FILE}") == (0, "", "")
    assert sh(f"cat {FILE}") == (0, "disabled enabled [kvm]\n", "")
    assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
    name = "vm.unprivileged_userfaultfd"
    assert sh(f"sysctl {name}") == (0, f"{name} = disabled enabled [kvm]\n", "")
    assert sh(f"sysctl -w {name}=enabled") == (0, f"{name} = enabled\n", "")
    assert actor("syscall", "syscall:1", "device") == ["allowed"] * 3
    assert f"{name} = disabled [enabled] kvm\n" in sh("sysctl -a")[1]
    assert sh(f"printf ' disabled ' > {FILE}") == (0, "", "")
    assert actor("syscall", "syscall:1", "device") == ["EPERM"] * 3


def test_a_line_in_sysctl_d_switches_the_mode(serving: int) -> None:
    Path("/etc/sysctl.d").mkdir(exist_ok=True)
    Path("/etc/sysctl.d/99-uffd.conf").write_text("vm.unprivileged_userfaultfd = kvm\n")
    try:
        sh("sysctl --system")
    finally:
        Path("/etc/sysctl.d/99-uffd.conf").unlink()
    assert FILE.read_text() == "disabled enabled [kvm]\n"


def test_the_file_and_the_command_show_each_others_changes(serving: int) -> None:
    assert uffdguard("mode", "kvm").status == 0
    assert FILE.read_text() == "disabled enabled [kvm]\n"
    FILE.write_text("enabled")
    assert uffdguard("mode").out == "disabled [enabled] kvm\n"
    assert uffdguard("mode", user=USER).out == "disabled [enabled] kvm\n"
    assert state.status().interface == "served"


@pytest.mark.parametrize("data", [b"", b"kmv\n", b"kvm enabled\n", b"0\n", b"1\n", b"\xff\0", b"kvm" + b" " * 5000])
def test_what_is_no_word_is_refused_and_changes_nothing(serving: int, log: Path, data: bytes) -> None:
    guard.set_mode(Mode.KVM)
    fd = os.open(FILE, os.O_WRONLY)
    try:
        if data:
            with pytest.raises(OSError, match="Invalid argument"):
                os.write(fd, data)
            assert f"pid {os.getpid()} (" in log.read_text()
        else:  # a write of nothing never reaches a FUSE server
            os.write(fd, data)
    finally:
        os.close(fd)
    assert FILE.read_text() == "disabled enabled [kvm]\n"


def test_a_second_chunk_is_refused(serving: int) -> None:
    fd = os.open(FILE, os.O_WRONLY)
    os.write(fd, b"kvm\n")
    with pytest.raises(OSError, match="Invalid argument"):
        os.write(fd, b"enabled\n")
    os.close(fd)
    assert FILE.read_text() == "disabled enabled [kvm]\n"


def test_the_numbers_are_words_when_the_configuration_says_so(
    in_force: Callable[..., None], tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uffdguard.toml").write_text('numeric = "accept"\n')
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    in_force("disabled")
    pid = forked(lambda: uffdguard_knob(log))
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    for number, line in (("1", "disabled [enabled] kvm\n"), ("0", "[disabled] enabled kvm\n")):
        assert sh(f"echo {number} > {FILE}") == (0, "", "")
        assert FILE.read_text() == line
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def test_a_number_in_audit_is_for_the_native_knob(serving: int, in_force: Callable[..., None], log: Path) -> None:
    """So that a line in sysctl.d does there what it does without us."""
    in_force("kvm", audit=True)
    for number, answer in (("1", "allowed"), ("0", "EPERM"), ("1", "allowed")):
        assert sh(f"echo {number} > {FILE}") == (0, "", "")
        assert (native.read_knob(), actor("syscall")) == (int(number), [answer])
        assert FILE.read_text() == "disabled enabled [kvm]\n"
        assert state.status().problems == []
    assert sh(f"echo disabled > {FILE}") == (0, "", "")
    assert "mode disabled in audit: refusals are counted and told, and let pass" in log.read_text()
    assert actor("syscall", "device") == ["allowed"] * 2
    in_force("kvm")
    assert sh(f"echo 1 > {FILE}")[0] != 0
    assert actor("syscall", "device") == ["EPERM"] * 2
    guard.stop()
    assert NATIVE.fullmatch(FILE.read_text())
    assert native.FILE.read_text() == "1\n"


def test_others_than_root_read_and_do_not_write(serving: int) -> None:
    assert f"{FILE.stat().st_mode:o} {FILE.stat().st_uid}" == "100644 0"
    assert sh(f"cat {FILE}", user=USER)[1] == "[disabled] enabled kvm\n"
    assert "Permission denied" in sh(f"echo kvm > {FILE}", user=USER)[2]
    assert "Permission denied" in sh(f"unshare -Ur sh -c 'echo kvm > {FILE}'", user=USER)[2]
    assert FILE.read_text() == "[disabled] enabled kvm\n"


def test_a_new_procfs_in_a_user_namespace_can_be_mounted_before_during_and_after(in_force: Callable[..., None]) -> None:
    fresh = "unshare -Urpf --mount-proc true"
    assert sh(fresh, user=USER)[0] == 0
    in_force("kvm")
    assert sh(fresh, user=USER)[0] == 0
    pid = forked(knob.run)
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    assert sh(fresh, user=USER)[0] == 0
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    assert sh(fresh, user=USER)[0] == 0


def test_a_hundred_at_once_are_answered_and_a_stopped_reader_holds_up_nobody(serving: int) -> None:
    stopped = subprocess.Popen(["sh", "-c", f"exec 3<{FILE}; kill -STOP $$"])
    until(lambda: "State:\tT" in Path(f"/proc/{stopped.pid}/status").read_text())

    def use(number: int) -> None:
        words = [str(mode) for mode in Mode]
        for turn in range(3):
            FILE.write_text(words[(number + turn) % 3])
            assert re.fullmatch(r"(\[?(disabled|enabled|kvm)\]?[ \n]){3}", FILE.read_text())

    pids = [forked(lambda number=number: use(number)) for number in range(100)]  # type: ignore[misc]
    assert {os.waitpid(pid, 0)[1] for pid in pids} == {0}
    stopped.kill()
    stopped.wait()
    status = state.status()
    assert (status.problems, f"[{status.mode}]" in FILE.read_text()) == ([], True)


def test_the_server_has_no_capability_and_is_small_and_quick(in_force: Callable[..., None]) -> None:
    in_force("kvm")
    command = subprocess.Popen([Path(sys.executable).with_name("uffdguard"), "knob"])
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    server = state.server()
    assert server
    status = Path(f"/proc/{server}/status").read_text()
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert re.search(r"^CapPrm:\t0+$", status, re.MULTILINE)
    resident = int(re.findall(r"^Rss: +(\d+)", Path(f"/proc/{server}/smaps_rollup").read_text(), re.MULTILINE)[0])
    spent = cpu_seconds(server)
    for _ in range(1000):
        FILE.read_text()
    a_read = (cpu_seconds(server) - spent) / 1000
    print(f"resident: {resident} KiB; a read: {a_read * 1e6:.0f} us of the server's time, emulated")
    assert resident <= 20 * 1024
    command.terminate()
    assert command.wait() == 0


def cpu_seconds(pid: int) -> float:
    """Return the processor time that PID has taken, proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_stop_ends_the_server_and_the_native_file_is_seen(serving: int) -> None:
    FILE.write_text("kvm")
    assert guard.stop()
    assert FILE.read_text() == "0\n"
    os.waitpid(serving, 0)
    assert not native.RUN.exists()
    assert actor(KVM, "syscall") == ["allowed", "EPERM"]


#: All are uid 0 of the machine, and none has CAP_SYS_ADMIN where it counts. The first has /proc/sys read-only, but what
#: is mounted later comes in as it is; others map 0 to 0, and have all capabilities in their own namespace.
STRANGERS = (
    "unshare -m sh -c 'mount --rbind -o ro /proc/sys /proc/sys; setpriv --bounding-set -sys_admin sh -c \"$0\"' {}",
    "setpriv --bounding-set -all,+setfcap --inh-caps -all unshare -Ur sh -c {}",
    "unshare -Ur sh -c {}",
    "setpriv --bounding-set -sys_admin --no-new-privs sh -c {}",
)


def test_only_who_has_cap_sys_admin_in_the_initial_user_namespace_switches_the_mode(serving: int, log: Path) -> None:
    write = shlex.quote(f"echo kvm >{FILE}")
    for stranger in STRANGERS:
        status, _, said = sh(stranger.format(write))
        assert (status != 0, "Operation not permitted" in said) == (True, True), (stranger, said)
    assert log.read_text().count("has no CAP_SYS_ADMIN in the initial user namespace") == len(STRANGERS)
    # A name that looks like another's, and a descriptor that somebody else has opened.
    status, _, said = sh(
        f"printf '\\034x' >/proc/self/comm; {STRANGERS[3].format(shlex.quote('/bin/echo kvm'))} >{FILE}"
    )
    assert (status != 0, "Operation not permitted" in said) == (True, True)
    # Whoever maps all ids has the capability there, and root of the machine has written the map.
    assert os.waitpid(forked(write_under_a_full_map), 0)[1] == 0
    assert FILE.read_text() == "[disabled] enabled kvm\n"
    # Not by the process but by the thread.
    thread = threading.Thread(target=FILE.write_text, args=["kvm"])
    thread.start()
    thread.join()
    assert FILE.read_text() == "disabled enabled [kvm]\n"


def write_under_a_full_map() -> None:
    """Be refused in a user namespace that maps all ids to themselves, with all its capabilities."""
    (asks, ask), (goes, go) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        native.drop_capabilities()
        assert ctypes.CDLL(None).unshare(0x10000000) == 0  # CLONE_NEWUSER
        os.write(ask, b"x")
        os.read(goes, 1)
        status = Path("/proc/self/status").read_text()
        effective = int(re.findall(r"^CapEff:\t(.*)$", status, re.MULTILINE)[0], 16)
        assert (os.getuid(), effective >> 21 & 1) == (0, 1)
        with pytest.raises(PermissionError):
            FILE.write_text("kvm")
        os._exit(0)
    os.read(asks, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 4294967295")
    os.write(go, b"x")
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("name", [b"\xff", b"\x1cx"])
def test_a_mount_of_any_name_hides_nothing(serving: int, tmp_path: Path, name: bytes) -> None:
    place = tmp_path / os.fsdecode(name)
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "x", place], check=True)
    try:
        assert native.is_covered()
        assert guard.stop()
        assert not native.is_covered()
    finally:
        subprocess.run(["umount", place], check=True)


def test_readers_never_see_anything_but_the_mode_while_the_watch_goes_on(
    serving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILE.write_text("kvm")

    def read() -> None:
        end = time.monotonic() + 6
        while time.monotonic() < end:
            assert FILE.read_text() == "disabled enabled [kvm]\n"

    assert {os.waitpid(pid, 0)[1] for pid in [forked(read), forked(read)]} == {0}


def test_a_trial_child_that_dies_closes_nothing(serving: int) -> None:
    FILE.write_text("kvm")
    tasks = Path(f"/proc/{state.server()}/task")

    def children() -> list[str]:
        return [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]

    (child,) = children()
    os.kill(int(child), signal.SIGKILL)
    until(lambda: children() not in ([child], []))
    time.sleep(2)
    assert FILE.read_text() == "disabled enabled [kvm]\n"
    assert native.read_knob() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_the_native_file_is_seen_again_when_the_command_is_ended(serving: int, number: signal.Signals) -> None:
    os.kill(serving, number)
    assert os.waitpid(serving, 0)[1] == 0
    assert FILE.read_text() == "0\n"
    assert state.status().problems == []


def test_a_server_mends_a_native_knob_that_was_closed(in_force: Callable[..., None], log: Path) -> None:
    in_force("kvm")
    force_knob(0)
    pid = forked(lambda: uffdguard_knob(log))
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    assert native.read_knob() == 1
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


class ServiceManager:
    """Starts the server as systemd does, and keeps the descriptors that it is given, sd_notify(3)."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0manager")
        self.socket.settimeout(60)
        self.kept: dict[str, int] = {}

    def start(self) -> int:
        """Start a server, and return its pid once it has said what comes first: that it is ready."""
        pid = forked(self.serve)
        self.until_ready()
        return pid

    def serve(self) -> None:
        os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
        logging.root.handlers.clear()
        os.environ["NOTIFY_SOCKET"] = "@manager"
        if self.kept:
            # In the way of each other otherwise.
            copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in self.kept.values()]
            for number, fd in enumerate(copies):
                os.dup2(fd, 3 + number)
                os.close(fd)
            names = ":".join(self.kept)
            os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(copies)), "LISTEN_FDNAMES": names}
        # What the unit leaves to it, capset(2): CAP_SETGID.
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(1 << 6, 1 << 6)
        assert ctypes.CDLL(None).capset(header, sets) == 0
        knob.main()

    def receive(self) -> str:
        """Take a message, and do what it says."""
        message, fds, *_ = socket.recv_fds(self.socket, 1000, 1)
        word, _, name = message.decode().partition("\nFDNAME=")
        if word == "FDSTORE=1":
            (self.kept[name],) = fds
        elif word == "FDSTOREREMOVE=1":
            os.close(self.kept.pop(name))
        return word

    def until_ready(self) -> None:
        while self.receive() != "READY=1":
            pass

    def close(self) -> None:
        self.socket.close()
        for name in list(self.kept):
            os.close(self.kept.pop(name))


@pytest.fixture
def manager(in_force: Callable[..., None], log: Path) -> Iterator[ServiceManager]:
    """A service manager whose server is mounted."""
    in_force("kvm")
    manager = ServiceManager(log)
    yield manager
    if server := state.server():
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    manager.close()
    native.uncover()


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Give the path of the copy of the file in a mount namespace of its own."""
    with subprocess.Popen(["unshare", "-m", "sleep", "1000"]) as process:
        ours = Path("/proc/self/ns/mnt")
        try:
            until(lambda: not Path(f"/proc/{process.pid}/ns/mnt").samefile(ours))
            yield Path(f"/proc/{process.pid}/root{FILE}")
        finally:
            process.kill()


def covers() -> list[str]:
    return [line for line in native.MOUNTS.read_text().splitlines() if native.COVER in line]


def test_copies_of_the_file_outlive_its_server(manager: ServiceManager) -> None:
    assert "no server waits to be mounted" in uffdguard("knob", "mount").err
    pid = manager.start()
    assert uffdguard("knob", "mount").status == 0
    manager.until_ready()
    assert len(manager.kept) == KEPT
    line = "disabled enabled [kvm]\n"
    mounted = covers()
    with copied() as copy:
        assert copy.read_text() == FILE.read_text() == line
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # Nobody answers; a question waits, and a start takes nothing away.
        assert state.status().interface == "dead"
        waiting = forked(lambda: reads(copy, line))
        assert uffdguard("start").status == 0
        assert covers() == mounted
        pid = manager.start()
        assert os.waitpid(waiting, 0)[1] == 0
        assert uffdguard("knob", "mount").status == 0
        assert copy.read_text() == FILE.read_text() == line
        # So does a restart, and the copy is as good as the file.
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0
        manager.start()
        assert (covers(), state.status().problems) == (mounted, [])
        copy.write_text("enabled")
        assert FILE.read_text() == "disabled [enabled] kvm\n"
        with pytest.raises(OSError, match="Invalid"):
            copy.write_text("kmv")
        # A stop is the end of all.
        assert guard.stop()
        assert NATIVE.fullmatch(FILE.read_text())
        manager.close()
        with pytest.raises(OSError, match=r"not connected|abort"):
            copy.read_text()


def reads(path: Path, text: str) -> None:
    assert path.read_text() == text


def test_what_is_kept_is_given_up_where_it_is_of_no_use(manager: ServiceManager) -> None:
    def begin() -> int:
        pid = manager.start()
        assert uffdguard("knob", "mount").status == 0
        manager.until_ready()
        return pid

    pid = begin()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # Uncovered meanwhile: a mount is not made again from a connection.
    native.uncover()
    with copied():
        pid = begin()
        assert len(manager.kept) == KEPT
        assert FILE.read_text() == "disabled enabled [kvm]\n"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # A server that cannot begin lets nobody wait for an answer.
        state.LOADED.rename(state.LOADED.with_name("aside"))
        pid = forked(manager.serve)
        assert os.waitpid(pid, 0)[1] != 0
        while manager.kept:
            assert manager.receive() == "FDSTOREREMOVE=1"
        state.LOADED.with_name("aside").rename(state.LOADED)
        with pytest.raises(OSError, match=r"not connected|abort"):
            FILE.read_text()
        assert uffdguard("start").status == 0
        assert NATIVE.fullmatch(FILE.read_text())


def test_whoever_waits_for_a_server_that_is_killed_gets_an_error(manager: ServiceManager) -> None:
    """Others have the connection, and would not know that it was read and not answered."""
    manager.start()
    assert uffdguard("knob", "mount").status == 0
    manager.until_ready()
    server = state.server()
    assert server
    with locked():
        writer = forked(lambda: os.write(os.open(FILE, os.O_WRONLY), b"enabled"))
        until(lambda: re.search("lock|futex", Path(f"/proc/{server}/wchan").read_text()))
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    assert os.waitpid(writer, 0)[1] != 0
    manager.start()
    assert FILE.read_text() == "disabled enabled [kvm]\n"


def test_the_watch_closes_the_native_knob_where_that_protects_and_comes_back_by_itself(
    in_force: Callable[..., None], silence: Callable[[bool], None], log: Path
) -> None:
    FILE.write_text("1\n")
    in_force("kvm")
    pid = forked(lambda: uffdguard_knob(log))
    until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
    settings = [("kvm", False, True), ("disabled", False, True), ("enabled", False, False), ("kvm", True, False)]
    for number, (mode, audit, closed) in enumerate(settings, 1):
        in_force(mode, audit=audit)
        before = native.read_knob()
        assert before == (mode != "disabled")
        silence(True)
        began = time.monotonic()
        until(lambda number=number: log.read_text().count("does not refuse any more") == number)  # type: ignore[misc]
        print(f"{mode}{' in audit' * audit}: seen after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < 20  # a second, on a machine that is emulated and busy
        assert native.read_knob() == (0 if closed else 1)
        assert f"[{mode}]" in FILE.read_text()
        silence(False)
        until(lambda number=number: log.read_text().count("refuses again") == number)  # type: ignore[misc]
        assert native.read_knob() == before
    assert "the native knob stays as it is, because this setting refuses nobody" in log.read_text()
    assert log.read_text().count("\n") == 2 * len(settings), log.read_text()
    os.kill(pid, signal.SIGTERM)
    assert os.waitpid(pid, 0)[1] == 0


class TestWithoutTheDevice:
    """No /dev/userfaultfd, as on a kernel before 6.1: a server without capabilities asks and switches all the same."""

    @pytest.fixture(autouse=True)
    def hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "DEV_USERFAULTFD", Path("/dev/no-such-device"))

    def test_a_write_switches_to_each_mode_from_each_other(self, manager: ServiceManager) -> None:
        manager.start()
        assert uffdguard("knob", "mount").status == 0
        manager.until_ready()
        for word in ("disabled", "kvm", "enabled", "disabled", "enabled", "kvm"):
            FILE.write_text(word)
            assert f"[{word}]" in FILE.read_text()
            assert native.read_knob() == (word != "disabled")
            assert actor("syscall", "syscall:1") == ["allowed" if word == "enabled" else "EPERM"] * 2
        assert actor(KVM, "syscall") == ["allowed", "allowed"]

    def test_the_watch_sees_a_policy_that_does_not_answer_in_each_mode(
        self, in_force: Callable[..., None], silence: Callable[[bool], None], log: Path
    ) -> None:
        in_force("kvm")
        pid = forked(lambda: uffdguard_knob(log))
        until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
        for number, mode in enumerate(("kvm", "disabled"), 1):
            in_force(mode)
            silence(True)
            until(lambda number=number: log.read_text().count("does not refuse any more") == number)  # type: ignore[misc]
            assert native.read_knob() == 0
            silence(False)
            until(lambda number=number: log.read_text().count("refuses again") == number)  # type: ignore[misc]
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0


class TestKilled:
    def test_the_server_alone_leaves_the_native_file(self, serving: int) -> None:
        os.kill(state.server() or 0, signal.SIGKILL)
        os.waitpid(serving, 0)
        assert FILE.read_text() == "0\n"
        assert state.status().problems == []

    def kill_all(self, serving: int) -> None:
        server = state.server()
        assert server
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)
        os.kill(server, signal.SIGKILL)
        until(lambda: state.server() is None)
        with pytest.raises(OSError, match="not connected"):
            FILE.read_text()
        assert state.status().problems == ["the interface file does not answer: its server has died"]
        assert actor(KVM, "syscall:1", "device") == ["allowed", "EPERM", "EPERM"]

    def test_a_server_that_nobody_looks_after_is_mended_by_start(self, serving: int) -> None:
        self.kill_all(serving)
        assert uffdguard("start").status == 0
        assert FILE.read_text() == "0\n"
        assert state.status().problems == []

    def test_or_by_stop(self, serving: int) -> None:
        self.kill_all(serving)
        assert uffdguard("stop").status == 0
        assert FILE.read_text() == "0\n"

    def test_or_by_the_next_server(self, serving: int, log: Path) -> None:
        self.kill_all(serving)
        pid = forked(lambda: uffdguard_knob(log))

        def served() -> bool:
            with contextlib.suppress(OSError):
                return FILE.read_text() == "[disabled] enabled kvm\n"
            return False

        until(served)
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


class TestSecondReferences:
    def test_pins_removed_by_accident_change_nothing_and_come_back(self, serving: int, log: Path) -> None:
        FILE.write_text("kvm")
        for part in state.PARTS:
            (state.PINS / part).unlink()
        state.PINS.rmdir()
        assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
        until(lambda: not state.status().problems)
        assert state.status().mode is Mode.KVM
        # It is another directory, and one in which this server may not remove.
        with pytest.raises(OSError, match="Input/output error"):
            FILE.write_text("enabled")
        assert "was removed and made anew" in log.read_text()
        assert FILE.read_text() == "disabled enabled [kvm]\n"
        assert uffdguard("mode", "enabled").status == 0

    def test_a_bpffs_unmounted_by_accident_changes_nothing_and_start_mends_it(self, serving: int) -> None:
        FILE.write_text("enabled")
        FILE.write_text("kvm")
        native.unmount(native.BPFFS)
        assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
        guard.start(Policy(), None)
        assert state.status().problems == []
        assert state.status().mode is Mode.KVM

    def test_a_policy_that_is_gone_all_the_same_closes_the_native_knob_within_a_second_or_two(
        self, in_force: Callable[..., None], monkeypatch: pytest.MonkeyPatch, log: Path
    ) -> None:
        in_force("kvm")

        def serve_without_references() -> None:
            monkeypatch.setattr(knob.Server, "hold", hold_maps_only)
            uffdguard_knob(log)

        pid = forked(serve_without_references)
        until(lambda: NATIVE.fullmatch(FILE.read_text()) is None)
        assert native.read_knob() == 1
        for part in state.LINKS:
            (state.PINS / part).unlink()
        began = time.monotonic()
        until(lambda: native.read_knob() == 0)
        assert time.monotonic() - began < 20  # a second, on a machine that is emulated and busy
        assert "the policy does not refuse any more" in log.read_text()
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == 0
        assert FILE.read_text() == "0\n"


def test_an_upgrade_while_it_is_served_has_no_gap(serving: int) -> None:
    FILE.write_text("kvm")
    state.LOADED.write_text("another object")
    assert uffdguard("start").status == 0
    assert actor(KVM, "syscall", "fork", "syscall") == ["allowed", "allowed", "EPERM"]
    FILE.write_text("enabled")
    assert actor("syscall") == ["allowed"]
    FILE.write_text("disabled")
    assert actor("syscall:1") == ["EPERM"]


@pytest.mark.parametrize("part", ["decide", "policy"])
def test_a_damaged_policy_is_not_served_and_told_on_one_line(in_force: Callable[..., None], part: str) -> None:
    in_force("kvm")
    (state.PINS / part).unlink()
    done = subprocess.run([Path(sys.executable).with_name("uffdguard"), "knob"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the policy is damaged: not pinned: {part}; run uffdguard start\n" in done.stderr
    assert done.stderr.count("\n") == 1
    assert FILE.read_text() == "1\n"
    assert state.server() is None


def test_stop_takes_away_what_a_server_left_that_was_killed_while_it_waited(
    in_force: Callable[..., None],
) -> None:
    in_force("kvm")
    command = subprocess.Popen([Path(sys.executable).with_name("uffdguard"), "knob", "serve"])
    until(knob.SOCKET.exists)
    command.kill()
    command.wait()
    assert knob.SOCKET.exists()
    guard.stop()
    assert not native.RUN.exists()


def test_without_a_policy_it_is_not_served() -> None:
    outcome = uffdguard("knob")
    assert (outcome.status, outcome.out, outcome.err) == (
        1,
        "",
        "uffdguard: the policy is not in force; run uffdguard start\n",
    )
    assert NATIVE.fullmatch(FILE.read_text())


def test_a_second_server_is_refused(serving: int) -> None:
    for arguments in (("knob",), ("knob", "serve")):
        command = [Path(sys.executable).with_name("uffdguard"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        words = "uffdguard: the interface file is being served already; see uffdguard status\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
    assert FILE.read_text() == "[disabled] enabled kvm\n"
