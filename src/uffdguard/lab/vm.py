"""The micro-VM of the lab: boot a kernel on this machine's root file system and run one command in it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.lab import roots, virtiofs
from uffdguard.lab.architectures import AMD64, Architecture
from uffdguard.lab.kernels import flavour
from uffdguard.lab.processes import PATH, need, process_group
from uffdguard.lab.roots import Root

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from uffdguard.lab.kernels import Kernel

#: Directories that can be written in the guest; what is written is gone with it.
OVERLAID = ("/etc", "/lib", "/home", "/opt", "/srv", "/usr", "/var", "/tmp")

#: Directories that are the guest's own: what this machine has there cannot be seen in it.
OWN = ("/dev", "/proc", "/run", "/sys")

#: Where the guest has the directory that it shares with the host.
SHARED = "/run/lab"

TROUBLE = re.compile(rb"BUG: |Oops: |Kernel panic|Call Trace:")
TAIL = 40
TIMED_OUT = 124

PREPARE = """\
#!/bin/sh
{kvm}mount -t bpf bpf /sys/fs/bpf
{uncovered}{opened}{mounted}cd {cwd} || exit
"""

#: A disk has none of our directories. With a cache the guest asks for a file once: Python asks for hundreds as it
#: starts, and each answer takes as long as thousands of instructions.
MOUNT = """\
mkdir -p {path}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose {tag} {path} || exit
"""

#: The environment of this Python leads to where it is: the disk has its own there.
PYTHON = """\
mkdir -p {parent}
[ -e {prefix} ] || ln -s /usr {prefix}
"""

#: COMMAND's output is a pipe, not a file: whoever opens /dev/stdout would truncate a file. A process that
#: COMMAND leaves behind may hold the pipe open: its end is waited for a moment only.
RUN = """\
mkfifo -m 622 /run/lab.out /run/lab.err
cat /run/lab.out >>{shared}/out & out=$!
cat /run/lab.err >>{shared}/err & err=$!
{command} </dev/null >/run/lab.out 2>/run/lab.err
status=$?
(sleep 2; kill $out $err) 2>/dev/null &
wait $out $err
echo $status >{shared}/status
"""

SHELL = """\
{command}
echo $? >{shared}/status
"""


#: With a thread a CPU, QEMU before 8.1 may run code that the kernel is about to patch, as it does for static keys
#: and for BPF trampolines: the kernel dies of "Oops: int3".
ONE_THREAD = ("-accel", "tcg,thread=single")

#: KVM of a -rt kernel needs a TSC that the kernel takes for constant. QEMU emulates no CPU that says so of itself. The
#: kernel takes that of VMware for one, and the machine for VMware's by this: vmware_platform() of
#: arch/x86/kernel/cpu/vmware.c, which also asks a port that QEMU has.
CONSTANT_TSC = ("-cpu", "max,-hypervisor", "-smbios", "type=1,serial=VMware-")

#: A kernel loads its own modules only: apt could not check those of some, see Apt.download_modules().
SIGNED = "module.sig_enforce=1"

#: Without the user's .bashrc: what that starts may take longer here than the VM took to boot.
BASH = ("env", r"PS1=\u@\h:\w\$ ", "bash", "--norc", "-i")


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    cpus: int = 2,
    memory: str = "1G",
    count_instructions: bool = False,
    append: Sequence[str] = (),
    timeout: float | None = None,
) -> int:
    """Boot KERNEL, run COMMAND in it as root and return its exit status; an empty COMMAND is a shell.

    APPEND is added to the kernel's command line. What COMMAND prints is printed as it comes. TIMEOUT is in
    seconds, for boot and COMMAND together; when it is over, 124 is returned. Whatever happens, no process is left
    behind.

    Raises:
        Failure: A tool is missing, the VM cannot show a directory, or it ended before COMMAND did.
    """
    deadline = time.monotonic() + timeout if timeout else None
    # A disk has its own /usr, where this Python may be the system's.
    ours = sorted({Path.cwd(), Path(sys.prefix)} - {Path("/"), Path("/usr")})
    need(kernel.architecture.qemu, kernel.architecture.qemu_package)
    root = None if kernel.architecture.machine == platform.machine() else roots.get(kernel.architecture)
    needed = [] if root else [*ours, Path(sys.base_prefix)]
    closed = closed_directories(needed)
    options = ["--cpus", str(cpus), "--memory", memory, *(f"--kopt={word}" for word in append)]
    real_time = CONSTANT_TSC if flavour(kernel.release) == "-rt" and root is None else ()
    counted = ["-icount", "shift=0,sleep=off"] if count_instructions else []
    shared = Path(tempfile.mkdtemp(prefix="uffdguard-lab-"))
    keep = False
    try:
        places = outermost(ours) if root else []
        text = script(command, Path.cwd(), closed, covered_directories(needed), places, kernel.architecture)
        (shared / "boot").write_bytes(os.fsencode(text))
        (shared / "boot").chmod(0o755)
        argv = virtme(kernel, shared, root or overlays(closed), terminal=not command)
        argv += [*options, "--qemu-opts", "-no-reboot", *ONE_THREAD, *kernel.architecture.options, *real_time, *counted]
        # What the guest writes to its disk is gone with it.
        argv += ["-snapshot", *exports(places)] if root else []
        # virtme-run, being killed, leaves its temporary files behind.
        variables = {"TMPDIR": str(shared)}
        if without_9p(kernel):
            variables["PATH"] = f"{virtiofs.directory()}:{PATH}"
        with process_group(
            argv,
            terminal=not command,
            stdout=subprocess.PIPE if command else None,
            stderr=subprocess.STDOUT if command else subprocess.PIPE,
            variables=variables,
        ) as vm:
            over = follow(vm, shared, deadline)
        status = exit_status(shared)
        keep = report(shared, over, status)
    finally:
        if not keep:
            shutil.rmtree(shared, ignore_errors=True)
    if over:
        print(f"uffdguard: lab: not done after {timeout:g} s; kernel log: {shared}/log", file=sys.stderr)
        return TIMED_OUT
    if status is None:
        raise Failure("lab: the VM ended before COMMAND did", f"kernel log: {shared}/log")
    return status


def without_9p(kernel: Kernel) -> bool:
    """Whether KERNEL has virtiofs for this machine's files, and no 9p."""
    return flavour(kernel.release) == "-cloud"


