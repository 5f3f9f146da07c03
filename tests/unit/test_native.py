"""What is read of the kernel's own files."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from uffdguard.errors import Failure
from uffdguard.kernel import native

if TYPE_CHECKING:
    from pathlib import Path

ROW = b"63 43 0:39 %s %s rw,relatime shared:1 - %s %s rw\n"
COVER = ROW % (b"/", bytes(native.FILE), native.COVER.encode(), b"uffdguard")


@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        b"/\xff",
        b"/a\x1cb",
        b"/a\x0b\x0c\r",
        b"/a\xc2\x85\xe2\x80\xa8",
        b"/\xc2\xa0",
        rb"/a\040-\040b",
        bytes(native.FILE),
    ],
)
def test_a_mount_of_any_name_does_not_hide_or_feign_the_interface_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, covered: bool
) -> None:
    """Of a name the kernel escapes blank, tab, newline and backslash: fs/proc_namespace.c, show_mountinfo()."""
    monkeypatch.setattr(native, "MOUNTS", tmp_path / "mountinfo")
    native.MOUNTS.write_bytes(ROW % (name, name, b"fuse.x", name) + COVER * covered)
    assert native.is_covered() == covered


@pytest.mark.parametrize("member", [False, True])
def test_who_may_not_join_the_group_of_our_directories_is_told(monkeypatch: pytest.MonkeyPatch, member: bool) -> None:
    def refuse(groups: list[int]) -> None:
        raise PermissionError

    monkeypatch.setattr("os.setgroups", refuse)
    monkeypatch.setattr("os.getgroups", lambda: [native.OWNER] * member)
    with contextlib.nullcontext() if member else pytest.raises(Failure, match="no CAP_SETGID; run it as root"):
        native.join_owner()
