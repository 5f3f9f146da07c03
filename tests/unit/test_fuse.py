"""What the kernel asks of the server of the interface file, and what it gets: bytes of linux/fuse.h."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest

from uffdguard import fuse

FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 2, 3, 4, 14, 15, 16, 17, 18
FSYNC, GETXATTR, FLUSH, INIT, INTERRUPT, DESTROY, IOCTL, POLL, BATCH_FORGET, LSEEK = (
    20,
    22,
    25,
    26,
    36,
    38,
    39,
    40,
    42,
    46,
)
UNIQUE = 0x1122334455667788
WRITER, STRANGER = 4711, 4712


class File:
    """What one thread may write, and all may read."""

    def __init__(self) -> None:
        self.written: list[tuple[bytes, int]] = []

    def read(self) -> bytes:
        return b"disabled enabled [kvm]\n"

    def check_writer(self, thread: int) -> None:
        if thread != WRITER:
            raise PermissionError(errno.EPERM, "")

    def write(self, data: bytes, offset: int, thread: int) -> None:
        if data != b"kvm\n":
            raise OSError(errno.EINVAL, "")
        self.written.append((data, offset))


@pytest.fixture
def file() -> File:
    return File()


def request(opcode: int, body: bytes = b"", *, thread: int = WRITER) -> bytes:
    """struct fuse_in_header, and what follows it."""
    return struct.pack("=IIQQIIIHH", 40 + len(body), opcode, UNIQUE, 1, 0, 0, thread, 0, 0) + body


def ask(file: File, opcode: int, body: bytes = b"", *, thread: int = WRITER) -> tuple[int, bytes]:
    """Return the error and what follows struct fuse_out_header."""
    reply = fuse.answer(request(opcode, body, thread=thread), file)
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert (length, unique) == (len(reply), UNIQUE)
    assert not error or length == 16
    return -error, reply[16:]


def transfer(offset: int, size: int, flags: int = 0) -> bytes:
    """struct fuse_read_in, and struct fuse_write_in."""
    return struct.pack("=QQIIQII", 0, offset, size, flags, 0, 0, 0)


@pytest.mark.parametrize("version", [(7, 31), (7, 37), (7, 46), (8, 0)])
def test_the_first_answer_is_the_version_and_no_option(file: File, version: tuple[int, int]) -> None:
    error, body = ask(file, INIT, struct.pack("=IIII48x", *version, 131072, 0xFFFFFFFF))
    assert (error, len(body)) == (0, 64)
    major, minor, readahead, flags, background, congestion, max_write, grain = struct.unpack_from("=IIIIHHII", body)
    assert (major, minor, readahead, flags, background, congestion, max_write, grain) == (7, 31, 0, 0, 0, 0, 4096, 1)
    assert body[28:] == bytes(36)


def test_the_attributes_are_those_of_a_file_that_root_may_write(file: File) -> None:
    error, body = ask(file, GETATTR, bytes(16))
    assert (error, len(body)) == (0, 104)
    numbers = struct.unpack("=QII6Q10I", body)
    inode, size, *times = numbers[3:9]
    mode, links, uid, gid = numbers[12:16]
    assert (inode, size, set(times)) == (1, 0, {0})
    assert (mode, links, uid, gid) == (stat.S_IFREG | 0o644, 1, 0, 0)


@pytest.mark.parametrize("valid", [0x8, 0x10, 0x8 | 0x40 | 0x200])
def test_a_shell_may_truncate_and_touch_may_touch(file: File, valid: int) -> None:
    assert ask(file, SETATTR, struct.pack("=I84x", valid)) == ask(file, GETATTR)


@pytest.mark.parametrize("valid", [1, 2, 4, 9])
def test_mode_and_owner_are_fixed(file: File, valid: int) -> None:
    assert ask(file, SETATTR, struct.pack("=I84x", valid)) == (errno.EPERM, b"")


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDONLY | os.O_NONBLOCK])
def test_everybody_may_open_to_read_without_a_cache(file: File, flags: int) -> None:
    assert ask(file, OPEN, struct.pack("=II", flags, 0), thread=STRANGER) == (0, struct.pack("=QII", 0, 33, 0))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, 3])
def test_only_a_writer_may_open_to_write(file: File, flags: int) -> None:
    assert ask(file, OPEN, struct.pack("=II", flags, 0))[0] == 0
    assert ask(file, OPEN, struct.pack("=II", flags, 0), thread=STRANGER) == (errno.EPERM, b"")


def test_reads_are_parts_of_the_content(file: File) -> None:
    assert ask(file, READ, transfer(0, 4096)) == (0, b"disabled enabled [kvm]\n")
    assert ask(file, READ, transfer(9, 7)) == (0, b"enabled")
    assert ask(file, READ, transfer(23, 4096)) == (0, b"")
    assert ask(file, READ, transfer(1 << 63, 4096)) == (0, b"")


def test_a_write_is_answered_with_its_size(file: File) -> None:
    assert ask(file, WRITE, transfer(0, 4) + b"kvm\n") == (0, struct.pack("=II", 4, 0))
    assert file.written == [(b"kvm\n", 0)]
    assert ask(file, WRITE, transfer(0, 3) + b"kmv") == (errno.EINVAL, b"")


def test_only_a_writer_writes_also_by_the_descriptor_of_another_and_not_from_a_cache(file: File) -> None:
    assert ask(file, WRITE, transfer(0, 4) + b"kvm\n", thread=STRANGER) == (errno.EPERM, b"")
    assert ask(file, WRITE, transfer(0, 4, 1) + b"kvm\n") == (errno.EPERM, b"")
    assert file.written == []


def test_the_file_system_has_a_size_of_a_block_and_nothing_else(file: File) -> None:
    error, body = ask(file, STATFS)
    assert (error, struct.unpack("=5Q4I6I", body)) == (0, (0,) * 5 + (4096, 255, 0, 0) + (0,) * 6)


@pytest.mark.parametrize("opcode", [RELEASE, FLUSH, DESTROY])
def test_an_end_is_fine(file: File, opcode: int) -> None:
    assert ask(file, opcode, bytes(24)) == (0, b"")


@pytest.mark.parametrize("opcode", [FORGET, BATCH_FORGET])
def test_nothing_is_said_where_the_kernel_does_not_want_it(file: File, opcode: int) -> None:
    assert fuse.answer(request(opcode, bytes(8)), file) == b""


@pytest.mark.parametrize("opcode", [0, 1, 13, FSYNC, GETXATTR, INTERRUPT, IOCTL, POLL, LSEEK, 47, 52, 4096, 0xFFFFFFFF])
def test_all_else_is_not_there(file: File, opcode: int) -> None:
    assert ask(file, opcode, bytes(40)) == (errno.ENOSYS, b"")


@pytest.mark.parametrize("opcode", [SETATTR, OPEN, READ, WRITE])
def test_what_is_cut_off_is_an_error(file: File, opcode: int) -> None:
    assert ask(file, opcode, b"\1\0\0") == (errno.EINVAL, b"")


def test_a_device_that_is_no_connection_is_not_alive() -> None:
    if not fuse.DEV_FUSE.exists():
        pytest.skip("no FUSE here")
    with fuse.DEV_FUSE.open("r+b", buffering=0) as one, fuse.DEV_FUSE.open("r+b", buffering=0) as other:
        assert not fuse.is_alive(one.fileno())
        assert not fuse.clone(one.fileno(), other.fileno())
