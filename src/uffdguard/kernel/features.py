"""What enforcement needs of this machine: a row for each, and what to do about what is missing.

As in policy.py, no dataclasses, and the annotations are no strings: ``status`` asks some of this too.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from uffdguard.conditions import BY_NAME, Facts, Preemption
from uffdguard.errors import Failure
from uffdguard.kernel import arch, libbpf, native
from uffdguard.policy import Backend

OBJECT = Path(__file__).with_name("guard.bpf.o")
SECURITYFS = Path("/sys/kernel/security")
#: Where Debian's GRUB takes parts of its configuration from.
GRUB_DROP_INS = Path("/etc/default/grub.d")
HOOK = "inode_init_security_anon"
#: The lines of docs/kernels.md. No decision hangs on them.
TRIED = ("6.1", "6.12", "6.18", "7.0", "7.3")
SEE_ABOVE = "see the rows above"
MOUNT_SECURITYFS = f"mount -t securityfs securityfs {SECURITYFS}"
CGROUP_ROOT_INODE = 1  # kernel/cgroup/cgroup.c: the root's kernfs id

FTRACE_ENABLED = Path("/proc/sys/kernel/ftrace_enabled")
JIT_ENABLED = Path("/proc/sys/net/core/bpf_jit_enable")
#: Shows the preemption model of a kernel that can change it. Never mounted by us: that would be seen by all.
PREEMPT = Path("/sys/kernel/debug/sched/preempt")
COMMAND_LINE = Path("/proc/cmdline")

State = Literal["ok", "warning", "cannot tell", "missing"]


class Row(NamedTuple):
    """One thing that enforcement needs, how it stands here, and what to do when it is not ``ok``."""

    name: str
    state: State
    fact: str
    hint: str = ""


def rows() -> Iterator[Row]:
    """Yield the rows whose answer costs nothing and changes nothing: of what the configured backend needs."""
    native_backend = configured_backend() is Backend.NATIVE
    for check in (*(NATIVE_CHECKS if native_backend else CHECKS), configuration):
        yield check()
    if native_backend:
        yield Row("backend", "warning", "native, which is weaker than lsm", "uffdguard(8) says in what")


def configured_backend() -> Backend:
    """Return the backend that the configuration files choose; where they are wrong, that which is exact."""
    from uffdguard import config

    try:
        return config.load().backend
    except Failure:
        return Backend.LSM


def can_enforce(rows: Iterable[Row]) -> bool | None:
    """Tell whether the policy can be put in force on a machine with these ROWS; None: unknown."""
    states = {row.name: row.state for row in rows}
    # A caller without privileges, or in a container, says nothing about the machine.
    caller = {states.pop(name, "ok") for name in ("privileges", "namespaces")}
    if "missing" in states.values():
        return False
    return None if "cannot tell" in states.values() or caller != {"ok"} else True


def require(*checks: Callable[[], Row]) -> None:
    """Make sure that nothing is missing of CHECKS, by default of all that can be told without trying.

    :raises Failure: for the first row that is ``missing``.
    """
    for check in checks or CHECKS:
        row = check()
        if row.state == "missing":
            raise Failure(f"the policy cannot be put in force here: {row.name}: {row.fact}", row.hint)


def program_rows() -> Iterator[Row]:
    """Yield a row for each program of the object that start loads: whether this kernel takes it. Attaches nothing."""
    try:
        with libbpf.Object(OBJECT) as obj:
            programs = obj.programs()
    except (Failure, OSError):
        programs = ["decide"]  # whose row says why
    for program in programs:
        # The row "guard of sysctls" names the kernel that cannot have this one.
        if program == "guard_sysctl":
            with contextlib.suppress(Failure, OSError):
                if not has_sysctl_guard():
                    continue
        yield _program(program)


def privileges() -> Row:
    """Tell whether this process may load programs and see what is pinned."""
    if os.geteuid() != 0:
        return Row("privileges", "missing", "not running as root", "run it as root, e.g. with sudo")
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    wanted = {"CAP_DAC_OVERRIDE": 1, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
    lacking = [name for name, bit in wanted.items() if not effective >> bit & 1]
    if lacking:
        return Row("privileges", "missing", f"root without {', '.join(lacking)}", "run it outside of the container")
    return Row("privileges", "ok", "root")


def namespaces() -> Row:
    """Tell whether this process is where all that there is can be seen."""
    for kind in native.INITIAL_NAMESPACES:
        if not native.in_initial(kind):
            return Row("namespaces", "missing", f"not in the initial {kind} namespace", "run it on the host itself")
    try:
        same = Path("/proc/self/ns/mnt").samefile("/proc/1/ns/mnt")
    except OSError:
        fact = "initial user and pid namespaces; only root can see the mount namespace of process 1"
        return Row("namespaces", "cannot tell", fact, "run it as root, on the host itself")
    if not same:
        return Row(
            "namespaces",
            "missing",
            "not in the mount namespace of process 1, and what is mounted here ends with this one",
            "run it on the host itself, e.g. with nsenter --mount --target 1",
        )
    return Row("namespaces", "ok", "initial user and pid namespaces, mount namespace of process 1")


def _machine() -> Row:
    machine = os.uname().machine
    if machine not in arch.ARCHITECTURES:
        return Row("machine", "missing", machine, f"the programs know the registers of {arch.KNOWN} only")
    return Row("machine", "ok", machine)


def kernel() -> Row:
    """Tell whether anybody has tried a kernel of this line: what it can do is what the other rows are about."""
    release = os.uname().release
    if re.split(r"[^0-9.]", release)[0].split(".")[:2] not in [line.split(".") for line in TRIED]:
        return Row(
            "kernel",
            "warning",
            f"{release}: nobody has tried this line of kernels",
            "start sees the policy refuse before it relies on it; please report what came of it",
        )
    return Row("kernel", "ok", release)


def _libbpf() -> Row:
    try:
        libbpf.library()
    except Failure as error:
        return Row("libbpf", "missing", error.what, error.hint)
    return Row("libbpf", "ok", "libbpf.so.1")


def _btf() -> Row:
    try:
        with open("/sys/kernel/btf/vmlinux", "rb"):
            return Row("BTF", "ok", "/sys/kernel/btf/vmlinux")
    except FileNotFoundError:
        fact = "/sys/kernel/btf/vmlinux is not there"
        return Row("BTF", "missing", fact, "boot a kernel with CONFIG_DEBUG_INFO_BTF")
    except OSError as error:
        fact = f"cannot read /sys/kernel/btf/vmlinux: {error.strerror}"
        return Row("BTF", "cannot tell", fact, "run it as root, on the host itself")


def hook() -> Row:
    """Tell whether this kernel has the hook that decides."""
    try:
        there = libbpf.kernel_has_function(f"bpf_lsm_{HOOK}")
    except (Failure, OSError) as error:
        return Row("hook", "cannot tell", str(error), SEE_ABOVE)
    if not there:
        return Row("hook", "missing", f"no {HOOK} for BPF", "boot Linux 5.12 or newer, with CONFIG_BPF_LSM")
    here = arch.ARCHITECTURES.get(os.uname().machine)
    if here and here.attaches and not libbpf.kernel_has_function(here.attaches):
        return Row("hook", "missing", "no program can be attached to functions", f"boot Linux {here.since} or newer")
    return Row("hook", "ok", HOOK)


def _lsm() -> Row:
    try:
        modules = (SECURITYFS / "lsm").read_text().strip()
    except OSError:
        return Row("LSM list", "cannot tell", "securityfs is not mounted", MOUNT_SECURITYFS)
    if "bpf" not in modules.split(","):
        by_grub = ", which uffdguard install --lsm has GRUB do" if GRUB_DROP_INS.is_dir() else ""
        hint = (
            f"boot with {lsm_parameter(modules)}{by_grub}; without bpf there is start --backend native, which is weaker"
        )
        return Row("LSM list", "missing", f"no bpf in {modules}", hint)
    return Row("LSM list", "ok", modules)


def lsm_parameter(modules: str) -> str:
    """Return the kernel's parameter that adds bpf to these LSMs, as securityfs lists them."""
    # The first one is always there, and is no word of the parameter.
    return f"lsm={','.join([name for name in modules.split(',') if name != 'capability'] + ['bpf'])}"


