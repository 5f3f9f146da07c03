"""What enforcement needs of this machine: a row for each, and what to do about what is missing."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from uffdguard.errors import Failure
from uffdguard.kernel import libbpf, native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OBJECT = Path(__file__).with_name("guard.bpf.o")
SECURITYFS = Path("/sys/kernel/security")
HOOK = "inode_init_security_anon"
#: The oldest kernel that is tried; the hook is there since 5.12, /dev/userfaultfd since 6.1.
OLDEST = (6, 1)

CGROUP_ROOT_INODE = 1  # kernel/cgroup/cgroup.c: the root's kernfs id

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Row:
    """One thing that enforcement needs, how it stands here, and what to do when it is not ``ok``."""

    name: str
    state: State
    fact: str
    hint: str = ""


def rows() -> Iterator[Row]:
    """Yield the rows whose answer costs nothing and changes nothing."""
    for check in CHECKS:
        yield check()


def require(*checks: Callable[[], Row]) -> None:
    """Make sure that nothing is missing of CHECKS, by default of all that can be told without trying.

    :raises Failure: for the first row that is ``missing``.
    """
    for check in checks or CHECKS:
        row = check()
        if row.state == "missing":
            raise Failure(f"the policy cannot be put in force here: {row.name}: {row.fact}", row.hint)


def program_rows() -> Iterator[Row]:
    """Yield a row for each program of ours: whether this kernel loads it. Nothing is attached."""
    for program in ("decide", "grant", "forget", "seed", "administrators"):
        yield _program(program)


def privileges() -> Row:
    """Tell whether this process may load programs and see what is pinned."""
    if os.geteuid() != 0:
        return Row("privileges", "missing", "not running as root", "run it as root, e.g. with sudo")
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    wanted = {"CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
    lacking = [name for name, bit in wanted.items() if not effective >> bit & 1]
    if lacking:
        return Row("privileges", "missing", f"root without {', '.join(lacking)}", "run it outside of the container")
    return Row("privileges", "ok", "root")


def namespaces() -> Row:
    """Tell whether this process is where all that there is can be seen."""
    for kind in native.INITIAL_NAMESPACES:
        if not native.in_initial(kind):
            return Row("namespaces", "missing", f"not in the initial {kind} namespace", "run it on the host itself")
    # Only root may look; others are told by the row above.
    with contextlib.suppress(OSError):
        if not Path("/proc/self/ns/mnt").samefile("/proc/1/ns/mnt"):
            return Row(
                "namespaces",
                "missing",
                "not in the mount namespace of process 1, and what is mounted here ends with this one",
                "run it on the host itself, e.g. with nsenter --mount --target 1",
            )
    return Row("namespaces", "ok", "initial user and pid namespaces, mount namespace of process 1")


def _machine() -> Row:
    machine = os.uname().machine
    if machine != "x86_64":
        return Row("machine", "missing", machine, "only x86-64 gives each address space an id that is never used again")
    return Row("machine", "ok", machine)


def kernel() -> Row:
    """Tell whether this kernel is new enough."""
    release = os.uname().release
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if version < OLDEST:
        oldest = "Linux {}.{}".format(*OLDEST)
        return Row("kernel", "missing", f"{release} is older than {oldest}", f"boot {oldest} or newer")
    return Row("kernel", "ok", release)


def _libbpf() -> Row:
    try:
        libbpf.library()
    except Failure as error:
        return Row("libbpf", "missing", error.what, error.hint)
    return Row("libbpf", "ok", "libbpf.so.1")


def _btf() -> Row:
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return Row("BTF", "missing", "/sys/kernel/btf/vmlinux is not there", "boot a kernel with CONFIG_DEBUG_INFO_BTF")
    return Row("BTF", "ok", "/sys/kernel/btf/vmlinux")


def _hook() -> Row:
    try:
        there = libbpf.kernel_has_function(f"bpf_lsm_{HOOK}")
    except (Failure, OSError) as error:
        return Row("hook", "missing", f"cannot tell: {error}", "see the rows above")
    if not there:
        return Row("hook", "missing", f"no {HOOK} for BPF", "boot a kernel with CONFIG_BPF_LSM")
    return Row("hook", "ok", HOOK)


def _lsm() -> Row:
    try:
        modules = (SECURITYFS / "lsm").read_text().strip()
    except OSError:
        return Row(
            "LSM list",
            "warning",
            "cannot tell: securityfs is not mounted",
            f"mount -t securityfs securityfs {SECURITYFS}",
        )
    if "bpf" not in modules.split(","):
        return Row("LSM list", "missing", f"no bpf in {modules}", f"boot with lsm={modules},bpf")
    return Row("LSM list", "ok", modules)


def _lockdown() -> Row:
    try:
        text = (SECURITYFS / "lockdown").read_text()
    except OSError:
        return Row("lockdown", "ok", "none")
    level = text.split("[")[1].split("]")[0] if "[" in text else text.strip()
    if level == "confidentiality":
        return Row("lockdown", "missing", level, "boot with lockdown=integrity or none: BPF may read no memory now")
    return Row("lockdown", "ok", level)


def has_sysctl_guard() -> bool:
    """Tell whether this kernel runs BPF programs that see sysctls being written, CONFIG_CGROUP_BPF."""
    return libbpf.kernel_has_function("__cgroup_bpf_run_filter_sysctl")


@contextlib.contextmanager
def cgroup_root() -> Iterator[int]:
    """Give a descriptor of the root of the default hierarchy of control groups, cgroups(7).

    A further mount of it, also a detached one, would take ``nsdelegate`` and ``memory_recursiveprot`` from the one that
    the service manager has made; so one is made only where there is none.

    :raises OSError: it is nowhere to be had.
    """
    fd = None
    for line in native.MOUNTS.read_bytes().split(b"\n")[:-1]:
        words = line.split(b" ")
        if words[3] == b"/" and words[words.index(b"-", 6) + 1] == b"cgroup2":
            place = words[4].decode("unicode_escape").encode("latin-1")
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == CGROUP_ROOT_INODE:  # not that of a cgroup namespace, or what covers it
                break
            os.close(fd)
            fd = None
    if fd is None:
        fd = native.detached("cgroup2")
    try:
        yield fd
    finally:
        os.close(fd)


def _bpffs() -> Row:
    if native.is_bpffs(native.BPFFS):
        return Row("bpffs", "ok", str(native.BPFFS))
    if native.BPFFS.is_dir():
        return Row("bpffs", "ok", f"not mounted on {native.BPFFS}; start does it")
    return Row(
        "bpffs", "missing", f"{native.BPFFS} is not there", "mount sysfs on /sys; a kernel without bpffs won't do"
    )


def _proc() -> Row:
    try:
        value = native.read_knob()
    except Failure as error:
        if native.is_covered():
            return Row("sysctl", "ok", "covered by the interface file")
        return Row("sysctl", "missing", error.what, error.hint)
    return Row("sysctl", "ok", f"vm.unprivileged_userfaultfd = {value}")


def _device_userfaultfd() -> Row:
    if not _is_device(native.DEV_USERFAULTFD):
        return Row(
            "userfaultfd device",
            "missing",
            f"{native.DEV_USERFAULTFD} is not there",
            "start asks through it whether the policy answers; let udev or devtmpfs make it",
        )
    return Row("userfaultfd device", "ok", str(native.DEV_USERFAULTFD))


def _device_kvm() -> Row:
    if not native.has_kvm():
        return Row("KVM", "warning", "this kernel has none", "mode kvm does not exist here; disabled and enabled do")
    if problem := native.wrong_kvm():
        return Row("KVM", "warning", problem, "mode kvm grants nobody; load kvm_intel or kvm_amd, let devtmpfs make it")
    mode = native.DEV_KVM.stat().st_mode
    if mode & stat.S_IROTH or mode & stat.S_IWOTH:
        return Row(
            "KVM",
            "warning",
            f"everybody may open {native.DEV_KVM} ({stat.filemode(mode)})",
            "mode kvm then means nearly enabled; a udev rule with MODE=0660 and GROUP=kvm restricts it",
        )
    return Row("KVM", "ok", f"{native.DEV_KVM} {stat.filemode(mode)}")


CHECKS: tuple[Callable[[], Row], ...] = (
    privileges,
    namespaces,
    _machine,
    kernel,
    _libbpf,
    _btf,
    _hook,
    _lsm,
    _lockdown,
    _bpffs,
    _proc,
    _device_userfaultfd,
    _device_kvm,
)


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False


def _program(program: str) -> Row:
    name = f"program {program}"
    try:
        with libbpf.Object(OBJECT) as obj:
            obj.only(program)
            obj.load()
    except Failure as error:
        return Row(name, "missing", error.what, error.hint)
    except OSError as error:
        return Row(name, "missing", load_error(error), load_hint(error))
    return Row(name, "ok", "this kernel loads it")


def load_error(error: OSError) -> str:
    """Say in a few words why an object was not loaded."""
    return "the kernel refuses to load it: " + os.strerror(error.errno or 0)


def load_hint(error: OSError) -> str:
    """Say what to do when an object was not loaded."""
    if isinstance(error, PermissionError):
        return "it needs CAP_BPF and CAP_PERFMON, and a kernel that lets root load LSM and tracing programs"
    if isinstance(error, FileNotFoundError):
        return "the compiled program is missing: reinstall uffdguard, or run make in its source"
    if error.errno == errno.ENOMEM:
        return "its maps take more than 4 MiB; see the memory limit of the control group that this runs in"
    return "--debug shows the kernel's own log"
