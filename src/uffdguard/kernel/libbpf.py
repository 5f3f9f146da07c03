"""The binding to ``libbpf.so.1``: only what is used, with libbpf's negative errnos as exceptions.

Every file descriptor that a function here returns belongs to the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import mmap
import os
import sys
import time
from ctypes import POINTER, byref, c_bool, c_char, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, TypeVar

from uffdguard.errors import Failure
from uffdguard.steps import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

T = TypeVar("T", bound=ctypes.Structure)

BPF_NOEXIST = 1
BPF_F_LOCK = 4
BPF_TRACE_FEXIT = 25
BTF_KIND_STRUCT, BTF_KIND_UNION, BTF_KIND_ENUM, BTF_KIND_FUNC = 4, 5, 6, 12


class ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info of include/uapi/linux/bpf.h, up to what is read of it."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_char * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),  # ns since boot, suspend included
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("_unused", c_uint64 * 14),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
        ("recursion_misses", c_uint64),
        ("verified_insns", c_uint32),
        ("attach_btf_obj_id", c_uint32),
        ("attach_btf_id", c_uint32),
    )


class MapInfo(ctypes.Structure):
    """struct bpf_map_info, likewise."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    )


class LinkInfo(ctypes.Structure):
    """struct bpf_link_info, likewise."""

    _fields_ = (("type", c_uint32), ("id", c_uint32), ("prog_id", c_uint32))


class _BtfType(ctypes.Structure):
    _fields_ = (("name_off", c_uint32), ("info", c_uint32), ("size_or_type", c_uint32))


NAME = "libbpf.so.1"

#: libbpf's own messages since the library was loaded, warnings only; the last ones explain a failure. Kept where
#: somebody debugs only: libbpf makes hundreds of others at each load, and to pass these over takes a third of its time.
messages: list[str] = []


def _collect(level: int, form: bytes, arguments: int) -> int:
    if level == 0:
        text = ctypes.create_string_buffer(1 << 16)
        ctypes.CDLL(None).vsnprintf(text, c_size_t(len(text)), form, c_void_p(arguments))
        messages.append(text.value.decode(errors="replace").rstrip())
    return 0


#: A reference that lasts as long as libbpf may call it.
_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)(_collect)


@functools.cache
def library() -> ctypes.CDLL:
    """Load libbpf 1.x.

    :raises Failure: the library is missing.
    """
    try:
        lib = ctypes.CDLL(NAME, use_errno=True)
    except OSError:
        raise Failure(
            f"{NAME} is missing: it loads the policy into the kernel",
            "install libbpf 1.0 or newer (Debian: apt install libbpf1)",
        ) from None
    pointers: dict[str, list[Any]] = {
        "bpf_object__open_file": [c_char_p, c_void_p],
        "bpf_object__find_program_by_name": [c_void_p, c_char_p],
        "bpf_object__find_map_by_name": [c_void_p, c_char_p],
        "bpf_object__next_program": [c_void_p, c_void_p],
        "bpf_object__btf": [c_void_p],
        "bpf_program__attach": [c_void_p],
        "bpf_program__attach_cgroup": [c_void_p, c_int],
        "bpf_program__attach_iter": [c_void_p, c_void_p],
        "bpf_program__name": [c_void_p],
        "btf__load_vmlinux_btf": [],
        "btf__type_by_id": [c_void_p, c_uint32],
        "btf__name_by_offset": [c_void_p, c_uint32],
    }
    ints: dict[str, list[Any]] = {
        "bpf_object__load": [c_void_p],
        "bpf_program__fd": [c_void_p],
        "bpf_program__set_autoload": [c_void_p, c_bool],
        "bpf_program__set_attach_target": [c_void_p, c_int, c_char_p],
        "bpf_map__fd": [c_void_p],
        "bpf_map__type": [c_void_p],
        "bpf_map__reuse_fd": [c_void_p, c_int],
        "bpf_map__value_size": [c_void_p],
        "bpf_map__max_entries": [c_void_p],
        "bpf_link__fd": [c_void_p],
        "bpf_link__destroy": [c_void_p],
        "bpf_obj_pin": [c_int, c_char_p],
        "bpf_obj_get": [c_char_p],
        "bpf_obj_get_info_by_fd": [c_int, c_void_p, POINTER(c_uint32)],
        "bpf_prog_get_fd_by_id": [c_uint32],
        "bpf_map_get_fd_by_id": [c_uint32],
        "bpf_iter_create": [c_int],
        "bpf_link_create": [c_int, c_int, c_int, c_void_p],
        "bpf_map_lookup_elem": [c_int, c_void_p, c_void_p],
        "bpf_map_lookup_elem_flags": [c_int, c_void_p, c_void_p, c_uint64],
        "bpf_map_update_elem": [c_int, c_void_p, c_void_p, c_uint64],
        "btf__find_by_name_kind": [c_void_p, c_char_p, c_uint32],
    }
    for name, arguments in pointers.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = c_void_p
    for name, arguments in ints.items():
        getattr(lib, name).argtypes = arguments
        getattr(lib, name).restype = c_int
    lib.bpf_program__name.restype = c_char_p
    lib.btf__name_by_offset.restype = c_char_p
    lib.bpf_object__close.argtypes = lib.btf__free.argtypes = [c_void_p]
    lib.bpf_object__close.restype = lib.btf__free.restype = None
    lib.libbpf_set_print(_PRINT if log.isEnabledFor(logging.DEBUG) else None)
    return lib


