"""A real QEMU with KVM, and what it gets when it asks for a postcopy migration."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The guest: a boot sector that adds 1 to the first four bytes of each of 128 pages, round and round, so that
#: memory is written during the migration and the destination must fault pages in.
GUEST = bytes.fromhex(
    "fa"  # cli
    "bb0010"  # round: mov bx, 0x1000
    "8ec3"  # next: mov es, bx
    "6626ff060000"  # inc dword [es:0]
    "81c30001"  # add bx, 0x100: one page
    "81fb0090"  # cmp bx, 0x9000
    "72ee"  # jb next
    "ebe9"  # jmp round
).ljust(510, b"\0") + bytes.fromhex("55aa")
#: Physical addresses of the first and the last counter that the guest adds to.
COUNTERS = (0x10000, 0x8F000)

#: Bytes a second, so slow that a migration without postcopy could not end: the guest writes more than that.
BANDWIDTH = 256 * 1024
SECONDS = 120


@dataclass(frozen=True)
class Migration:
    """A migration that has completed, and the guest that goes on at its destination."""

    requests: int  # pages that the destination asked for, each by a fault
    before: tuple[int, ...]  # COUNTERS when the source had stopped
    after: tuple[int, ...]  # and later at the destination


class Refused(Exception):
    """QEMU refused to prepare for postcopy; the text is its own."""


class Qemu:
    """A QEMU of USER with GROUPS, on the kernel's KVM, and its monitor."""

    def __init__(self, stack: ExitStack, disk: Path, user: int, groups: Sequence[int], *options: str) -> None:
        ours, theirs = socket.socketpair()
        argv = ["qemu-system-x86_64", "-accel", "kvm", "-machine", "pc", "-cpu", "host", "-m", "64M"]
        argv += ["-nodefaults", "-display", "none", "-drive", f"file={disk},format=raw,if=ide,snapshot=on"]
        argv += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
        self.stderr = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        with theirs:
            process = stack.enter_context(
                subprocess.Popen(
                    [*argv, *options],
                    user=user,
                    group=user,
                    extra_groups=list(groups),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=self.stderr,
                )
            )
        stack.callback(process.kill)
        self.monitor = QEMUMonitorProtocol(ours)
        self.monitor.settimeout(SECONDS)
        try:
            self.monitor.connect()
        except Exception as error:
            raise RuntimeError(f"QEMU did not start: {self.said()}") from error
        stack.callback(self.monitor.close)

    def said(self) -> str:
        """Return what QEMU has written to standard error."""
        self.stderr.seek(0)
        return self.stderr.read().strip()

    def do(self, command: str, **arguments: object) -> Any:
        """Execute a QMP command; its names have hyphens where Python's have underscores."""
        return self.monitor.cmd(command, **{name.replace("_", "-"): value for name, value in arguments.items()})

    def counters(self) -> tuple[int, ...]:
        """Return the counters in the guest's memory."""
        lines = [self.do("human-monitor-command", command_line=f"xp /1wx {address:#x}") for address in COUNTERS]
        return tuple(int(line.split(":")[1], 16) for line in lines)

    def until(self, command: str, *wanted: str) -> Any:
        """Ask until the status is one of WANTED."""
        end = time.monotonic() + SECONDS
        while (answer := self.do(command)).get("status") not in wanted:
            if time.monotonic() > end or answer.get("status") == "failed":
                raise RuntimeError(f"{command}: {answer}; {self.said()}")
            time.sleep(0.05)
        return answer


def migrate(user: int, groups: Sequence[int] = ()) -> Migration:
    """Migrate a running guest from one QEMU of USER to another by postcopy.

    :raises Refused: the destination may not have a userfaultfd.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        disk = folder / "disk"
        disk.write_bytes(GUEST)
        os.truncate(disk, 1 << 20)
        os.chown(folder, user, user)
        destination = Qemu(stack, disk, user, groups, "-incoming", "defer")
        postcopy = [{"capability": "postcopy-ram", "state": True}]
        try:
            destination.do("migrate-set-capabilities", capabilities=postcopy)
        except ExecuteError as error:
            raise Refused(f"{error}: {destination.said()}") from error
        destination.do("migrate-incoming", uri=f"unix:{folder}/migration")
        source = Qemu(stack, disk, user, groups)
        source.do("migrate-set-capabilities", capabilities=postcopy)
        source.do("migrate-set-parameters", max_bandwidth=BANDWIDTH, max_postcopy_bandwidth=BANDWIDTH)
        while 0 in source.counters():  # until the guest has booted
            time.sleep(0.1)
        source.do("migrate", uri=f"unix:{folder}/migration")
        source.until("query-migrate", "active")
        source.do("migrate-start-postcopy")
        migrated = source.until("query-migrate", "completed")
        source.until("query-status", "postmigrate")
        destination.until("query-status", "running")
        before = source.counters()
        after = destination.counters()
        end = time.monotonic() + SECONDS
        while not all(map(int.__lt__, before, after)) and time.monotonic() < end:
            after = destination.counters()
        return Migration(migrated["ram"]["postcopy-requests"], before, after)
