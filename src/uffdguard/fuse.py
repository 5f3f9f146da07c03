"""A file system of one regular file, its root, served to the kernel by the protocol of /dev/fuse.

The protocol is that of include/uapi/linux/fuse.h. No library is between, so that a connection outlives its server:
whoever has a descriptor of it can go on where the last server ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
from enum import IntEnum
from pathlib import Path
from typing import Protocol

DEV_FUSE = Path("/dev/fuse")
FUSE_DEV_IOC_CLONE = 0x8004E500

#: The version that is spoken, of Linux 5.4. Newer kernels keep to the older of the two.
MAJOR, MINOR = 7, 31
#: Bytes that a write may have; what is longer comes in parts. The kernel allows no less.
MAX_WRITE = 4096
#: Bytes of the largest request: FUSE_MIN_READ_BUFFER, the least that the kernel lets a server read with.
LARGEST = 8192
#: Seconds for which the kernel may keep the attributes, which never change.
FOR_EVER = 1 << 31

FOPEN_DIRECT_IO, FOPEN_NOFLUSH = 1, 32
FUSE_WRITE_CACHE = 1
FATTR_MODE, FATTR_UID, FATTR_GID = 1, 2, 4


class Opcode(IntEnum):
    """What the kernel asks for; ``enum fuse_opcode``, as far as it is answered here."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    DESTROY = 38
    BATCH_FORGET = 42


#: ``struct fuse_in_header`` and ``struct fuse_out_header``.
REQUEST = struct.Struct("=IIQQIIIHH")
ANSWER = struct.Struct("=IiQ")
#: The start of ``struct fuse_open_in`` and of ``struct fuse_setattr_in``.
FLAGS = struct.Struct("=I4x")
#: ``struct fuse_read_in`` and ``struct fuse_write_in``: offset, size, the flags of a write.
TRANSFER = struct.Struct("=8xQII16x")
#: ``struct fuse_init_out``, ``struct fuse_open_out``, ``struct fuse_write_out``, ``struct fuse_kstatfs``.
INIT = struct.Struct("=IIIIHHIIHH32x")
OPEN = struct.Struct("=QI4x")
WRITTEN = struct.Struct("=I4x")
STATFS = struct.Struct("=40xII32x")
#: ``struct fuse_attr_out``: for how many seconds, inode number, mode, links; all else is 0.
ATTRIBUTES = struct.Struct("=Q8xQ52xII20x")


class File(Protocol):
    """The file that is served. Each method may raise an OSError, whose errno the caller gets."""

    def read(self) -> bytes:
        """Return all of the content."""

    def check_writer(self, thread: int) -> None:
        """Make sure that THREAD, by its id in the pid namespace of the mount, may write."""

    def write(self, data: bytes, offset: int, thread: int) -> None:
        """Take all of what a thread writes."""


def clone(connection: int, device: int) -> bool:
    """Let DEVICE, a fresh descriptor of /dev/fuse, be of the same CONNECTION; tell whether that is mounted already.

    What is read by a descriptor and not answered fails when that is closed. Whoever keeps another one meanwhile keeps
    the connection, and nobody waits for an answer that will not come.

    :raises OSError: with the kernel's errno.
    """
    try:
        fcntl.ioctl(device, FUSE_DEV_IOC_CLONE, connection.to_bytes(4, "little"))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):  # EPERM: newer kernels
            raise
        return False
    os.set_blocking(device, False)
    return True


def is_alive(connection: int) -> bool:
    """Tell whether a descriptor of /dev/fuse belongs to something that is still mounted, in whatever namespace."""
    poll = select.poll()
    poll.register(connection, 0)
    return not poll.poll(0)  # POLLERR where it does not


def serve_one(device: int, file: File) -> bool:
    """Take a request, if there is one, and answer it; tell whether the connection goes on."""
    try:
        request = os.read(device, LARGEST)
    except OSError as error:
        # Nothing asked; or what did was interrupted before it was read.
        return error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT)
    if reply := answer(request, file):
        try:
            os.write(device, reply)
        except OSError as error:
            if error.errno != errno.ENOENT:  # nobody waits for it any more
                raise
    return True


def answer(request: bytes, file: File) -> bytes:
    """Return the answer to a request, or nothing where the kernel wants none."""
    _, opcode, unique, _, _, _, thread, _, _ = REQUEST.unpack_from(request)
    if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
        return b""
    try:
        body, number = _answer(opcode, thread, request[REQUEST.size :], file), 0
    except OSError as error:
        body, number = b"", error.errno or errno.EIO
    except struct.error:
        body, number = b"", errno.EINVAL
    return ANSWER.pack(ANSWER.size + len(body), -number, unique) + body


def _answer(opcode: int, thread: int, body: bytes, file: File) -> bytes:
    match opcode:
        case Opcode.INIT:
            # No options. By FUSE_ASYNC_DIO a write could go on while its thread becomes another program.
            return INIT.pack(MAJOR, MINOR, 0, 0, 0, 0, MAX_WRITE, 1, 0, 0)
        case Opcode.GETATTR:
            return _attributes()
        case Opcode.SETATTR:
            (changes,) = FLAGS.unpack_from(body)
            # As to a file of /proc/sys. What a shell truncates before it writes has no size.
            if changes & (FATTR_MODE | FATTR_UID | FATTR_GID):
                raise PermissionError(errno.EPERM, "fixed")
            return _attributes()
        case Opcode.OPEN:
            (flags,) = FLAGS.unpack_from(body)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                file.check_writer(thread)
            # Each read and write comes here: what is read is always the truth.
            return OPEN.pack(0, FOPEN_DIRECT_IO | FOPEN_NOFLUSH)
        case Opcode.READ:
            offset, size, _ = TRANSFER.unpack_from(body)
            return file.read()[offset : offset + size]
        case Opcode.WRITE:
            offset, size, flags = TRANSFER.unpack_from(body)
            if flags & FUSE_WRITE_CACHE:  # who wrote it is not known
                raise PermissionError(errno.EPERM, "from a cache")
            file.check_writer(thread)
            file.write(body[TRANSFER.size : TRANSFER.size + size], offset, thread)
            return WRITTEN.pack(size)
        case Opcode.STATFS:
            return STATFS.pack(4096, 255)
        case Opcode.FLUSH | Opcode.RELEASE | Opcode.DESTROY:
            return b""
    # Of an operation that is not there the kernel does not ask again, and does what it can without; so it is for an
    # INTERRUPT, where the answer to what was interrupted is on its way.
    raise OSError(errno.ENOSYS, "not there")


def _attributes() -> bytes:
    return ATTRIBUTES.pack(FOR_EVER, 1, stat.S_IFREG | 0o644, 1)
