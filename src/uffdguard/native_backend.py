"""The backend ``native``: no BPF, but the kernel's own knob, and the permissions of /dev/userfaultfd.

In modes ``disabled`` and ``kvm`` the knob is 0, so that userfaultfd(2) is refused. In mode ``kvm`` the device belongs
to the group of /dev/kvm, in ``disabled`` to root alone, and in ``enabled`` it is as it was found. What this does not do
of what ``lsm`` does is :data:`uffdguard.policy.WEAKER`.

As elsewhere, nothing is trusted that was not asked: a process of no account tries what it gets.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from uffdguard import proof, state
from uffdguard.conditions import Facts, failing
from uffdguard.errors import Failure
from uffdguard.kernel import native, probe
from uffdguard.policy import WEAKER, Backend, Mode, Policy, Reason
from uffdguard.proof import Silence
from uffdguard.steps import Steps, write

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The steps of this backend, besides those of guard.start and guard.stop.
STEPS = Steps(
    (
        "record the device",
        "record the mode",
        "write the rules",
        "set the device",
        "try what is allowed",
        "remove the rules",
        "restore the device",
        "remove the mode",
    )
)
step = STEPS.take

#: The permissions of the device as they were found, see :meth:`Permissions.record`; "-": it was not there.
FOUND_DEVICE = native.RUN / "device"
#: For udev: what it is to give the device whenever it applies its rules. The first rule, so that ``:=`` is final.
UDEV_RULES = Path("/run/udev/rules.d/00-uffdguard.rules")
UDEV_CONTROL = Path("/run/udev/control")
#: For systemd-sysctl and sysctl --system, which apply the last of all files of one setting.
SYSCTL = Path("/run/sysctl.d/zz-uffdguard.conf")
RULES = (UDEV_RULES, SYSCTL)
SYSCTL_KEY = "vm.unprivileged_userfaultfd"

#: Numbers and names of the devices with major number 10.
MISC = Path("/proc/misc")
ACL = "system.posix_acl_access"

#: The user and the group that try: no account has this id, and nothing belongs to it.
STRANGER = native.OWNER + 1
#: Seconds.
PATIENCE = 20.0

RULE = """\
# Written by uffdguard start; uffdguard stop removes it.
SUBSYSTEM=="misc", KERNEL=="userfaultfd", OWNER:="{uid}", GROUP:="{gid}", MODE:="{mode:04o}"
"""
#: Early in the boot udev has not given /dev/kvm its group yet, and a module that is unloaded takes it away. As
#: :func:`due_device` has it: the 11th character that ls shows is a plus where there is an ACL; the numbers are 10:232.
FOLLOW_KVM = """\
SUBSYSTEM=="misc", KERNEL=="kvm|userfaultfd", RUN+="/bin/sh -c '\
case $$(ls -l /dev/userfaultfd):$$(ls -l /dev/kvm):$$(stat -c %%t:%%T /dev/kvm) in \
??????????[!+]*:????rw????[!+]*:a:e8) chgrp --reference=/dev/kvm /dev/userfaultfd && chmod 0660 /dev/userfaultfd;; \
*) chmod 0600 /dev/userfaultfd; chown 0:0 /dev/userfaultfd;; \
esac'"
"""


#: In the files: what depends on /dev/kvm.
OF_KVM = re.compile('GROUP:="[0-9]+", MODE:="[0-7]+"')


class Permissions(NamedTuple):
    """Who may open a device."""

    uid: int
    gid: int
    mode: int
    #: The ACL, acl(5), as the kernel keeps it; empty without one.
    acl: bytes = b""

    @classmethod
    def of(cls, path: Path) -> Permissions:
        """Return those of a file.

        :raises OSError: it is not there.
        """
        found = path.lstat()
        acl = b""
        with contextlib.suppress(OSError):  # none there, or a file system without them
            acl = os.getxattr(path, ACL, follow_symlinks=False)
        return cls(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), acl)

    def give(self, path: Path) -> None:
        """Give them to a file; at no instant may anybody open it who may neither before nor after.

        :raises OSError: with the kernel's errno.
        """
        # With an ACL this takes away what its entries allow, too.
        path.chmod(0o600)
        with contextlib.suppress(OSError):
            os.removexattr(path, ACL)
        os.chown(path, self.uid, self.gid)
        if self.acl:
            # It sets the mode, too, whose bits for the group are the most that an entry allows.
            os.setxattr(path, ACL, self.acl)
        else:
            path.chmod(self.mode)

    @property
    def group_opens(self) -> bool:
        """Whether the group may open the file to read and write it; not with an ACL, which may say otherwise."""
        return not self.acl and self.mode >> 3 & 6 == 6

    def record(self) -> str:
        """Return them as one line."""
        return f"{self.uid} {self.gid} {self.mode:o} {self.acl.hex()}".rstrip()

    @classmethod
    def of_record(cls, line: str) -> Permissions:
        """Return those of a line of :meth:`record`.

        :raises ValueError: it is damaged.
        """
        uid, gid, mode, *acl = line.split()
        found = cls(int(uid), int(gid), int(mode, 8), bytes.fromhex("".join(acl)))
        if not (0 <= found.uid < 2**32 - 1 and 0 <= found.gid < 2**32 - 1 and 0 <= found.mode <= 0o7777):
            raise ValueError(line)
        return found

    def __str__(self) -> str:
        """Return them for people, as ``root:kvm 0660``."""
        return f"{_user(self.uid)}:{_group(self.gid)} {self.mode:04o}{' with an ACL' if self.acl else ''}"


CLOSED = Permissions(0, 0, 0o600)


def _user(uid: int) -> str:
    return "root" if uid == 0 else str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def device() -> Permissions | None:
    """Return the permissions of /dev/userfaultfd; None: there is none, as before Linux 6.1, or it is another device."""
    try:
        found = native.DEV_USERFAULTFD.lstat()
        rows = [line.split() for line in MISC.read_text().splitlines()]
    except OSError:
        return None
    numbers = [os.makedev(10, int(row[0])) for row in rows if row[1:] == ["userfaultfd"]]
    if not (stat.S_ISCHR(found.st_mode) and found.st_rdev in numbers):
        return None
    return Permissions.of(native.DEV_USERFAULTFD)


def kvm_group() -> int | None:
    """Return the group whose members may open /dev/kvm; None: none is given that, or the device is not there."""
    if native.wrong_kvm():
        return None
    found = Permissions.of(native.DEV_KVM)
    return found.gid if found.group_opens else None


def due_knob(mode: Mode) -> int:
    """Return what the native knob is to be."""
    return int(mode is Mode.ENABLED)


def due_device(mode: Mode) -> Permissions:
    """Return what the permissions of the device are to be, as /dev/kvm is now."""
    if mode is Mode.ENABLED:
        return found_device() or CLOSED
    group = kvm_group() if mode is Mode.KVM else None
    return CLOSED if group is None else Permissions(0, group, 0o660)


def found_device() -> Permissions | None:
    """Return the permissions of the device as they were found; None: they are not recorded, or it was not there."""
    with contextlib.suppress(OSError, ValueError):
        return Permissions.of_record(FOUND_DEVICE.read_text())
    return None


def policy() -> Policy | None:
    """Return what is set, or None where this backend has set nothing; a damaged record is of the strictest mode."""
    word = _read(state.NATIVE_MODE)
    if word is None:
        return None
    return Policy(Mode(word) if word in list(Mode) else Mode.DISABLED, user_mode_only=True)


def check_mode(mode: Mode) -> None:
    """Make sure that this backend can set MODE on this kernel.

    :raises Failure: it cannot.
    """
    native.check_mode(mode)
    if mode is Mode.KVM and device() is None:
        raise Failure(
            f"mode kvm does not exist here by the backend native: {native.DEV_USERFAULTFD} is not there, as before 6.1",
            "use disabled or enabled; or boot a kernel that has it; or use the backend lsm",
        )


def rules(mode: Mode) -> dict[Path, str]:
    """Return the files that keep what is set when others apply their rules, with their texts."""
    found = {SYSCTL: f"# Written by uffdguard start; uffdguard stop removes it.\n{SYSCTL_KEY} = {due_knob(mode)}\n"}
    if mode is not Mode.ENABLED:
        due = due_device(mode)
        found[UDEV_RULES] = RULE.format(uid=due.uid, gid=due.gid, mode=due.mode)
        if mode is Mode.KVM:
            found[UDEV_RULES] += FOLLOW_KVM
    return found


def fits(mode: Mode, knob: native.Knob) -> bool:
    """Tell whether all is as MODE needs it; nothing is asked."""
    return knob.read() == due_knob(mode) and wrong_device(mode) is None and not any(wrong_rules(mode))


def wrong_device(mode: Mode) -> str | None:
    """Tell what is wrong with the permissions of the device."""
    found, due = device(), due_device(mode)
    if found is None:
        return f"{native.DEV_USERFAULTFD} is not there, or is another device" if mode is Mode.KVM else None
    # In mode enabled the device is as it was found, or as somebody has made it since: udev at boot, say.
    if found == due or mode is Mode.ENABLED:
        return None
    return f"{native.DEV_USERFAULTFD} is {found} and not {due}, as mode {mode} needs it"


def wrong_rules(mode: Mode) -> Iterator[str]:
    """Yield what is wrong with each of the files that keep what is set."""
    wanted = rules(mode)
    for path in RULES:
        # What /dev/kvm was when they were written does not matter: the rule follows it.
        there, due = (OF_KVM.sub("", text) if text else None for text in (_read(path), wanted.get(path)))
        if there != due:
            yield f"{path} {'is changed' if there and due else 'is left over' if there else 'is not there'}"


def put(mode: Mode, knob: native.Knob, fds: dict[str, int], undo: contextlib.ExitStack) -> None:
    """Let everything be as MODE needs it; for whoever has the lock and has recorded the native knob.

    The mode is recorded first: a kill leaves what was, or a part of what is to be, and status names it.

    :param fds: the maps in force of the backend lsm, by name: its guard of sysctls goes by them.
    :param undo: gets what puts everything back.
    :raises OSError: the kernel or a guard refused.
    """
    before = device()
    if policy() is None:
        # Of a start or stop that was killed: nothing had been changed yet, or all was given back.
        step("record the device")
        undo.callback(FOUND_DEVICE.unlink, missing_ok=True)
        write(FOUND_DEVICE, before.record() if before else "-")
    step("record the mode")
    _replace(state.NATIVE_MODE, str(mode), undo)
    step("write the rules")
    wanted = rules(mode)
    undo.callback(_reload_udev)
    for path in RULES:
        _replace(path, wanted.get(path), undo)
    _reload_udev()
    due, value = due_knob(mode), knob.read()
    undo.callback(proof.set_knob, fds, value, knob)
    if not due:
        proof.set_knob(fds, due, knob)
    # In mode enabled it is given back if it is still as another mode has made it, and else left as somebody wants it.
    theirs = mode is Mode.ENABLED and before not in (due_device(Mode.KVM), CLOSED)
    if before and before != due_device(mode) and not theirs:
        step("set the device")
        undo.callback(before.give, native.DEV_USERFAULTFD)
        for _ in range(3):  # udev may give /dev/kvm its group, and this device with it, at this very moment
            due_device(mode).give(native.DEV_USERFAULTFD)
            if not wrong_device(mode):
                break
    if due:
        proof.set_knob(fds, due, knob)


def _replace(path: Path, text: str | None, undo: contextlib.ExitStack) -> None:
    """Let a file have TEXT, or be gone."""
    before = _read(path)
    if text == before:
        return
    undo.callback(_write, path, before)
    _write(path, text)


def _read(path: Path) -> str | None:
    """Return what a file says; None: it is not there."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _write(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink(missing_ok=True)
        return
    for directory in reversed(path.parents):
        if not directory.exists():
            directory.mkdir(exist_ok=True)
            directory.chmod(0o755)  # whatever the umask is
    write(path, text)


