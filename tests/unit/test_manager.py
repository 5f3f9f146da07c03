"""The service manager, by the messages that it gets and the descriptor that it passes."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from uffdguard import manager
from uffdguard.manager import Manager

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(params=["{}/notify", "@uffdguard-{}"])
def listener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    address: str = request.param.format(tmp_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address.replace("@", "\0", 1))
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    return listener


def test_it_is_told_and_keeps_a_descriptor(listener: socket.socket, tmp_path: Path) -> None:
    with listener, (tmp_path / "file").open("w") as file:
        told = Manager()
        told.ready()
        assert listener.recv(100) == b"READY=1"
        told.keep("connection-0-53", os.dup(file.fileno()))
        message, (fd,), *_ = socket.recv_fds(listener, 100, 1)
        assert message == b"FDSTORE=1\nFDNAME=connection-0-53"
        assert os.path.sameopenfile(fd, file.fileno())
        os.close(fd)
        told.forget(*told.kept)
        assert listener.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=connection-0-53"
        told.forget(*told.kept)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(100)


@pytest.mark.parametrize("pid", ["self", "1", ""])
def test_what_it_passes_is_taken_once_and_only_by_whom_it_is_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pid: str
) -> None:
    with (tmp_path / "one").open("w") as one, (tmp_path / "two").open("w") as two:
        fds = [200, 201]
        for file, fd in zip((one, two), fds, strict=True):
            os.dup2(file.fileno(), fd)
        monkeypatch.setattr(manager, "FIRST", fds[0])
        for key, value in (("PID", pid.replace("self", str(os.getpid()))), ("FDS", "2"), ("FDNAMES", "a-0-53:b")):
            monkeypatch.setenv(f"LISTEN_{key}", value)
        kept = Manager().kept
        assert kept == ({"a-0-53": fds[0], "b": fds[1]} if pid == "self" else {})
        assert [os.get_inheritable(fd) for fd in fds] == [pid != "self"] * 2
        assert not [key for key in os.environ if key.startswith(("LISTEN_", "NOTIFY_"))]
        assert Manager().kept == {}
        for fd in fds:
            os.close(fd)


def test_nobody_is_told_where_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    alone = Manager()
    alone.ready()
    alone.keep("connection", os.dup(0))
    alone.forget(*alone.kept)
