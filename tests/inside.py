"""What the tests inside the lab share: its fixtures, the actor, and our commands as a user runs them.

They run as root on a kernel that is theirs: they change modes of devices and the native knob at will.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffdguard import cli, guard, knob, state
from uffdguard.kernel import layout, libbpf, native
from uffdguard.policy import Mode, Policy
from uffdguard.steps import log

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterator

#: An ordinary user: no group of /dev/kvm, no capability.
USER = 1000

#: The group that may open /dev/kvm where not everybody may.
KVM_GROUP = 36

BUILD = Path(__file__).parents[1] / "build" / {"aarch64": "arm64"}.get(os.uname().machine, "")
ACTOR = Path("/run/actor")

#: How an event names the actor's int80: on arm64 a 64-bit program has one way only. The model has 32-bit programs.
INT80 = "compat" if os.uname().machine == "x86_64" else "syscall"

#: Which preemption model the kernel runs by; each can be chosen at run time.
PREEMPT = Path("/sys/kernel/debug/sched/preempt")


@pytest.fixture(scope="session")
def lab() -> None:
    """Make sure that root's changes do not outlive the tests, and put the actor where everybody can run it."""
    if "virtme" not in Path("/proc/cmdline").read_text():
        pytest.exit("these tests change the machine they run on: run them in the lab, with `make test-vm`", 4)
    shutil.copy(BUILD / "actor", ACTOR)
    ACTOR.chmod(0o755)
    os.chown(native.DEV_KVM, 0, KVM_GROUP)
    # What is there now stays: a collection, here or in a forked process, has nothing to look for in it.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_in_force(lab: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Begin and end each test without a policy, the devices open to everybody, the native knob at 0.

    Tests that are marked ``kept`` leave the policy to the next one of them: to put it in force takes a second here,
    and where it is in force start has nothing to do, or puts right what the last one has changed.
    """
    kept = request.node.get_closest_marker("kept")
    if not kept:
        nothing_left()
    native.DEV_KVM.chmod(0o666)
    native.DEV_USERFAULTFD.chmod(0o666)
    if not state.PINS.exists():
        Path("/proc", native.KNOB).write_text("0\n")
        if kept:
            request.node.getparent(pytest.Module).addfinalizer(nothing_left)
    yield
    if not kept:
        nothing_left()


def nothing_left() -> None:
    """Stop what is in force, and see that nothing of it is there any more."""
    guard.stop()
    assert not state.PINS.exists()
    assert not native.RUN.exists()


@pytest.fixture
def in_force() -> Callable[..., None]:
    """Return a function that puts a policy in force, or changes the one that is."""

    def put(
        mode: Mode | str, *, user_mode_only: bool = False, audit: bool = False, events_per_second: int = 20
    ) -> None:
        policy = Policy(user_mode_only=user_mode_only, audit=audit)
        guard.start(policy, Mode(mode), events_per_second=events_per_second)

    return put


def actor(*steps: str, user: int = USER, pass_fds: tuple[int, ...] = ()) -> list[str]:
    """Let the actor do STEPS as USER (0: root with all capabilities); return its lines."""
    done = subprocess.run(
        [ACTOR, *steps], user=user, group=user, extra_groups=[], pass_fds=pass_fds, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


def family(pid: int) -> Iterator[Path]:
    """Yield the directory in /proc of each thread of a process, and of the processes that these have started."""
    for task in Path(f"/proc/{pid}/task").glob("*"):
        yield task
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def wchans(pid: int) -> Iterator[str]:
    """Yield what each of them sleeps in."""
    for task in family(pid):
        with contextlib.suppress(OSError):
            yield (task / "wchan").read_text()


@contextlib.contextmanager
def waiting_actor(*steps: str, user: int = USER) -> Iterator[Callable[[], list[str]]]:
    """Start an actor and return once it waits; the function given lets it go on and returns all its lines."""
    with subprocess.Popen(
        [ACTOR, *steps],
        user=user,
        group=user,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not any("pipe" in wchan for wchan in wchans(process.pid)):
            assert process.poll() is None

        def go_on() -> list[str]:
            return process.communicate("\n", timeout=60)[0].split("\n")[:-1]

        yield go_on
        process.kill()


def kernel_memory() -> int:
    """Return what the kernel uses for itself and cannot reclaim, in KiB."""
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(sizes[name].split()[0]) for name in ("SUnreclaim", "Percpu", "VmallocUsed"))


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Let the kernel preempt a task wherever it may, in a BPF program too."""
    if not PREEMPT.exists():
        pytest.skip("this kernel preempts as it was built to")
    before = PREEMPT.read_text()
    PREEMPT.write_text("full")
    try:
        yield
    finally:
        PREEMPT.write_text(before[before.index("(") + 1 : before.index(")")])