def _reload_udev() -> None:
    """Let udev take notice of its rules, which it otherwise looks for every three seconds."""
    udevadm = shutil.which("udevadm")
    if udevadm and UDEV_CONTROL.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([udevadm, "control", "--reload"], timeout=PATIENCE, capture_output=True, check=False)


def give_back() -> None:
    """Give back everything but the native knob as it was found; do nothing where this backend has set nothing.

    :raises OSError: the kernel refused.
    """
    if policy() is None:
        return
    step("remove the rules")
    for path in RULES:
        path.unlink(missing_ok=True)
    _reload_udev()
    if device() is not None:
        step("restore the device")
        try:
            (found_device() or CLOSED).give(native.DEV_USERFAULTFD)
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a damaged ACL
                raise
            CLOSED.give(native.DEV_USERFAULTFD)
    step("remove the mode")
    state.NATIVE_MODE.unlink()
    FOUND_DEVICE.unlink(missing_ok=True)


def ask(mode: Mode) -> None:
    """See what processes of no account get, one of them in the group of /dev/kvm.

    :raises Silence: it could not be tried.
    :raises Failure: one of them gets what MODE refuses.
    """
    step("try what is allowed")
    by_call, by_device = _answers(None)
    who, call, node = "an ordinary process", "by the system call", f"by {native.DEV_USERFAULTFD}"
    if due_knob(mode) == 0:
        _judge(who, call, by_call, errno.EPERM)
    elif native.read_knob():  # where that is closed, it is no news that nobody is allowed
        _judge(who, call, by_call, 0)
    if mode is Mode.ENABLED or device() is None:
        return
    _judge(who, node, by_device, errno.EACCES)
    group = kvm_group()
    if group is not None and (mode is Mode.DISABLED or not wrong_device(mode)):
        _, by_device = _answers(group)
        who = "a process in the group of /dev/kvm"
        _judge(who, node, by_device, 0 if mode is Mode.KVM else errno.EACCES)


