"""What is read of the kernel's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdguard.kernel import native

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.binary(max_size=20) | st.sampled_from([bytes(native.FILE)[1:], native.COVER.encode()])


def escaped(name: bytes) -> bytes:
    """Return NAME as mountinfo has it: fs/proc_namespace.c, show_mountinfo()."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in name)


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proc") / "mountinfo"


@given(rows=st.lists(st.tuples(NAMES, NAMES, NAMES)), covered=st.booleans())
def test_mounts_of_any_name_do_not_hide_or_feign_the_interface_file(
    mounts: Path, rows: list[tuple[bytes, bytes, bytes]], covered: bool
) -> None:
    lines = [(b"/" + root, b"/" + place, b"tmpfs", source) for root, place, source in rows]
    if covered:
        lines.insert(len(rows) // 2, (b"/", bytes(native.FILE), native.COVER.encode(), b"uffdguard"))
    line = b"63 43 0:39 %s %s rw,relatime shared:1 - %s %s rw\n"
    mounts.write_bytes(b"".join(line % tuple(map(escaped, names)) for names in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MOUNTS", mounts)
        assert native.is_covered() == covered