def report(shared: Path, over: bool, status: int | None) -> bool:
    """Show what the kernel log says when it is of interest; return whether it is."""
    messages = (shared / "log").read_bytes()
    lines = messages.replace(b"\r", b"").replace(b"\x1b", b"^[").splitlines(keepends=True)
    trouble = next((number for number, line in enumerate(lines) if TROUBLE.search(line)), len(lines))
    told = lines[trouble : trouble + TAIL]
    if over or status is None:
        # The last lines as well: before a panic there may be other trouble, and after its first line much more.
        told += lines[max(trouble + TAIL, len(lines) - TAIL) :] if told else lines[-TAIL:]
    elif told:
        told.append(f"uffdguard: lab: kernel log: {shared}/log\n".encode())
    else:
        return False
    sys.stderr.buffer.writelines(told)
    sys.stderr.flush()
    return True


def closed_directories(paths: Iterable[Path]) -> list[Path]:
    """Return the directories on the way to PATHS, these included, that others cannot enter; outer first."""
    ways = {way for path in paths for way in (path.absolute(), path.resolve())}
    directories = {directory.resolve() for way in ways for directory in (way, *way.parents)}
    return sorted(directory for directory in directories if not directory.stat().st_mode & stat.S_IXOTH)


def covered_directories(paths: Sequence[Path]) -> list[Path]:
    """Return the directories on the way to PATHS, these included, that virtme-ng may hide in the guest; inner first.

    It mounts an empty file system on /var/tmp and on others in /var. Nothing else is mounted in /var there.

    Raises:
        Failure: What is hidden cannot be shown.
    """
    for path in paths:
        for own in OWN:
            if path.resolve().is_relative_to(own):
                raise Failure(
                    f"lab: {path} cannot be seen in the VM, which has a {own} of its own",
                    "have the project and its environment below /home, /root, /srv or /var/tmp",
                )
    ways = {way for path in paths for way in (path.resolve(), *path.resolve().parents)}
    return sorted((way for way in ways if Path("/var") in way.parents), reverse=True)


def overlays(closed: Iterable[Path]) -> list[str]:
    """Return the directories to overlay in the guest, so that the mode of each CLOSED one can be changed."""
    chosen = list(OVERLAID)
    for directory in closed:
        if not any(directory.is_relative_to(above) for above in chosen):
            chosen.append(str(directory))
    return chosen


def outermost(paths: Sequence[Path]) -> list[Path]:
    """Return those of PATHS that are not inside of another one."""
    return [path for path in paths if not any(path != other and path.is_relative_to(other) for other in paths)]


def exports(places: Iterable[Path]) -> list[str]:
    """Return what QEMU needs for the guest to mount PLACES of this machine."""
    argv = []
    for number, path in enumerate(places):
        share = f"local,id=lab{number},path={str(path).replace(',', ',,')},security_model=none,readonly=on"
        argv += ["-fsdev", f"{share},multidevs=remap"]
        argv += ["-device", f"virtio-9p-device,fsdev=lab{number},mount_tag=lab{number}"]
    return argv


