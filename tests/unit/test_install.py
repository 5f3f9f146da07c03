"""What install puts in place and uninstall takes away, below a directory of the test's own."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import Killer, forked, watched

from uffdguard import config, install
from uffdguard.cli.install import completion
from uffdguard.errors import Failure
from uffdguard.kernel import features, native
from uffdguard.policy import Mode, Policy
from uffdguard.steps import beside

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = Path("/opt/uffdguard/bin/uffdguard")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MANIFEST", "UNITS", "PAGES", "COMPLETION"):
        path: Path = getattr(install, name)
        monkeypatch.setattr(install, name, tmp_path / path.relative_to("/"))
    monkeypatch.setattr(config, "DEFAULT", tmp_path / "usr/lib/uffdguard.toml")
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "etc/uffdguard.toml")
    monkeypatch.setattr(config, "DROP_INS", tmp_path / "etc/uffdguard.d")
    monkeypatch.setattr(install, "_systemctl", lambda *words: None)
    monkeypatch.setattr(native, "need_root", lambda what: None)
    monkeypatch.setattr(native, "has_kvm", lambda: True)
    monkeypatch.setattr(features, "OLDEST", (0, 0))
    return tmp_path


def written(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text(errors="backslashreplace")
        for path in root.rglob("*")
        if path.is_file()
    }


def test_everything_is_put_in_place_and_taken_away(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    files = written(root)
    assert set(files) == {
        "etc/systemd/system/uffdguard-knob.service",
        "etc/systemd/system/uffdguard-log.service",
        "etc/systemd/system/uffdguard.service",
        "usr/lib/uffdguard.toml",
        "usr/local/share/bash-completion/completions/uffdguard",
        "usr/local/share/man/man5/uffdguard.toml.5",
        "usr/local/share/man/man7/unprivileged_userfaultfd.7",
        "usr/local/share/man/man8/uffdguard.8",
        "var/lib/uffdguard/installed.json",
    }
    for name in install.NAMES:
        unit = files[f"etc/systemd/system/{name}"]
        assert f"={COMMAND} " in unit
        assert "/usr/bin/" not in unit
    assert config.load().policy == Policy(Mode.KVM)
    assert install.uninstall() == []
    assert written(root) == {}


def test_nothing_is_put_in_place_on_a_kernel_that_is_too_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "OLDEST", (99, 0))
    with pytest.raises(Failure, match=r"is older than Linux 99\.0; boot Linux 99\.0 or newer"):
        install.install(COMMAND, Mode.KVM, completion())
    assert written(root) == {}


def test_it_can_be_repeated_with_another_mode(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    install.install(COMMAND, Mode.ENABLED, completion())
    assert config.load().policy == Policy(Mode.ENABLED)
    install.uninstall()
    assert written(root) == {}


def test_a_file_of_somebody_else_is_not_written_over(root: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/uffdguard.toml").write_bytes(b'mode = "enabled" # \xe4\n')
    with pytest.raises(Failure, match=r"not put there by us, or changed since: .*uffdguard\.toml; move it away"):
        install.install(COMMAND, Mode.KVM, completion())
    assert written(root) == {"usr/lib/uffdguard.toml": 'mode = "enabled" # \\xe4\n'}


def test_a_file_that_was_changed_is_left_and_named(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    config.DEFAULT.write_text('mode = "disabled"\n')
    assert install.uninstall() == [str(config.DEFAULT)]
    assert list(written(root)) == ["usr/lib/uffdguard.toml"]


def killed_at(number: int, job: Callable[[], object]) -> bool:
    """Do JOB in a process that is killed before its step of this NUMBER; tell whether it came to that."""

    def doomed() -> None:
        with watched(Killer(number)):
            job()

    status = os.waitstatus_to_exitcode(os.waitpid(forked(doomed), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def fresh() -> None:
    install.install(COMMAND, Mode.KVM, completion())


def again() -> None:
    install.install(COMMAND, Mode.ENABLED, completion())


def test_the_steps_are_those_that_are_taken(root: Path) -> None:
    """So that the test below, which kills at each, leaves none out."""
    with watched(Killer()) as seen:
        fresh()
        install.uninstall()
    assert tuple(dict.fromkeys(seen)) == install.STEPS


@pytest.mark.parametrize("mended_by", [again, install.uninstall])
@pytest.mark.parametrize(("before", "job"), [(None, fresh), (fresh, again), (fresh, install.uninstall)])
def test_a_kill_at_any_step_is_mended_by_install_and_by_uninstall(
    root: Path, before: Callable[[], None] | None, job: Callable[[], object], mended_by: Callable[[], object]
) -> None:
    for number in itertools.count():
        if before:
            before()
        killed = killed_at(number, job)
        if job is again:  # so that the next boot finds them
            assert all((install.UNITS / name).exists() for name in install.NAMES)
        with contextlib.suppress(Failure):  # there was nothing to uninstall
            mended_by()
        if mended_by is again:
            assert config.load().policy == Policy(Mode.ENABLED)
            assert len(written(root)) == 9
            assert install.uninstall() == []
        assert written(root) == {}
        if not killed:
            break
    assert number >= len(install.NAMES) + 4


def test_what_a_kill_has_left_of_a_file_is_taken_away(root: Path) -> None:
    fresh()
    for path in (install.UNITS / install.NAMES[0], config.DEFAULT):
        beside(path).write_text("half of")
    assert install.uninstall() == []
    assert written(root) == {}


@pytest.mark.parametrize(
    "content", [b'{"/etc', b'{"/etc": 1}', b"[]", b"[" * 2000, b"\xff", b'{"": []}', b'{"/": []}', b'{"/a\\u0000": []}']
)
def test_a_list_that_cannot_be_read_is_told(root: Path, content: bytes) -> None:
    install.MANIFEST.parent.mkdir(parents=True)
    install.MANIFEST.write_bytes(content)
    for job in (install.uninstall, lambda: install.install(COMMAND, Mode.KVM, "")):
        with pytest.raises(Failure, match=r"installed\.json cannot be read"):
            job()
    assert list(written(root)) == ["var/lib/uffdguard/installed.json"]


def test_there_is_nothing_to_uninstall_where_nothing_was_installed() -> None:
    with pytest.raises(Failure, match="nothing was put in place"):
        install.uninstall()