def _call(function: str, *arguments: Any) -> int:
    """Call a function that returns a negative errno, or a pointer that is NULL with errno set.

    :raises OSError: with the function's name as the message's start.
    """
    result = getattr(library(), function)(*arguments)
    if result is None or result < 0:
        number = ctypes.get_errno() if result is None else -result
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return int(result)


class Object:
    """An opened BPF object file; a context manager that closes it.

    What was attached stays attached as long as a descriptor or a pin of the link exists.
    """

    def __init__(self, path: Path) -> None:
        self._object = _call("bpf_object__open_file", bytes(path), None)

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        library().bpf_object__close(self._object)

    def programs(self) -> list[str]:
        """Return the names of the object's programs."""
        names, program = [], library().bpf_object__next_program(self._object, None)
        while program:
            names.append(library().bpf_program__name(program).decode())
            program = library().bpf_object__next_program(self._object, program)
        return names

    def only(self, program: str) -> None:
        """Let :meth:`load` load just this one program."""
        for name in self.programs():
            _call("bpf_program__set_autoload", self._program(name), name == program)

    def reuse(self, name: str, fd: int) -> None:
        """Use the existing map FD instead of making the map NAME."""
        _call("bpf_map__reuse_fd", self._map(name), fd)

    def load(self) -> None:
        """Make the maps and load the programs.

        :raises OSError: the kernel refused; :data:`messages` has its verifier's log.
        """
        _call("bpf_object__load", self._object)

    def attach(self, program: str) -> int:
        """Attach PROGRAM to the hook its section names; return the link's descriptor."""
        return self._detached(_call("bpf_program__attach", self._program(program)))

    def attach_cgroup(self, program: str, cgroup: int) -> int:
        """Attach PROGRAM to the control group CGROUP and those below it; return the link's descriptor."""
        return self._detached(_call("bpf_program__attach_cgroup", self._program(program), cgroup))

    def attach_iterator(self, program: str) -> int:
        """Return a link's descriptor by which :func:`iterate` runs PROGRAM, an iterator."""
        return self._detached(_call("bpf_program__attach_iter", self._program(program), None))

    def leave_out(self, program: str) -> None:
        """Let :meth:`load` load all but PROGRAM."""
        _call("bpf_program__set_autoload", self._program(program), False)

    def program_fd(self, program: str) -> int:
        """Return the descriptor of a loaded program, the object's own: valid until the object is closed."""
        return _call("bpf_program__fd", self._program(program))

    def aim(self, program: str, function: str) -> None:
        """Let PROGRAM be of another function than its section names; before :meth:`load`."""
        _call("bpf_program__set_attach_target", self._program(program), 0, function.encode())

    def run_iterator(self, program: str) -> bytes:
        """Run an iterator program once over everything it iterates; return what it wrote."""
        link = self.attach_iterator(program)
        try:
            return iterate(link)
        finally:
            os.close(link)

    def map_fd(self, name: str) -> int:
        """Return the descriptor of map NAME, the object's own: valid until the object is closed."""
        return _call("bpf_map__fd", self._map(name))

    def map_size(self, name: str) -> tuple[int, int]:
        """Return the size of a value in bytes and the number of entries of map NAME."""
        return _call("bpf_map__value_size", self._map(name)), _call("bpf_map__max_entries", self._map(name))

    def fits(self, name: str, fd: int) -> bool:
        """Tell whether the existing map FD is of the type and size of map NAME."""
        found = info(fd, MapInfo)
        wanted = (_call("bpf_map__type", self._map(name)), *self.map_size(name))
        return (found.type, found.value_size, found.max_entries) == wanted

    def enumerators(self, name: str) -> dict[str, int]:
        """Return the enumerators of ``enum NAME`` in the object's BTF."""
        # struct btf_enum: name_off, val
        return {text: fields[0] for text, fields in self._btf_entries(name, BTF_KIND_ENUM, 2)}

    def members(self, name: str) -> dict[str, int]:
        """Return the members of ``struct NAME`` in the object's BTF, with their offsets in bits."""
        # struct btf_member: name_off, type, offset (of which bits 24 to 31 are a bit-field's size)
        return {text: fields[1] & 0xFFFFFF for text, fields in self._btf_entries(name, BTF_KIND_STRUCT, 3)}

    def _btf_entries(self, name: str, kind: int, words: int) -> list[tuple[str, Sequence[int]]]:
        btf = _call("bpf_object__btf", self._object)
        number = library().btf__find_by_name_kind(btf, name.encode(), kind)
        if number < 0:
            return []
        address = _call("btf__type_by_id", btf, number)
        number = _BtfType.from_address(address).info & 0xFFFF
        entries = (c_uint32 * words * number).from_address(address + ctypes.sizeof(_BtfType))
        return [(library().btf__name_by_offset(btf, entry[0]).decode(), list(entry)[1:]) for entry in entries]

    def _program(self, name: str) -> int:
        return _call("bpf_object__find_program_by_name", self._object, name.encode())

    def _map(self, name: str) -> int:
        return _call("bpf_object__find_map_by_name", self._object, name.encode())

    @staticmethod
    def _detached(link: int) -> int:
        """Turn libbpf's link into a descriptor of our own."""
        fd = os.dup(_call("bpf_link__fd", link))
        _call("bpf_link__destroy", link)
        return fd


