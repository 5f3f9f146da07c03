"""A real QEMU, and what it gets when it asks for a postcopy migration or for a background snapshot."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError, QMPError
from qemu.qmp.legacy import QEMUMonitorProtocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Board:
    """The machine that QEMU is, and a guest for it.

    The guest adds 1 to the first four bytes of each of 128 pages, round and round, so that memory is written during the
    migration and the destination must fault pages in.
    """

    qemu: str
    options: Sequence[str]
    guest: bytes
    load: str  # the option that has the guest run; FILE is where it is
    first: int  # the physical address of the first counter

    @property
    def counters(self) -> tuple[int, int]:
        """The physical addresses of the first and the last counter."""
        return self.first, self.first + 127 * 4096


BOARD = {
    "x86_64": Board(
        "qemu-system-x86_64",
        ("-machine", "pc", "-cpu", "max"),
        bytes.fromhex(
            "fa"  # cli
            "bb0010"  # round: mov bx, 0x1000
            "8ec3"  # next: mov es, bx
            "6626ff060000"  # inc dword [es:0]
            "81c30001"  # add bx, 0x100: one page
            "81fb0090"  # cmp bx, 0x9000
            "72ee"  # jb next
            "ebe9"  # jmp round
        ).ljust(510, b"\0")
        + bytes.fromhex("55aa"),
        "-drive file=FILE,format=raw,if=ide,snapshot=on",
        0x10000,
    ),
    "aarch64": Board(
        "qemu-system-aarch64",
        ("-machine", "virt,gic-version=3", "-cpu", "host"),
        bytes.fromhex(
            "0020a8d2"  # round: movz x0, #0x4100, lsl #16
            "011080d2"  # mov x1, #128
            "020040b9"  # next: ldr w2, [x0]
            "42040011"  # add w2, w2, #1
            "020000b9"  # str w2, [x0]
            "00044091"  # add x0, x0, #0x1000: one page
            "210400f1"  # subs x1, x1, #1
            "61ffff54"  # b.ne next
            "f8ffff17"  # b round
        ),
        "-kernel FILE",
        0x41000000,
    ),
}[os.uname().machine]

#: Bytes a second, so slow that a migration without postcopy could not end: the guest writes more than that.
BANDWIDTH = 256 * 1024
#: Once that is no danger: so slow that the guest touches, or writes, pages before their turn comes.
POSTCOPY_BANDWIDTH = 1024 * 1024
SECONDS = 120

#: Where disks, images and sockets are. Containers have it too.
WORK = Path("/run/machines")

QEMU = (BOARD.qemu,)


@dataclass(frozen=True)
class Migration:
    """A migration that has completed, and the guest that goes on at its destination."""

    requests: int  # pages that the destination asked for, each by a fault
    before: tuple[int, ...]  # the counters when the source had stopped
    after: tuple[int, ...]  # and later at the destination


@dataclass(frozen=True)
class Snapshot:
    """A background snapshot that has completed, and the guest that went on meanwhile."""

    before: tuple[int, ...]  # the counters when it was asked for
    taken: tuple[int, ...]  # in the snapshot, as another QEMU loaded it
    after: tuple[int, ...]  # in the guest when the last page was written


class Refused(Exception):
    """The program was refused a userfaultfd; the text is its own."""


@dataclass(frozen=True)
class Machine:
    """What QEMU is started by, and as whom."""

    user: int = 0
    groups: Sequence[int] = ()
    command: Sequence[str] = QEMU
    accelerator: str = "kvm"


class Qemu:
    """A QEMU that runs GUEST, and its monitor."""

    def __init__(self, stack: ExitStack, folder: Path, machine: Machine, *options: str) -> None:
        number = len(list(folder.iterdir()))
        disk, monitor = folder / f"disk{number}", folder / f"monitor{number}"
        disk.write_bytes(BOARD.guest)
        os.truncate(disk, 1 << 20)
        self.monitor = QEMUMonitorProtocol(str(monitor), server=True)
        monitor.chmod(0o666)
        argv = [*machine.command, "-accel", machine.accelerator, *BOARD.options, "-m", "64M"]
        argv += ["-nodefaults", "-display", "none", *BOARD.load.replace("FILE", str(disk)).split()]
        argv += ["-chardev", f"socket,id=monitor,path={monitor}", "-mon", "chardev=monitor,mode=control"]
        self.stderr = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        self.process = stack.enter_context(
            subprocess.Popen(
                [*argv, *options],
                user=machine.user,
                group=machine.user,
                extra_groups=list(machine.groups),
                stdin=subprocess.DEVNULL,
                stdout=self.stderr,
                stderr=self.stderr,
            )
        )
        stack.callback(self.process.kill)
        try:
            self.monitor.accept(SECONDS)
        except Exception as error:
            raise RuntimeError(f"QEMU did not start: {self.said()}") from error
        self.monitor.settimeout(SECONDS)
        stack.callback(self.end)

    def end(self) -> None:
        """End QEMU by its monitor: in a container it is no child of ours."""
        with suppress(RuntimeError, QMPError):  # it has ended
            self.do("quit")
        with suppress(EOFError):  # what it ended by
            self.monitor.close()

    def allow(self, capability: str) -> None:
        """Ask for a capability of migrations, for which QEMU must have a userfaultfd.

        :raises Refused: it may not have one.
        """
        try:
            self.do("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])
        except ExecuteError as error:
            self.end()
            self.process.wait(SECONDS)  # what it says comes late out of a container
            raise Refused(f"{error}: {self.said()}") from error

    def until_booted(self) -> None:
        """Wait until the guest writes; press its reset button where its firmware hangs.

        On KVM on QEMU's emulated SVM about one boot in a hundred does, without a policy too.
        """
        for _ in range(4):
            end = time.monotonic() + SECONDS / 4
            while time.monotonic() < end:
                if 0 not in self.counters():
                    return
                time.sleep(0.1)
            self.do("system_reset")
        raise RuntimeError(f"the guest does not boot; {self.said()}")

    def said(self) -> str:
        """Return what QEMU has written to standard error."""
        self.stderr.seek(0)
        return self.stderr.read().strip()

    def do(self, command: str, **arguments: object) -> Any:
        """Execute a QMP command; its names have hyphens where Python's have underscores."""
        try:
            return self.monitor.cmd(command, **{name.replace("_", "-"): value for name, value in arguments.items()})
        except EOFError as error:
            raise RuntimeError(f"QEMU has ended at {command}: {self.said()}") from error

    def counters(self) -> tuple[int, ...]:
        """Return the counters in the guest's memory."""
        lines = [self.do("human-monitor-command", command_line=f"xp /1wx {address:#x}") for address in BOARD.counters]
        return tuple(int(line.split(":")[1], 16) for line in lines)

    def until(self, command: str, *wanted: str) -> Any:
        """Ask until the status is one of WANTED."""
        end = time.monotonic() + SECONDS
        while (answer := self.do(command)).get("status") not in wanted:
            if time.monotonic() > end or answer.get("status") == "failed":
                raise RuntimeError(f"{command}: {answer}; {self.said()}")
            time.sleep(0.05)
        return answer


