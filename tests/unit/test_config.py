"""The configuration files: which wins, and what a mistake is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uffdguard import config
from uffdguard.errors import Failure
from uffdguard.policy import Backend, Mode, Policy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the files below a directory of the test's own."""
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(config, "DEFAULT", tmp_path / "default.toml")
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "administrator.toml")
    monkeypatch.setattr(config, "DROP_INS", tmp_path / "d")
    return tmp_path


def test_no_file_means_disabled_and_deny() -> None:
    assert config.load().policy == Policy(Mode.DISABLED, user_mode_only=False)


def test_the_backend_is_lsm_unless_a_file_says_native(root: Path) -> None:
    assert config.load().backend is Backend.LSM
    (root / "administrator.toml").write_text('backend = "native"\n')
    assert config.load().backend is Backend.NATIVE


def test_the_backend_native_is_refused_what_it_cannot_keep_where_a_file_says_it_in_so_many_words(root: Path) -> None:
    config.load().check(Backend.NATIVE)
    for text, words in (('user-mode-only = "deny"', "user-mode-only"), ("enforce = false", "enforce = false")):
        (root / "administrator.toml").write_text(text)
        config.load().check(Backend.LSM)
        with pytest.raises(Failure, match=f"the backend native cannot keep {words}"):
            config.load().check(Backend.NATIVE)


def test_the_later_file_wins_key_by_key(root: Path) -> None:
    (root / "default.toml").write_text('mode = "enabled"\nuser-mode-only = "allow"\n')
    assert config.load().policy == Policy(Mode.ENABLED, user_mode_only=True)
    (root / "administrator.toml").write_text('mode = "disabled"\n')
    assert config.load().policy == Policy(Mode.DISABLED, user_mode_only=True)
    (root / "d/20.toml").write_text('mode = "kvm"\n')
    (root / "d/10.toml").write_text('mode = "enabled"\nuser-mode-only = "deny"\n')
    (root / "d/30.toml.dpkg-old").write_text("not even TOML")
    assert config.load().policy == Policy(Mode.KVM, user_mode_only=False)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('mode = "kmv"', 1, "mode: must be one of disabled, enabled, kvm"),
        ("\n\nmode = 1", 3, "mode: must be one of disabled, enabled, kvm"),
        ('# mode\n"mode" = []', 2, "mode: must be one of disabled, enabled, kvm"),
        ('mode = "kvm"\nuser-mode-only = true', 2, "user-mode-only: must be one of deny, allow"),
        ('user_mode_only = "allow"', 1, "user_mode_only: no such key; there are mode, user-mode-only, numeric"),
        ('mode = "unknown field `x`"', 1, "mode: must be one of disabled, enabled, kvm"),
        ('mode = "kvm"\n\n[policy]\nmode = "kvm"', 3, "policy: no such key"),
    ],
)
def test_a_mistake_is_told_with_file_line_and_key(root: Path, text: str, line: int, words: str) -> None:
    (root / "d/10.toml").write_text(text)
    with pytest.raises(Failure) as failure:
        config.load()
    assert f"{root}/d/10.toml, line {line}: {words}" in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "content",
    [
        b"mode = kvm",
        b'mode = "kvm',
        b"\xff\xfe",
        b'mode = "kvm"\nmode = "kvm"',
        b'# a comment \rmode = "enabled"',
        b"a = " + b"9" * 5000,
        b"a = " + b"[" * 2000,
    ],
    ids=range(7),
)
def test_what_is_not_toml_is_told_with_the_file(root: Path, content: bytes) -> None:
    (root / "administrator.toml").write_bytes(content)
    with pytest.raises(Failure, match=r"administrator\.toml: ") as failure:
        config.load()
    assert "nothing was changed" in str(failure.value)


def test_a_key_with_a_newline_is_told_on_one_line(root: Path) -> None:
    (root / "administrator.toml").write_bytes(rb'"a\n\u001b[2J" = 1')
    with pytest.raises(Failure, match=r"administrator\.toml: a\\n\\x1b\[2J: no such key"):
        config.load()


def test_a_file_that_cannot_be_read_is_an_error_and_not_the_default(root: Path) -> None:
    (root / "administrator.toml").mkdir()
    with pytest.raises(Failure, match=r"cannot read .*administrator\.toml: Is a directory"):
        config.load()
    (root / "administrator.toml").rmdir()
    (root / "d/10.toml").symlink_to(root / "nowhere")
    with pytest.raises(Failure, match=r"cannot read .*10\.toml: No such file"):
        config.load()
