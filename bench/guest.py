"""What runs in the lab: put a subject in place, have build/measure count, take it away; a line of JSON a part.

Usage: ``guest.py PART...``; the parts are the functions that ``@part`` marks. All but ``cpus`` are exact only in a VM
that counts instructions.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffdguard import guard, state
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
MEASURE = Path("/run/measure")
COMMAND = Path(sys.executable).with_name("uffdguard")


@contextlib.contextmanager
def policy(mode: Mode, *, user_mode_only: bool = False, audit: bool = False, watched: bool = False) -> Iterator[None]:
    """Put uffdguard in force; WATCHED: somebody wants to see the allowed ones, and each is told."""
    guard.start(Policy(user_mode_only=user_mode_only, audit=audit), mode)
    with state.pinned() as found:
        programs = [program.id for program in found.programs.values()]
        if watched:
            libbpf.store(found.fds["witness"], layout.Witness, "all_until", 2**32 - 1)
            for name in ("per_owner", "total"):
                libbpf.store(found.fds["watching"], layout.Watching, name, 2**31)
    try:
        yield
    finally:
        guard.stop()
        # The kernel frees what was unpinned, and detaches it, a little later: kernel/bpf/inode.c, bpf_free_inode().
        while any(map(is_loaded, programs)):
            time.sleep(0.01)


def is_loaded(program: int) -> bool:
    """Tell whether the kernel still has the program of this id."""
    fd = libbpf.library().bpf_prog_get_fd_by_id(program)
    if fd < 0:
        return False
    os.close(fd)
    return True


@contextlib.contextmanager
def attached(program: str) -> Iterator[None]:
    """Attach one program of subjects.bpf.c."""
    with libbpf.Object(BUILD / "subjects.bpf.o") as obj:
        obj.only(program)
        obj.load()
        link = obj.attach(program)
    try:
        yield
    finally:
        os.close(link)


@dataclass(frozen=True)
class Subject:
    """Something that costs: how it is put in place, and what build/measure does to itself."""

    put: Callable[[], AbstractContextManager[None]] = nullcontext
    options: tuple[str, ...] = ()


NONE, AGAIN, FLOOR = "no policy", "no policy, again", "empty LSM program"
USER_MODE_ONLY = "uffdguard disabled, user-mode-only"
AUDIT, WATCHED = "uffdguard kvm, audit", "uffdguard kvm, watched"
MODES = {f"uffdguard {mode}": Subject(lambda mode=mode: policy(mode)) for mode in Mode}  # type: ignore[misc]
SUBJECTS = {
    NONE: Subject(),
    FLOOR: Subject(lambda: attached("empty")),
    **MODES,
    USER_MODE_ONLY: Subject(lambda: policy(Mode.DISABLED, user_mode_only=True)),
    AUDIT: Subject(lambda: policy(Mode.KVM, audit=True)),
    WATCHED: Subject(lambda: policy(Mode.KVM, watched=True)),
    "seccomp filter": Subject(options=("-f", "allow")),
    "seccomp supervisor": Subject(options=("-f", "notify")),
    "LSM program on file_open": Subject(lambda: attached("watch_opens")),
    # How far two runs of the same differ.
    AGAIN: Subject(),
}

#: What enforces, with nobody watching.
ENFORCED = (*MODES, USER_MODE_ONLY)

#: Those that CI measures.
SHORT = {NONE: SUBJECTS[NONE], FLOOR: SUBJECTS[FLOOR], **MODES}

#: The paths of measure.c that create a userfaultfd; only there a policy may cost.
CREATIONS = (
    "userfaultfd",
    "userfaultfd by root",
    "userfaultfd after /dev/kvm",
    "userfaultfd user-mode-only",
    "/dev/userfaultfd",
    "/dev/userfaultfd by root",
    "/dev/userfaultfd after /dev/kvm",
)
OPEN_KVM = "open /dev/kvm"
#: A policy must add nothing to these.
FREE = (
    "page fault served",
    "getppid",
    "eventfd",
    "open tmpfs file",
    "open /dev/null",
    "fork, exit",
    "fork, exec, exit",
    "thread create, join",
    "mmap, munmap",
)
#: Makes an inode by the same hook, which calls the program of a policy in vain.
IO_URING = "io_uring_setup"
PATHS = (*CREATIONS, OPEN_KVM, *FREE, IO_URING)


@dataclass(frozen=True)
class Figure:
    """What one run of build/measure says of a path, per call."""

    least: float
    mean: float
    refused: str | None


def measure(paths: Iterable[str], *options: str) -> dict[str, Figure]:
    """Measure PATHS once."""
    done = subprocess.run([MEASURE, *options, *paths], stdout=subprocess.PIPE, text=True, check=True)
    figures = {}
    for line in done.stdout.splitlines():
        path, least, mean, _, refused = line.split("\t")
        figures[path] = Figure(float(least), float(mean), None if refused == "-" else refused)
    return figures


def compare(subjects: dict[str, Subject], paths: Iterable[str], rounds: int, *options: str) -> dict[str, Any]:
    """Measure PATHS with each subject in place, ROUNDS times and by turns; for each path, each subject's figures."""
    seen: dict[str, dict[str, list[Figure]]] = {path: {name: [] for name in subjects} for path in paths}
    for _ in range(rounds):
        for name, subject in subjects.items():
            with subject.put():
                for path, figure in measure(paths, *options, *subject.options).items():
                    seen[path][name].append(figure)
    return {path: {name: summary(figures) for name, figures in row.items()} for path, row in seen.items()}