def _lockdown() -> Row:
    try:
        text = (SECURITYFS / "lockdown").read_text()
    except FileNotFoundError:
        # The list is there wherever securityfs is mounted, this file only where the lockdown module is.
        if (SECURITYFS / "lsm").exists():
            return Row("lockdown", "ok", "this kernel has none")
        return Row("lockdown", "cannot tell", "securityfs is not mounted", MOUNT_SECURITYFS)
    except OSError as error:
        return Row("lockdown", "cannot tell", str(error), "run it as root, on the host itself")
    level = text.split("[")[1].split("]")[0] if "[" in text else text.strip()
    if level == "confidentiality":
        return Row("lockdown", "missing", level, "boot with lockdown=integrity or none: BPF may read no memory now")
    return Row("lockdown", "ok", level)


def _number(path: Path) -> int | None:
    """Return the number that a sysctl holds, or None where it is not there or cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def ftrace_enabled() -> int | None:
    """Return kernel.ftrace_enabled; None: there is no such sysctl, or it cannot be read."""
    return _number(FTRACE_ENABLED)


def _ftrace() -> Row:
    value = ftrace_enabled()
    if value is None and FTRACE_ENABLED.exists():
        return Row("ftrace", "cannot tell", f"cannot read {FTRACE_ENABLED}", "run it as root, on the host itself")
    there = "no kernel.ftrace_enabled here" if value is None else f"kernel.ftrace_enabled = {value}"
    return _row("ftrace-enabled", there, Facts(ftrace_enabled=value))


def _jit() -> Row:
    value = _number(JIT_ENABLED)
    if value is None and JIT_ENABLED.exists():
        return Row("JIT", "cannot tell", f"cannot read {JIT_ENABLED}", "run it as root, on the host itself")
    if value == 0:
        # Measured on 6.1 and 7.3: the trampolines call the interpreter then.
        return Row("JIT", "ok", "net.core.bpf_jit_enable = 0: the kernel interprets programs, which is slower")
    there = "no net.core.bpf_jit_enable here" if value is None else f"net.core.bpf_jit_enable = {value}"
    return Row("JIT", "ok", there)


def recursion_guard() -> bool | None:
    """Tell whether the kernel skips an LSM program while another one runs on the same CPU; None: unknown.

    The commit that took this guard from LSM programs (in 6.2, and in 6.1.54) gave the programs that keep it an entry
    function of their own.
    """
    try:
        return not libbpf.kernel_has_function("__bpf_prog_enter_recur")
    except (Failure, OSError):
        return None


def preemption() -> Preemption | None:
    """Return how this kernel preempts; None: unknown."""
    with contextlib.suppress(OSError):
        if found := preemption_in_debugfs(PREEMPT.read_text()):
            return found
    return preemption_at_boot(os.uname().version, COMMAND_LINE.read_text(), _kernel_configuration)


def preemption_in_debugfs(text: str) -> Preemption | None:
    """Return the model in brackets, as in ``none (voluntary) full``."""
    found = re.search(r"\((\w+)\)", text)
    return _model(found[1]) if found else None


def preemption_at_boot(version: str, command_line: str, configuration: Callable[[], str | None]) -> Preemption | None:
    """Return the model that a kernel boots with.

    :param version: as ``uname -v`` prints it.
    :param configuration: gives the configuration that the kernel was built with, or None; asked only when it matters.
    """
    # init/Makefile: a kernel that never preempts has no such word.
    words = [word for word in version.split() if word.startswith("PREEMPT")]
    if "PREEMPT_RT" in words:
        return "rt"
    if "PREEMPT_DYNAMIC" not in words:
        return "full" if words else "none"
    # kernel/sched/core.c: the last one counts, and what it does not know is passed over. What follows -- is for init.
    boot = re.split(r"(?:^|\s)--(?:\s|$)", command_line)[0]
    chosen = [model for word in boot.split() if word.startswith("preempt=") and (model := _model(word[8:]))]
    if chosen:
        return chosen[-1]
    built = configuration() or ""
    for name, model in BUILT:
        if re.search(rf"^CONFIG_PREEMPT{name}=y$", built, re.MULTILINE):
            return model
    return None


#: The default of a kernel that can choose, by the option it was built with.
BUILT: tuple[tuple[str, Preemption], ...] = (
    ("_NONE", "none"),
    ("_VOLUNTARY", "voluntary"),
    ("_LAZY", "lazy"),
    ("", "full"),
)


def _model(word: str) -> Preemption | None:
    return next((model for model in get_args(Preemption) if model == word), None)


def _kernel_configuration() -> str | None:
    """Return the configuration that this kernel was built with, or None where it is nowhere to be found."""
    release = os.uname().release
    with contextlib.suppress(OSError):
        import gzip

        return gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    for path in (Path(f"/boot/config-{release}"), native.MODULES / release / "config"):
        with contextlib.suppress(OSError):
            return path.read_text()
    return None


def hides_grants() -> bool | None:
    """Tell whether a task that is preempted in a task's storage hides all storages on its CPU; None: cannot tell.

    Before 6.2 it does: bpf_task_storage_trylock() of kernel/bpf/bpf_task_storage.c. The functions that came with the
    change are gone again in 7.3. The storage of control groups came in the same release, and is still there.
    """
    try:
        return not libbpf.kernel_has_function("bpf_cgrp_storage_get")
    except (Failure, OSError):
        return None


def _grants() -> Row:
    hidden = hides_grants()
    if hidden is None:
        return Row("grants", "cannot tell", "the kernel's BTF tells whether preemption hides them", SEE_ABOVE)
    facts = Facts(grants_hidden=hidden, preemption=preemption())
    return _row("grants-found", "found whenever they are looked for", facts)


def _preemption() -> Row:
    guard = recursion_guard()
    if guard is None:
        return Row("preemption", "cannot tell", "the kernel's BTF tells whether it matters", SEE_ABOVE)
    if not guard:
        return _row("preemption", "does not matter: LSM programs have no recursion guard", Facts())
    facts = Facts(recursion_guard=True, preemption=preemption())
    return _row("preemption", f"{facts.preemption}, as LSM programs with a recursion guard need it", facts)


def aim(obj: libbpf.Object) -> None:
    """Let the programs for the system call be of the functions that serve it on this architecture.

    Where one function serves all, the second is of that one: loaded all the same, never attached. So there is one way
    only to load the object. Call it before the object is loaded.
    """
    here = arch.current()
    obj.aim("native", here.entry)
    obj.aim("native32", here.entry32 if here.entry32 and libbpf.kernel_has_function(here.entry32) else here.entry)


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


def _sysctl_guard() -> Row:
    name = BY_NAME["guard-attached"].row
    try:
        there = has_sysctl_guard()
    except (Failure, OSError) as error:
        return Row(name, "cannot tell", str(error), SEE_ABOVE)
    if not there:
        return Row(
            name,
            "warning",
            "no cgroup v2 for BPF: sysctls that switch the policy off cannot be refused",
            "boot a kernel with CONFIG_CGROUP_BPF, or see that nobody sets kernel.ftrace_enabled to 0",
        )
    return Row(name, "ok", "cgroup v2 for BPF")


def _row(name: str, fact: str, facts: Facts) -> Row:
    """Give the row of a condition: FACT where it holds, else what fails and what to do."""
    condition = BY_NAME[name]
    for sentence in condition.sentences(facts):
        state: State = "missing" if condition.severity == "critical" else "warning"
        return Row(condition.row, state, sentence, condition.remedy)
    return Row(condition.row, "ok", fact)


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
        fact = f"{native.DEV_USERFAULTFD} is not there: start asks with UFFD_USER_MODE_ONLY whether the policy answers"
        return Row("userfaultfd device", "ok", fact)
    return Row("userfaultfd device", "ok", str(native.DEV_USERFAULTFD))


def _device_for_native() -> Row:
    if _is_device(native.DEV_USERFAULTFD):
        return Row("userfaultfd device", "ok", str(native.DEV_USERFAULTFD))
    fact = f"{native.DEV_USERFAULTFD} is not there"
    return Row("userfaultfd device", "warning", fact, "mode kvm does not exist here by the backend native; others do")


def _device_kvm() -> Row:
    if not native.has_kvm():
        return Row("KVM", "warning", "this kernel has none", "mode kvm does not exist here; disabled and enabled do")
    if problem := native.wrong_kvm():
        return _row("kvm-device", "", Facts(kvm=problem))
    mode = native.DEV_KVM.stat().st_mode
    if mode & stat.S_IROTH or mode & stat.S_IWOTH:
        return Row(
            "KVM",
            "warning",
            f"everybody may open {native.DEV_KVM} ({stat.filemode(mode)})",
            "mode kvm then means nearly enabled; a udev rule with MODE=0660 and GROUP=kvm restricts it",
        )
    return Row("KVM", "ok", f"{native.DEV_KVM} {stat.filemode(mode)}")


def configuration() -> Row:
    """Tell whether the configuration files say what can be put in force here."""
    from uffdguard import config  # brings msgspec, which nothing else here needs

    try:
        configured = config.load()
        configured.check(configured.backend)
        policy = configured.policy
        native.check_mode(policy.mode)
    except Failure as error:
        return Row("configuration", "missing", error.what, error.hint)
    files = ", ".join(map(str, config.files())) or "no file"
    return Row("configuration", "ok", f"mode {policy.mode}{', audit' if policy.audit else ''} ({files})")


CHECKS: tuple[Callable[[], Row], ...] = (
    privileges,
    namespaces,
    _machine,
    kernel,
    _libbpf,
    _btf,
    hook,
    _lsm,
    _lockdown,
    _ftrace,
    _jit,
    _preemption,
    _grants,
    _sysctl_guard,
    _bpffs,
    _proc,
    _device_userfaultfd,
    _device_kvm,
)


#: What the backend ``native`` needs.
NATIVE_CHECKS: tuple[Callable[[], Row], ...] = (
    privileges,
    namespaces,
    kernel,
    _proc,
    _device_for_native,
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
            aim(obj)
            obj.load()
    except Failure as error:
        return Row(name, "missing", error.what, error.hint)
    except OSError as error:
        # EPERM says nothing about the kernel where the caller lacks the privileges.
        state: State = "cannot tell" if isinstance(error, PermissionError) and privileges().state != "ok" else "missing"
        return Row(name, state, load_error(error), load_hint(error))
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
        return "its maps take most of 1 MiB; see the memory limit of the control group that this runs in"
    return "--debug shows the kernel's own log"