@contextmanager
def workshop() -> Iterator[tuple[ExitStack, Path]]:
    """Give a directory that every user may write, and what ends whatever was started."""
    WORK.mkdir(exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=WORK)))
        folder.chmod(0o777)
        yield stack, folder


def migrate(machine: Machine) -> Migration:
    """Migrate a running guest from one QEMU to another by postcopy.

    :raises Refused: the destination may not have a userfaultfd.
    """
    with workshop() as (stack, folder):
        destination = Qemu(stack, folder, machine, "-incoming", "defer")
        destination.allow("postcopy-ram")
        destination.do("migrate-incoming", uri=f"unix:{folder}/migration")
        source = Qemu(stack, folder, machine)
        source.allow("postcopy-ram")
        source.do("migrate-set-parameters", max_bandwidth=BANDWIDTH, max_postcopy_bandwidth=POSTCOPY_BANDWIDTH)
        source.until_booted()
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


def snapshot(machine: Machine) -> Snapshot:
    """Take a snapshot of a guest that goes on writing, and load it into another QEMU.

    :raises Refused: QEMU may not have a userfaultfd.
    """
    with workshop() as (stack, folder):
        image = folder / "image"
        qemu = Qemu(stack, folder, machine)
        qemu.allow("background-snapshot")
        qemu.do("migrate-set-parameters", max_bandwidth=POSTCOPY_BANDWIDTH)
        qemu.until_booted()
        before = qemu.counters()
        qemu.do("migrate", uri=f"exec:cat >{image}")
        qemu.until("query-migrate", "completed")
        after = qemu.counters()
        loaded = Qemu(stack, folder, machine, "-S", "-incoming", f"exec:cat {image}")
        loaded.until("query-status", "paused")
        return Snapshot(before, loaded.counters(), after)