def _judge(who: str, how: str, answer: int, due: int) -> None:
    """See that WHO got what is DUE.

    :raises Silence: it was refused, and not by what this backend sets.
    :raises Failure: it was allowed, and was not to be.
    """
    if answer == due:
        return
    if answer:
        # Something else, such as a seccomp filter, has come first.
        raise Silence(
            f"what is allowed could not be tried: {who} got {os.strerror(answer)} {how}",
            "see what else restricts this process, e.g. a seccomp filter",
        )
    raise Failure(f"{who} gets a userfaultfd {how}, which the mode refuses", "run uffdguard start")


def _answers(group: int | None) -> tuple[int, int]:
    """Return what a process without privileges gets by the system call and by the device: 0, or an errno.

    :param group: is the only one that it is in besides its own.
    :raises Silence: there can be none.
    """
    ours, theirs = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(ours)
        os.close(theirs)
        raise Silence(f"no process can be had to try it: {error.strerror}", "try again") from error
    if pid == 0:
        try:
            # The lock above all must not outlast us.
            os.closerange(3, theirs)
            os.closerange(theirs + 1, os.sysconf("SC_OPEN_MAX"))
            os.setgroups([] if group is None else [group])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            native.drop_capabilities()
            os.write(theirs, struct.pack("ii", probe.syscall(), probe.device()))
        finally:
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as pipe:
        ready, _, _ = select.select([pipe], [], [], PATIENCE)
        answer = pipe.read(8) if ready else b""
    # Who ignores SIGCHLD has no child to wait for.
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        if not ready:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if len(answer) != 8:
        raise Silence("the process that tries what is allowed does not answer", "try again")
    by_call, by_device = struct.unpack("ii", answer)
    return by_call, by_device