@contextlib.contextmanager
def load() -> Iterator[None]:
    """Keep both CPUs busy with address spaces that open /dev/kvm and end, one after the other."""
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            process = stack.enter_context(subprocess.Popen([ACTOR, "churn"], process_group=0))
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
        yield


@contextlib.contextmanager
def journald() -> Iterator[None]:
    """Run systemd's journal, which has nothing of ours at first and is gone at the end.

    What was sent is there to be read after ``journalctl --sync``.
    """
    folders = [Path("/run/systemd/journal"), Path("/run/log/journal")]
    folders[0].mkdir(parents=True, exist_ok=True)
    subprocess.run(["systemd-machine-id-setup"], check=True, capture_output=True)
    with subprocess.Popen(["/lib/systemd/systemd-journald"]) as process:
        try:
            until(lambda: subprocess.run(["journalctl", "--sync"], capture_output=True).returncode == 0)
            yield
        finally:
            process.terminate()
            process.wait()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def forked(job: Callable[[], object]) -> int:
    """Do JOB in a new process and return its pid; its status is 1 when JOB failed."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


class Killer(logging.Handler):
    """Kills its own process with SIGKILL when a step is about to be taken; or only notes the steps.

    :param step: its name, or its place among those that are taken.
    :param mark: a byte that processes share, for the kill waits until it is ARMED, and makes it HIT.
    """

    ARMED, HIT = 1, 2

    def __init__(self, step: str | int | None = None, mark: mmap.mmap | None = None) -> None:
        super().__init__()
        self.step = step
        self.mark = mark
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
        if self.step not in (record.getMessage(), len(self.seen) - 1):
            return
        if self.mark is not None:
            if self.mark[0] != self.ARMED:
                return
            self.mark[0] = self.HIT
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def watched(killer: Killer) -> Iterator[list[str]]:
    """Let KILLER see the steps; give those that it has seen."""
    log.setLevel(logging.DEBUG)
    log.addHandler(killer)
    try:
        yield killer.seen
    finally:
        log.removeHandler(killer)
        log.setLevel(logging.NOTSET)


def force_knob(value: int) -> None:
    """Set the native knob to what it is not to have, as nobody can while the guard of sysctls is there."""
    fd = libbpf.get(state.PINS / "enforcement")
    due = libbpf.read(fd, layout.Enforcement).knob
    libbpf.store(fd, layout.Enforcement, "knob", value)
    native.write_knob(value)
    libbpf.store(fd, layout.Enforcement, "knob", due)
    os.close(fd)


def until(condition: Callable[[], object]) -> None:
    """Wait until CONDITION holds; fail when it does not within 60 s."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def hold_maps_only(server: knob.Server) -> None:
    """Stand in for knob.Server.hold, as if the references to the links had been lost."""
    for part in state.PARTS:
        server.held.setdefault(part, libbpf.get(state.PINS / ("counts" if part in state.LINKS else part)))


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


def uffdguard(*arguments: str, user: int = 0) -> Outcome:
    """Run one of our commands in a process of its own, forked: to start Python anew takes seconds here."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
                sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), write_through=True)
                if user:
                    os.setgroups([])
                    os.setresgid(user, user, user)
                    os.setresuid(user, user, user)
                cli.main(list(arguments))
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return Outcome(os.waitstatus_to_exitcode(ended), out.read(), err.read())


def killed_at(step: str, job: Callable[[], object]) -> bool:
    """Do JOB in a process that is killed just before STEP; tell whether it came to that."""

    def doomed() -> None:
        with watched(Killer(step)):
            job()

    status = os.waitstatus_to_exitcode(os.waitpid(forked(doomed), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
