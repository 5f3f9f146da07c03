"""The service manager, by sd_notify(3): what it is told, and the descriptor that it keeps for the next server."""

from __future__ import annotations

import os
import socket

#: The first descriptor that is passed, sd_listen_fds(3).
FIRST = 3


class Manager:
    """Whoever started this service; nobody, where $NOTIFY_SOCKET is not set: then nothing is kept."""

    def __init__(self) -> None:
        address, pid, number, names = (
            os.environ.pop(key, "") for key in ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        #: The descriptors that are kept, by their names.
        self.kept: dict[str, int] = {}
        if pid == str(os.getpid()):
            self.kept = dict(zip(names.split(":"), range(FIRST, FIRST + int(number)), strict=False))
            for fd in self.kept.values():
                os.set_inheritable(fd, False)

    def ready(self) -> None:
        """Tell that the service has begun."""
        self._tell("READY=1")

    def keep(self, name: str, fd: int) -> None:
        """Let the service manager keep FD for the next server, under a NAME without colons."""
        self.kept[name] = fd
        self._tell(f"FDSTORE=1\nFDNAME={name}", fd)

    def forget(self, *names: str) -> None:
        """Close what is kept under NAMES, in this process and in the service manager."""
        for name in names:
            os.close(self.kept.pop(name))
            self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _tell(self, message: str, *fds: int) -> None:
        if self._socket:
            socket.send_fds(self._socket, [message.encode()], fds)