def status(interface: state.Interface) -> state.Status:
    """Find out how things stand, for whoever has the lock: what is set, whether all fits it, and what processes get."""
    wanted = policy()
    mode = wanted.mode if wanted else Mode.DISABLED
    answers: bool | None = True
    reason = knob = unread = None
    try:
        ask(mode)
    except Silence as error:
        answers, reason = None, f"it could not be asked: {error}"
    except Failure as error:
        answers, reason = False, error.what
    try:
        knob = native.read_knob()
    except Failure as error:
        unread = error.what
    found = device()
    due = due_knob(mode)
    facts = Facts(
        backend=Backend.NATIVE,
        policy=wanted,
        answers=answers,
        reason=reason,
        knob=knob,
        due=due,
        knob_problem=unread,
        device=wrong_device(mode),
        rules=tuple(wrong_rules(mode)),
        # A change of the backend that was killed.
        damage=(f"{state.PINS} is there, of the backend lsm",) if state.PINS.exists() else (),
        kvm=native.wrong_kvm() if mode is Mode.KVM else None,
        found_recorded=state.FOUND.exists(),
        device_recorded=FOUND_DEVICE.exists(),
    )
    wrong = failing(facts)
    since = state.NATIVE_MODE.stat().st_mtime if wanted else time.time()
    return state.Status(
        in_force=bool(answers) and not {"knob-fits", "device-fits"} & {condition.name for condition, _ in wrong},
        answers=answers,
        reason=reason,
        mode=mode,
        user_mode_only=True,
        audit=False,
        since=time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(since)),
        kernel=os.uname().release,
        native_knob=knob,
        drift=knob not in (due, None),
        pins={},
        skipped=0,
        lost=0,
        guard=None,
        interface=interface,
        grants=0,
        allowed=0,
        refused=0,
        decisions=dict.fromkeys(Reason, 0),
        native=0,
        let_pass=0,
        suppressed=0,
        sysctl_refused=0,
        problems=[sentence for _, sentence in wrong],
        failing=list(dict.fromkeys(condition.name for condition, _ in wrong)),
        backend=Backend.NATIVE,
        device=str(found) if found else None,
        weaker=WEAKER,
    )
