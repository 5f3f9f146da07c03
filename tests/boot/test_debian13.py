"""Debian 13, from a fresh clone on: the set-up, the demo, and the package on a machine that has booted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import readme
from boot import machines

from uffdguard.lab import kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Run = Callable[[str], str]

SUITE = "trixie"
CLONE = "root/uffdguard"
#: The certificates that this machine trusts, which pip asks the package index for its by.
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
#: Run with the root file system, the lab's kernels and a command.
ENTER = f"""
for name in dev proc sys; do mount --rbind /$name "$1/$name"; done
mount --bind "$2" "$1/root/.cache/uffdguard/kernels"
exec chroot "$1" env -i -C /{CLONE} HOME=/root LANG=C.UTF-8 TERM=dumb PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -ec "$3"
"""

pytestmark = pytest.mark.timeout(2 * machines.SECONDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a Debian 13 with what `git clone` and `make` need, and a clone of what is committed here."""
    root = tmp_path_factory.mktemp("debian") / "root"
    tools = ("ca-certificates", "git", "make", "python3")
    subprocess.run(["cp", "-a", machines.base(SUITE, tools), root], check=True)
    for file in (Path("etc/resolv.conf"), Path(CERTIFICATES)):
        shutil.copy("/" / file, root / file)
    (root / "root/.cache/uffdguard/kernels").mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", machines.ROOT, root / CLONE], check=True)
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    """Return a function that runs a command of a shell in the clone, and returns what it printed."""
    cached = kernels.cache() / "kernels"
    cached.mkdir(parents=True, exist_ok=True)

    def run(command: str) -> str:
        argv = ["unshare", "--mount", "sh", "-ec", ENTER, "sh", str(root), str(cached), command]
        return subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout

    return run


def test_the_set_up_is_done_and_the_unit_tests_pass(run: Run) -> None:
    assert " passed" in run("make test-unit").splitlines()[-1]


def test_the_demo_shows_what_the_readme_says_it_shows(run: Run) -> None:
    readme.check_demo(run("make demo"))


@pytest.fixture(scope="module")
def package(root: Path, run: Run) -> Path:
    run("make deb")
    (package,) = (root / CLONE / "dist").glob("uffdguard_*+debian13_amd64.deb")
    return package


def test_the_package_is_for_every_python_that_debian_13_may_come_to_have(package: Path) -> None:
    needed = subprocess.check_output(["dpkg-deb", "-f", package, "Depends"], text=True)
    assert "python3-msgspec" in needed
    assert "python3 (<<" not in needed


def test_the_package_is_installed_decides_and_is_removed(package: Path, tmp_path: Path) -> None:
    machines.make_disk(tmp_path, machines.base(SUITE, (*machines.BOOT, "python3-msgspec")), {"uffdguard.deb": package})
    facts = machines.boot(tmp_path, "smoke")
    assert facts["installed"] == "0"
    assert facts["units"] == "active;active;active"
    assert facts["file"] == "[disabled] enabled kvm"
    assert facts["status"] == "in force;kvm;served"
    assert facts["refused"] == "EPERM;EPERM"
    assert facts["allowed"] == "allowed;allowed;allowed"
    refused = "userfaultfd refused (no-kvm): actor, pid N, user stranger"
    assert facts["logged"] == ";".join([refused] * 2)
    assert (facts["removed"], facts["pins"]) == ("0;0", "")