def iterate(link: int) -> bytes:
    """Run an iterator program once over everything it iterates, by the descriptor of its link; return what it wrote.

    Asks for no capability: whoever has the descriptor may.
    """
    fd = _call("bpf_iter_create", link)
    written = bytearray()
    try:
        while True:
            try:
                part = os.read(fd, 1 << 16)
            except BlockingIOError:  # kernel/bpf/bpf_iter.c: after a million objects about which nothing was written
                continue
            if not part:
                return bytes(written)
            written += part
    finally:
        os.close(fd)


@functools.cache
def kernel_has_function(name: str) -> bool:
    """Tell whether the running kernel's BTF describes the function NAME.

    :raises OSError: the kernel gives no BTF.
    """
    btf = _call("btf__load_vmlinux_btf")
    try:
        return bool(library().btf__find_by_name_kind(btf, name.encode(), BTF_KIND_FUNC) > 0)
    finally:
        library().btf__free(btf)


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link in a bpffs."""
    _call("bpf_obj_pin", fd, bytes(path))


def get(path: Path) -> int:
    """Return a new descriptor of what is pinned at PATH.

    :raises OSError: ENOENT and the like.
    """
    return _call("bpf_obj_get", bytes(path))


def info(fd: int, kind: type[T]) -> T:
    """Return what the kernel tells of a map, program or link."""
    result = kind()
    _call("bpf_obj_get_info_by_fd", fd, byref(result), byref(c_uint32(ctypes.sizeof(result))))
    return result


def program_of_link(fd: int) -> ProgramInfo:
    """Return what the kernel tells of the program that a link attaches.

    :raises OSError: it is no link; EPERM without CAP_SYS_ADMIN.
    """
    program = _call("bpf_prog_get_fd_by_id", info(fd, LinkInfo).prog_id)
    try:
        return info(program, ProgramInfo)
    finally:
        os.close(program)


def await_end(programs: Iterable[int]) -> None:
    """Wait, 5 s at most, until programs of these ids are gone.

    Who unlinks a pin has not detached anything yet: the kernel does so in a work of its own, bpf_link_put_deferred()
    of kernel/bpf/syscall.c, and until then they run.
    """
    end = time.monotonic() + 5
    for number in programs:
        with contextlib.suppress(FileNotFoundError):
            while time.monotonic() < end:
                os.close(_call("bpf_prog_get_fd_by_id", number))
                time.sleep(0.002)


def attach_fexit(program: int) -> int:
    """Attach a loaded program of section ``fexit/`` by its descriptor; return the link's.

    Asks for no capability, as kernel/bpf/syscall.c does not: whoever has the descriptor may.
    """
    end = time.monotonic() + 5
    while True:
        try:
            return _call("bpf_link_create", program, 0, BPF_TRACE_FEXIT, None)
        except OSError as error:
            # Its last link is not gone yet, see await_end().
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(0.002)


def maps_of(program: ProgramInfo, names: dict[str, str]) -> dict[str, int]:
    """Return descriptors of the maps that a program uses, under the NAMES that its object's names stand for.

    :param names: by the names that the kernel has: their first 15 characters, BPF_OBJ_NAME_LEN.

    :raises OSError: EPERM without CAP_SYS_ADMIN.
    """
    fd = _call("bpf_prog_get_fd_by_id", program.id)
    try:
        ids = (c_uint32 * 64)()
        asked = ProgramInfo(nr_map_ids=len(ids), map_ids=ctypes.addressof(ids))
        _call("bpf_obj_get_info_by_fd", fd, byref(asked), byref(c_uint32(ctypes.sizeof(asked))))
    finally:
        os.close(fd)
    found = {}
    for number in ids[: min(asked.nr_map_ids, len(ids))]:
        fd = _call("bpf_map_get_fd_by_id", number)
        name = names.get(info(fd, MapInfo).name.decode())
        if name:
            found[name] = fd
        else:
            os.close(fd)
    return found


def same_map(one: int | None, other: int | None) -> bool:
    """Tell whether two descriptors are of the same map."""
    return one is not None and other is not None and info(one, MapInfo).id == info(other, MapInfo).id


def read(fd: int, kind: type[T]) -> T:
    """Return the only value of a map that holds one KIND (a section of global data).

    :raises OSError: EINVAL when the map's value has another size: it belongs to another version of the object.
    """
    _compare_size(fd, kind)
    value = kind()
    _call("bpf_map_lookup_elem", fd, byref(c_uint32(0)), byref(value))
    return value


def _compare_size(fd: int, kind: type[ctypes.Structure]) -> None:
    if info(fd, MapInfo).value_size != ctypes.sizeof(kind):
        raise OSError(errno.EINVAL, "a map of another layout")


def read_locked(fd: int, index: int, kind: type[T]) -> T:
    """Return a value of an array whose values begin with a ``bpf_spin_lock``, as it was at one time."""
    value = kind()
    _call("bpf_map_lookup_elem_flags", fd, byref(c_uint32(index)), byref(value), BPF_F_LOCK)
    return value


def store(fd: int, kind: type[ctypes.Structure], member: str, value: int) -> None:
    """Write one member of the only value of a map of global data, in the kernel's own memory: no other is touched.

    :raises OSError: as :func:`read`.
    """
    _compare_size(fd, kind)
    field = getattr(kind, member)
    with mmap.mmap(fd, mmap.PAGESIZE) as memory:
        memory[field.offset : field.offset + field.size] = value.to_bytes(field.size, sys.byteorder)


def write(fd: int, value: ctypes.Structure) -> None:
    """Write the only value of a map (a section of global data)."""
    _call("bpf_map_update_elem", fd, byref(c_uint32(0)), byref(value), 0)