def summary(figures: list[Figure]) -> dict[str, Any]:
    """Return the least of all rounds, by how much the rounds differ, the mean, and whether the calls were refused."""
    least = [figure.least for figure in figures]
    (refused,) = {figure.refused for figure in figures}
    return {
        "least": round(min(least), 1),
        "spread": round(max(least) - min(least), 1),
        "mean": round(sum(figure.mean for figure in figures) / len(figures), 1),
        "refused": refused,
    }


PARTS: dict[str, Callable[[], Any]] = {}


def part(function: Callable[[], Any]) -> Callable[[], Any]:
    """Make a part of the benchmark by its name."""
    PARTS[function.__name__] = function
    return function


@part
def calls() -> dict[str, Any]:
    """Every path with every subject."""
    return compare(SUBJECTS, PATHS, 3)


@part
def grants() -> dict[str, Any]:
    """The paths that look for a grant, by the number of processes that have one."""
    found = {}
    with policy(Mode.KVM), contextlib.ExitStack() as openers:
        there = 0
        for number in (1, 10, 100, 1000, 10_000):
            openers.enter_context(crowd(number - there))
            there = number
            found[str(number)] = compare(
                {"uffdguard kvm": Subject()}, ("userfaultfd after /dev/kvm", "userfaultfd", OPEN_KVM, "fork, exit"), 5
            )
    return found


@contextlib.contextmanager
def crowd(number: int) -> Iterator[None]:
    """Have so many processes open /dev/kvm, and stay."""
    with subprocess.Popen([BUILD / "actor", f"crowd:{number}", "wait"], stdin=-1, stdout=-1) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@part
def threads() -> dict[str, Any]:
    """A creation by a process of so many threads."""
    subjects = {NONE: SUBJECTS[NONE], FLOOR: SUBJECTS[FLOOR], "uffdguard kvm": MODES["uffdguard kvm"]}
    return {
        str(number): compare(subjects, ("userfaultfd after /dev/kvm",), 3, "-t", str(number))
        for number in (1, 2, 4, 8, 16, 32, 64)
    }


@part
def refusals() -> dict[str, Any]:
    """A creation while another process is refused so many a second; without a policy it is allowed as often."""
    subjects = {NONE: SUBJECTS[NONE], "uffdguard kvm": MODES["uffdguard kvm"]}
    found = {}
    for rate in (0, 10, 100, 1000):
        with background("-r", str(rate), "/dev/userfaultfd") if rate else nullcontext():
            found[str(rate)] = compare(subjects, ("userfaultfd after /dev/kvm",), 2, "-b", "200")
    return found


