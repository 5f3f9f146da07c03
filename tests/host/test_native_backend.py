"""The backend native where it is for: on a kernel without bpf among its LSMs. A VM is booted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WITHOUT_BPF = "lsm=landlock,lockdown,yama,integrity,apparmor"
#: What needs the backend lsm is skipped there, and what is killed at each step is tried in tests/vm.
TESTS = (
    "tests/vm/test_native_backend.py",
    "tests/clients/test_native_postcopy.py",
    "-k",
    "not TestKilled and not TestStop",
)


@pytest.mark.timeout(1800)
def test_it_decides_and_qemu_migrates_by_it_where_bpf_is_not_among_the_lsms() -> None:
    command = [BIN / "uffdguard", "lab", "--kernel", "6.12", "--memory", "2G", "--append", WITHOUT_BPF, "--"]
    done = subprocess.run([*map(str, command), str(BIN / "pytest"), *TESTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # So that it was such a kernel: this test runs on no other.
    assert "SKIPPED" in done.stdout
    assert "bpf is not among the LSMs of this kernel" in done.stdout
    assert "bpf is among the LSMs of this kernel" not in done.stdout
