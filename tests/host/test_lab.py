"""The lab as its user meets it: a VM is booted for each of these."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from uffdguard.lab import kernels

LAB = [str(Path(sys.executable).with_name("uffdguard")), "lab"]


@pytest.fixture(autouse=True, scope="module")
def kernel() -> None:
    """Have the kernel in the cache: to fetch one is told on standard error."""
    kernels.get("6.12")


def lab(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAB, *words], capture_output=True, text=True, **options)


def processes_with(mark: str) -> list[str]:
    """Return the command lines on this machine that have MARK in them."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line:
            lines.append(line)
    return lines


def descendants(pid: int) -> list[str]:
    """Return the processes below PID."""
    below: list[str] = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        below += [child, *descendants(int(child))]
    return below


def test_a_command_runs_as_root_on_the_kernel_asked_for_with_kvm_and_what_it_says_comes_through() -> None:
    script = "printf 'one\\ntwo'; echo wrong >&2; echo; id -u; uname -r; test -c /dev/kvm && echo kvm; read x || exit 7"
    done = lab("--kernel", "6.12", "--", "sh", "-c", script, input="not for the command")
    one, two, user, release, kvm = done.stdout.splitlines()
    assert (one, two, user, kvm) == ("one", "two", "0", "kvm")
    assert release.startswith("6.12.")
    assert (done.stderr, done.returncode) == ("wrong\n", 7)


def test_what_a_command_writes_is_gone_with_the_vm(tmp_path: Path) -> None:
    path = tmp_path / "written"
    assert lab("--", "sh", "-c", f"echo x > {path} && cat {path}").stdout == "x\n"
    assert not path.exists()


def test_a_command_runs_below_var_tmp_and_an_ordinary_user_gets_there() -> None:
    """virtme-ng has an empty /var/tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder, "here").write_text("seen\n")
        words = ["sh", "-c", "setpriv --reuid 1000 --clear-groups cat here && touch more && ls"]
        done = lab("--", *words, cwd=folder)
        assert (done.stdout, done.stderr, done.returncode) == ("seen\nhere\nmore\n", "", 0)
        assert not Path(folder, "more").exists()


def test_where_the_vm_cannot_show_the_directory_nothing_is_booted() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        done = lab("--", "true", cwd=folder)
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 1, 1)
    assert done.stderr.startswith(f"uffdguard: lab: {folder} cannot be seen in the VM")


def test_a_module_that_is_not_signed_with_the_kernels_own_key_is_not_loaded() -> None:
    script = "modprobe dummy && rmmod dummy && xz -dc $(modinfo -n dummy) | head -c -1 >/tmp/x.ko && ! insmod /tmp/x.ko"
    done = lab("--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Key was rejected" in done.stderr


def test_a_vm_that_counts_instructions_has_one_cpu() -> None:
    assert lab("--count-instructions", "--", "nproc").stdout == "1\n"


def test_a_vm_is_ended_when_its_time_is_over_and_the_kernel_log_is_shown() -> None:
    done = lab("--timeout", "15", "--", "sleep", "1000")
    assert (done.returncode, done.stdout) == (124, "")
    *messages, last = done.stderr.splitlines()
    assert any("virtme" in line for line in messages)
    log = Path(last.removeprefix("uffdguard: lab: not done after 15 s; kernel log: "))
    assert "Linux version 6.12" in log.read_text()
    # QEMU was given this directory.
    assert not processes_with(str(log.parent))
    shutil.rmtree(log.parent)


def test_a_kernel_that_panics_is_told_with_its_last_words() -> None:
    done = lab("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100")
    assert done.returncode == 1
    assert "Kernel panic" in done.stderr
    words = "uffdguard: lab: the VM ended before COMMAND did; kernel log: "
    assert done.stderr.splitlines()[-1].startswith(words)
    shutil.rmtree(Path(done.stderr.splitlines()[-1].removeprefix(words)).parent)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_a_lab_that_is_interrupted(number: signal.Signals) -> None:
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [*LAB, "--", "sh", "-c", "echo ready; sleep 1000"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            # Whoever runs us in the background may have it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        below = descendants(process.pid)
        assert any("qemu" in Path("/proc", pid, "comm").read_text() for pid in below)
        process.send_signal(number)
        assert process.wait(30) != 0
        process.stdout.close()
    end = time.monotonic() + 10
    while left := [pid for pid in below if Path("/proc", pid).exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