@contextlib.contextmanager
def background(*options: str) -> Iterator[None]:
    """Have build/measure go on at the same time."""
    with subprocess.Popen([MEASURE, *options], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


def cpus() -> dict[str, Any]:
    """A process a CPU creates userfaultfds, without counting instructions: the least of all rounds, in ns."""
    subjects = {NONE: SUBJECTS[NONE], FLOOR: SUBJECTS[FLOOR], "uffdguard kvm": MODES["uffdguard kvm"]}
    return compare(subjects, ("userfaultfd after /dev/kvm",), 5, "-w", str(os.cpu_count()), "-b", "200")


PARTS |= {f"cpus_{number}": cpus for number in (1, 2, 4)}


def other_lsm() -> dict[str, Any]:
    """Every path without a policy, on a kernel that was booted with other security modules."""
    return compare({NONE: SUBJECTS[NONE]}, PATHS, 3) | {"lsm": (features.SECURITYFS / "lsm").read_text()}


PARTS |= dict.fromkeys(("bare", "selinux"), other_lsm)


def spent(*command: str | Path) -> int:
    """Return the instructions that COMMAND takes, its children and the kernel's part included: the time of its CPU."""
    # What it imports has been compiled, as where a package was installed: by the first run, which warms up.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": "/run/measure-python"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, ended, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode:
        raise RuntimeError(f"{command}: status {process.returncode}")
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


@part
def commands() -> dict[str, Any]:
    """Whole commands: the least of three runs, of which the first warms up, and the calls of bpf(2)."""
    found: dict[str, dict[str, int]] = {}
    orders: dict[str, tuple[str | Path, ...]] = {
        "python3 -c pass": (sys.executable, "-c", "pass"),
        **{
            f"uffdguard {words}": (COMMAND, *words.split())
            for words in ("--help", "start --mode kvm", "mode", "status", "mode disabled", "stop")
        },
    }
    with bpf_calls() as number:
        for _ in range(3):
            for name, command in orders.items():
                before = number()
                taken = spent(*command)
                least = min(taken, found[name]["instructions"] if name in found else taken)
                found[name] = {"instructions": least, "bpf": number() - before}
    return found


@contextlib.contextmanager
def bpf_calls() -> Iterator[Callable[[], int]]:
    """Count the calls of bpf(2) of all processes."""
    tracing = Path("/sys/kernel/tracing")
    if not (tracing / "events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", tracing], check=True)
    event = tracing / "events/syscalls/sys_enter_bpf"
    (event / "trigger").write_text("hist:keys=__syscall_nr\n")
    try:
        yield lambda: sum(map(int, re.findall(r"} hitcount: +([0-9]+)", (event / "hist").read_text())))
    finally:
        (event / "trigger").write_text("!hist:keys=__syscall_nr\n")


@part
def memory() -> dict[str, Any]:
    """What stays in memory, in bytes: programs and maps, as the kernel accounts them, and two of our processes."""
    with policy(Mode.KVM):
        with state.pinned() as found:
            maps = {layout.map_name(name): name for name in state.PARTS if name not in state.USES}
            maps |= {name: name.split(".")[-1] for name in ("windows", "refused", ".data.seen")}
            taken = {}
            for name, fd in libbpf.maps_of(found.programs["decide"], maps).items():
                taken[f"map {name}"] = memlock(fd)
                os.close(fd)
            for name, program in found.programs.items():
                fd = libbpf.library().bpf_prog_get_fd_by_id(program.id)
                taken[f"program {name}"] = memlock(fd)
                os.close(fd)
        with subprocess.Popen([COMMAND, "knob"]) as knob:
            while not (pid := state.server()) or not native.is_covered():
                time.sleep(0.1)
            native.FILE.read_text()
            taken["knob, resident"] = resident(pid)
            with subprocess.Popen([COMMAND, "watch", "--all"], stdout=subprocess.PIPE) as watch:
                assert watch.stdout
                with background("-r", "10", "userfaultfd"):
                    watch.stdout.readline()
                taken["watch, resident"] = resident(watch.pid)
                watch.kill()
            guard.stop()
            knob.terminate()
    return taken


def resident(pid: int) -> int:
    """Return how much memory a process has."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def memlock(fd: int) -> int:
    """Return what the kernel accounts for a map or a program."""
    return int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("memlock:")[1].split()[0])


@part
def versions() -> dict[str, str]:
    """What all this was measured on."""
    return {
        "kernel": Path("/proc/version").read_text().split("Debian ")[-1].split()[0],
        "release": os.uname().release,
        "lsm": (features.SECURITYFS / "lsm").read_text(),
        "python": platform.python_version(),
    }


def prepare() -> None:
    """Put build/measure where it is on a tmpfs, and let everybody use the devices and the system call."""
    shutil.copy(BUILD / "measure", MEASURE)
    native.DEV_KVM.chmod(0o666)
    native.DEV_USERFAULTFD.chmod(0o666)
    native.FILE.write_text("1\n")
    # Where enough slabs of a kind are in part used, the kernel gives back each that is empty, and takes it anew: 546
    # instructions a call, in some runs and not in others.
    for file in Path("/sys/kernel/slab").glob("*/min_partial"):
        file.write_text("1000\n")
    # Where the stack and the mappings are decides how many page tables a fork copies: 4 % of what it costs.
    Path("/proc/sys/kernel/randomize_va_space").write_text("0\n")


if __name__ == "__main__":
    prepare()
    for name in sys.argv[1:]:
        print(json.dumps({name: PARTS[name]()}), flush=True)