def mounts(places: Iterable[Path]) -> str:
    """Return the part of the script that mounts PLACES where they are on this machine."""
    lines = [MOUNT.format(tag=f"lab{number}", path=shlex.quote(str(path))) for number, path in enumerate(places)]
    prefix = Path(sys.base_prefix)
    if lines and not prefix.is_relative_to("/usr"):
        lines.append(PYTHON.format(parent=shlex.quote(str(prefix.parent)), prefix=shlex.quote(str(prefix))))
    return "".join(lines)


def script(
    command: Sequence[str],
    cwd: Path,
    closed: Sequence[Path] = (),
    covered: Sequence[Path] = (),
    places: Sequence[Path] = (),
    architecture: Architecture = AMD64,
) -> str:
    """Return the shell script that prepares the guest, runs COMMAND, or a shell, and writes its status."""
    environment = {
        "PATH": PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
    }
    words = ["env", "-i", *(f"{name}={value}" for name, value in environment.items())]
    # Without the inner shell, env would take a COMMAND with "=" in its name for one more variable.
    words += ["sh", "-c", 'exec "$@"', "sh", *(command or BASH)]
    opened = f"chmod a+rx {shlex.join(map(str, closed))}\n" if closed else ""
    uncovered = f"umount {shlex.join(map(str, covered))} 2>/dev/null\n" if covered else ""
    module = architecture.kvm_module
    kvm = f"modprobe {module}\n" if module else ""
    prepare = PREPARE.format(
        kvm=kvm, uncovered=uncovered, opened=opened, mounted=mounts(places), cwd=shlex.quote(str(cwd))
    )
    return prepare + (RUN if command else SHELL).format(command=shlex.join(words), shared=SHARED)


def virtme(kernel: Kernel, shared: Path, root: Root | Iterable[str], *, terminal: bool) -> list[str]:
    """Return the command line of virtme-ng: of virtme-run, since vng breaks on blanks in paths.

    ROOT is a disk, or the directories of this machine's own root file system that can be written in the guest.

    Raises:
        Failure: A tool is missing.
    """
    need("busybox", "busybox-static")
    need("modprobe", "kmod")
    need("file", "file")
    virtme_run = shutil.which("virtme-run", path=f"{Path(sys.executable).parent}:{PATH}")
    if virtme_run is None:
        raise Failure("lab: virtme-ng is not installed", "run `pip install 'uffdguard[lab]'`")
    argv = [virtme_run, "--kimg", str(kernel.image), "--mods", "auto", "--disable-kvm"]
    argv += [] if without_9p(kernel) else ["--force-9p"]
    argv += ["--name", "lab", "--kopt", "panic=-1", "--kopt", SIGNED, "--rwdir", f"{SHARED}={shared}"]
    argv += [f"--kopt={word}" for word in kernel.architecture.parameters]
    if isinstance(root, Root):
        argv += ["--arch", kernel.architecture.machine, "--busybox", str(root.busybox)]
        argv += ["--root-disk", str(root.disk), "--root-fstype", "ext4", "--rw"]
    else:
        argv += [word for directory in root for word in ("--overlay-rwdir", directory)]
    if terminal:
        return [*argv, "--shell", f"{SHARED}/boot"]
    return [*argv, "--show-boot-console", "--verbose", "--script-sh", f"sh {SHARED}/boot"]


def follow(vm: subprocess.Popen[bytes], shared: Path, deadline: float | None) -> bool:
    """Copy COMMAND's output to ours, the VM's to the log, to the end; return whether DEADLINE came first."""
    console = vm.stdout or vm.stderr
    assert console
    os.set_blocking(console.fileno(), False)
    with (
        (shared / "out").open("w+b", buffering=0) as out,
        (shared / "err").open("w+b", buffering=0) as err,
        (shared / "log").open("wb") as messages,
    ):
        while True:
            # Asked first: what comes before the end is then copied after it.
            ended = exit_status(shared) is not None or vm.poll() is not None
            copy(console, messages)
            copy(out, sys.stdout.buffer)
            copy(err, sys.stderr.buffer)
            if ended:
                return False
            if deadline and time.monotonic() > deadline:
                return True
            time.sleep(0.05)


def exit_status(shared: Path) -> int | None:
    """Return the exit status that the guest wrote, or None when it has not, or not yet all of it."""
    with contextlib.suppress(FileNotFoundError):
        text = (shared / "status").read_text()
        return int(text) if text.endswith("\n") else None
    return None


def copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy to TARGET what SOURCE has now."""
    while data := source.read(1 << 20):
        target.write(data)
        target.flush()
