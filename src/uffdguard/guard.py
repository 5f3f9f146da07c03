"""The life of the enforcement: start, stop and the change of the mode.

The rule for every order of steps here: a ``kill -9`` between any two of them leaves the system no laxer than
the laxer of the old and the new setting, and the next start or stop puts it right. So nothing is pinned before
it was seen to refuse, and the native knob is relaxed last and closed first.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from uffdguard import native_backend, proof
from uffdguard.errors import Failure
from uffdguard.kernel import features, layout, libbpf, native
from uffdguard.lock import locked
from uffdguard.policy import Backend, Mode, Policy, Reason, Request, decide
from uffdguard.proof import Asker
from uffdguard.state import (
    CONFIGURED,
    COUNTERS,
    FOUND,
    LINKS,
    LOADED,
    PARTS,
    PINS,
    USES,
    Pinned,
    backend,
    foreign_pins,
    found_knob,
    is_counting,
    knob_of,
    link_of,
    not_in_force,
    pinned,
    read_policy,
    server,
    status,
)
from uffdguard.steps import Steps, log, write

if TYPE_CHECKING:
    from pathlib import Path

#: The steps of start, mode and stop.
STEPS = Steps(
    (
        "mount bpffs",
        "record the native knob",
        "load",
        "attach grant",
        "attach granted",
        "attach administrators",
        "attach guard_sysctl",
        "seed",
        "attach decide",
        "ask the guard of sysctls",
        "ask strictly",
        "set the policy",
        "ask",
        *(f"pin {part}" for part in PARTS),
        "set the native knob",
        "ask by system call",
        "count native refusals",
        "record the object",
        "close the native knob",
        "uncover the native file",
        *(f"unpin {part}" for part in reversed(PARTS)),
        "restore the native knob",
        "remove the records",
    )
)
step = STEPS.take

#: The limit on the events of all users.
EVENTS_PER_SECOND = 1000


class Started(NamedTuple):
    """What a start has done."""

    #: Whether anything had to be done.
    changed: bool
    #: The policy that was in force before, if any was.
    before: Policy | None
    #: The policy that is in force now.
    policy: Policy


def start(
    configured: Policy, mode: Mode | None = None, *, audit: bool | None = None, events_per_second: int = 20
) -> Started:
    """Put the policy in force, or bring what is there to what is wanted.

    A mode that is set already stays as it is unless MODE is given. So does whether refusals are carried out, unless
    AUDIT is given or the configuration has changed in that. The other options are the configuration's.

    :param configured: what the configuration files say.
    :param mode: the mode that was asked for on the command line.
    :param audit: whether refusals are let pass, as asked for on the command line.
    :param events_per_second: how many events one user may cause.
    :raises Failure: it could not be done; what was done is undone.
    """
    try:
        features.require()
    except Failure:
        # A policy that decides no more for that very reason, say: the native knob below it is closed.
        if PINS.exists() and os.geteuid() == 0:
            status()
        raise
    _await_server()
    with locked(), contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        _mount(undo)
        found = held.enter_context(pinned())
        if problem := foreign_pins():
            raise Failure(problem, "remove it and run start again")
        current = found.policy() if found.has("decide") or LOADED.exists() else None
        wanted = configured._replace(
            mode=mode or (current or native_backend.policy() or configured).mode,
            audit=_wanted_audit(configured, current, audit),
        )
        native.check_mode(wanted.mode)
        # What a server that has died left, or whoever was about to cover the file.
        if not native.is_covered() or (not server() and native.is_deserted()):
            native.uncover()
        knob = held.enter_context(native.Knob())
        _record_knob(knob, undo, ours=found.has("decide") or backend() is not None)
        asker = held.enter_context(Asker())
        older: set[int] = set()
        if _answers(found, current, asker, knob) and found.complete and _same_object():
            fds, due = found.fds, knob_of(wanted)
            changed = current != wanted or knob.read() != due or found.counts_native is not (due == 0)
            changed |= _has_news(found)
            if changed:
                _change(fds, wanted, asker, knob, undo)
        else:
            changed = True
            fds = _replace(found, wanted, asker, knob, held, undo)
            older = {program.id for program in found.programs.values()} - _ids(fds)
            _unpin_others()
        _limit(fds, events_per_second)
        _acknowledge(fds)
        _write_once(CONFIGURED, _audit_word(configured))
        step("record the object")
        _write_once(LOADED, _object_hash())
        undo.pop_all()
        native_backend.give_back()
    libbpf.await_end(older)
    return Started(changed, current, wanted)


def start_native(configured: Policy, mode: Mode | None = None) -> Started:
    """Put the policy in force by the backend ``native``, in the place of ``lsm`` where that is.

    :param configured: what the configuration files say.
    :param mode: the mode that was asked for on the command line.
    :raises Failure: it could not be done; what was done is undone, unless it has taken the place of ``lsm`` already.
    """
    features.require(*features.NATIVE_CHECKS)
    with locked(), contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        left = sorted(PINS.iterdir()) if PINS.is_dir() else []
        found = held.enter_context(pinned()) if left else Pinned()
        if problem := foreign_pins():
            raise Failure(problem, "remove it and run start again")
        # A policy of lsm that has not come into force, as of a start that was killed, says nothing.
        current = found.policy() if found.has("decide") or LOADED.exists() else None
        current = current or native_backend.policy()
        wanted = Policy(mode or (current or configured).mode, user_mode_only=True)
        native_backend.check_mode(wanted.mode)
        knob = held.enter_context(native.Knob())
        changed = bool(left) or not (current and native_backend.fits(wanted.mode, knob)) or current.mode != wanted.mode
        ours = backend() is not None
        changed |= not (ours and FOUND.exists())
        try:
            if changed:
                _record_knob(knob, undo, ours=ours)
                native_backend.put(wanted.mode, knob, found.fds, undo)
            if left or LOADED.exists():
                # From here on there is no way back, and nothing laxer ahead: all but UFFD_USER_MODE_ONLY is closed.
                undo.pop_all()
                programs = [program.id for program in found.programs.values()]
                held.pop_all().close()
                _end_policy(left, programs)
                CONFIGURED.unlink(missing_ok=True)
            native_backend.ask(wanted.mode)
        except OSError as error:
            raise Failure(f"cannot put the policy in force: {error}", "see uffdguard doctor") from error
        undo.pop_all()
    return Started(changed, current, wanted)


def _record_knob(knob: native.Knob, undo: contextlib.ExitStack, *, ours: bool) -> None:
    """Record the native knob as it was found, unless that is done.

    :param ours: whether a policy of ours is in force, so that the knob is no more as it was found.
    """
    if ours and FOUND.exists():
        return
    step("record the native knob")
    # With a policy in force and its record lost, the knob's value is ours and not what was found. A record that
    # a killed start or stop has left may be older than a change that somebody made since: the stricter counts.
    value = 0 if ours else min(knob.read(), found_knob(otherwise=1))
    if not FOUND.exists():
        undo.callback(FOUND.unlink, missing_ok=True)
    write(FOUND, str(value))


def _wanted_audit(configured: Policy, current: Policy | None, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    with contextlib.suppress(OSError):
        if current and CONFIGURED.read_text() == _audit_word(configured):
            return current.audit
    # A start that was killed has not come to write it.
    return current.audit if current and not CONFIGURED.exists() else configured.audit


def _audit_word(configured: Policy) -> str:
    return "audit" if configured.audit else "enforce"


def _write_once(path: Path, text: str) -> None:
    """Write a file where it does not say TEXT already."""
    if not path.exists() or path.read_bytes() != text.encode():
        write(path, text)


def _answers(found: Pinned, policy: Policy | None, asker: Asker, knob: native.Knob) -> bool:
    """Ask what is in force, if anything is: the guard of sysctls first, so that nothing is switched off in between.

    What does not answer is to be replaced; below a policy that does not, the native knob is closed meanwhile.

    :raises Silence: it could not be asked.
    """
    if not found.has("decide"):
        return False
    guarded = True
    try:
        if found.can_guard:
            proof.ask_guard(found.fds["witness"], knob)
    except (Failure, OSError) as error:
        log.debug("%s", error)
        guarded = False
    try:
        proof.see(found.fds, policy, asker, knob)
    except proof.Silence:
        raise
    except (Failure, OSError) as error:  # OSError: another version's maps
        log.debug("%s", error)
        return False
    return guarded


def _has_news(found: Pinned) -> bool:
    """Tell whether hooks were skipped, grants lost, or the policy did not answer since the last start."""
    seen = libbpf.read(found.fds["enforcement"], layout.Enforcement)
    lost = libbpf.read(found.fds["counts"], layout.Counts).total().lost
    return bool(seen.unanswered_since) or (found.skipped, lost) != (seen.skips_seen, seen.lost_seen)


def _acknowledge(fds: dict[str, int]) -> None:
    """Note how many hooks were skipped and grants lost: only what comes on top is news."""
    programs = [libbpf.program_of_link(fds[name]) for name in LINKS if name in fds]
    programs += [libbpf.info(fds[name], libbpf.ProgramInfo) for name in COUNTERS]
    skipped = sum(program.recursion_misses for program in programs)
    lost = libbpf.read(fds["counts"], layout.Counts).total().lost
    for member, value in (("skips_seen", skipped), ("lost_seen", lost), ("unanswered_since", 0)):
        libbpf.store(fds["enforcement"], layout.Enforcement, member, value)


def _ids(fds: dict[str, int]) -> set[int]:
    """Return the ids of the programs of these links and programs."""
    ids = {libbpf.info(fds[name], libbpf.LinkInfo).prog_id for name in LINKS if name in fds}
    return ids | {libbpf.info(fds[name], libbpf.ProgramInfo).id for name in COUNTERS}


def _await_server() -> None:
    """Let the server of the interface file pin again what it holds and what is not pinned any more."""
    if not server():
        return
    with locked(), contextlib.ExitStack() as undo:
        _mount(undo)
        if not foreign_pins():
            native.make_own(PINS)  # which the server may not
        undo.pop_all()
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with pinned() as found:
            if found.complete:
                return
        time.sleep(0.1)


def _end_server() -> None:
    """End the server of the interface file, which holds references to the programs."""
    pid = server()
    if not pid:
        return
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended meanwhile
        return
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if server() == pid:
                signal.pidfd_send_signal(process, number)
                select.select([process], [], [], 3)
    finally:
        os.close(process)


def _mount(undo: contextlib.ExitStack) -> None:
    """Make sure that a bpffs is mounted that can be written: one that cannot opens no pin either."""
    try:
        if not native.is_bpffs(native.BPFFS):
            step("mount bpffs")
            native.mount("bpf", native.BPFFS, "mode=0700")  # else everybody may make directories there
            undo.callback(native.unmount, native.BPFFS)
        elif native.is_read_only(native.BPFFS):
            step("mount bpffs")
            native.remount(native.BPFFS, read_only=False)
            undo.callback(native.remount, native.BPFFS, read_only=True)
        # After an older version, or a kill.
        if PINS.is_dir() and not foreign_pins():
            native.make_own(PINS)
        if (native.RUN / "proc").exists():
            native.unmount(native.RUN / "proc")
            _remove_if_empty(native.RUN / "proc")
    except OSError as error:
        raise Failure(
            f"cannot mount {error.filename}: {error.strerror}", "run it on the host itself, with CAP_SYS_ADMIN"
        ) from error


def _limit(fds: dict[str, int], events_per_second: int) -> None:
    for name, number in (("per_owner", events_per_second), ("total", EVENTS_PER_SECOND)):
        libbpf.store(fds["watching"], layout.Watching, name, number)


def _replace(
    found: Pinned,
    wanted: Policy,
    asker: Asker,
    knob: native.Knob,
    held: contextlib.ExitStack,
    undo: contextlib.ExitStack,
) -> dict[str, int]:
    """Load, attach, try and pin the programs of our object; the older ones decide until the new ones have proved.

    The policy is kept where a program decides by it: older and newer are attached together for a while. The grants
    are kept when the hook that gives them was never missing, so that running virtual machines keep theirs; otherwise
    they begin anew and empty: a repair grants nobody, since a process that holds /dev/kvm then may have been passed it.
    The same goes for an upgrade from a version whose grants are of another kind: only the policy is kept.

    :returns: descriptors of all parts.
    """
    first = not found.has("decide") and not LOADED.exists()
    keep = {"policy"} if found.has("decide") else set()
    if "enforcement" in found.fds:
        # Whatever else is damaged: the guard that is attached goes by it.
        keep.add("enforcement")
    can_guard = features.has_sysctl_guard()
    try:
        obj = held.enter_context(libbpf.Object(features.OBJECT))
        layout.check(obj)
        if not first and found.has("grant") and obj.fits("grants", found.fds["grants"]):
            keep |= {"grants", "counts", "events", "watching"}
        kept = set()
        for name in keep & found.fds.keys():
            # Another version may have another number of reasons to count.
            if obj.fits(layout.map_name(name), found.fds[name]):
                obj.reuse(layout.map_name(name), found.fds[name])
                kept.add(name)
        features.aim(obj)
        if not can_guard:
            obj.leave_out("guard_sysctl")
        step("load")
        obj.load()
    except OSError as error:
        log.debug("%s", "\n".join(libbpf.messages))
        raise Failure(f"cannot load the policy: {features.load_error(error)}", features.load_hint(error)) from error
    fds = {name: obj.map_fd(layout.map_name(name)) for name in PARTS if name not in USES}
    fds |= {name: obj.program_fd(name) for name in COUNTERS}
    if wanted.audit and not found.has("decide"):
        # What is attached below would refuse until the policy is set; the strict question is not asked of this.
        libbpf.write(fds["policy"], layout.Word.of(wanted))
    if "enforcement" not in kept:
        libbpf.store(fds["enforcement"], layout.Enforcement, "knob", knob.read())
    try:
        for name in LINKS:
            if name == "guard_sysctl" and not can_guard:
                continue
            if _is_the_same(found, obj, name):
                fds[name] = found.fds[name]
                continue
            if name == "decide" and first:
                step("seed")
                obj.run_iterator("seed")
            step(f"attach {name}")
            fds[name] = _attach(obj, name)
            held.callback(os.close, fds[name])
    except OSError as error:
        raise Failure(f"cannot attach the policy: {error}", "see uffdguard doctor") from error
    if can_guard:
        # Before the policy, so that nothing is switched off in between.
        step("ask the guard of sysctls")
        proof.ask_guard(fds["witness"], knob)
    _change(fds, wanted, asker, knob, undo, pin_over=found)
    return fds


def _is_the_same(found: Pinned, obj: libbpf.Object, name: str) -> bool:
    """Tell whether the program that grants is attached already and fills the map that OBJ has.

    Each attaching to or detaching from a function makes its trampoline anew, and a call that is in flight then runs no
    fexit program: an opener of /dev/kvm would lose its grant, and nothing counts that.
    """
    if name != "grant" or not found.has("grant"):
        return False
    if libbpf.info(obj.program_fd(name), libbpf.ProgramInfo).tag != found.programs[name].tag:
        return False
    return all(libbpf.same_map(obj.map_fd(layout.map_name(used)), found.fds[used]) for used in LINKS[name])


def _attach(obj: libbpf.Object, name: str) -> int:
    match name:
        case "administrators" | "granted":
            return obj.attach_iterator(name)
        case "guard_sysctl":
            with features.cgroup_root() as root:
                return obj.attach_cgroup(name, root)
    return obj.attach(name)


def _change(
    fds: dict[str, int],
    wanted: Policy,
    asker: Asker,
    knob: native.Knob,
    undo: contextlib.ExitStack,
    *,
    pin_over: Pinned | None = None,
) -> None:
    """Set the policy of attached programs, see it answer, and only then let the native knob follow.

    :param pin_over: pin FDS in the place of these before the native knob is touched.
    On the way out after a failure the older policy stands again, and the native knob is no laxer than before.
    """
    expected = decide(wanted, asker.request)
    try:
        step("ask strictly")
        asker.ask(fds["witness"], Reason.DISABLED, strict=True)
        value, due = knob.read(), knob_of(wanted)
        before = libbpf.read(fds["policy"], layout.Word)
        if due < value:
            _set_knob(fds, due, value, knob, undo)
        step("set the policy")
        libbpf.write(fds["policy"], layout.Word.of(wanted))
        undo.callback(libbpf.write, fds["policy"], before)
        step("ask")
        asker.ask(fds["witness"], expected, audit=wanted.audit)
        if pin_over:
            for part in PARTS:
                if part in fds:
                    step(f"pin {part}")
                    _pin(part, fds[part], pin_over.fds.get(part), undo)
        if due >= value:
            _set_knob(fds, due, value, knob, undo)
        if due:
            step("ask by system call")
            asker.ask(fds["witness"], decide(wanted, Request()), by_syscall=True, audit=wanted.audit)
        _count_native(fds, due == 0, undo)
    except OSError as error:
        raise Failure(f"cannot put the policy in force: {error}", "see uffdguard doctor") from error


def _set_knob(fds: dict[str, int], due: int, value: int, knob: native.Knob, undo: contextlib.ExitStack) -> None:
    """Let the native knob be DUE; it is closed before the policy is set, and opened when that was seen to answer."""
    step("set the native knob")
    # Whatever went wrong after this, an older policy of ours or none needs no more than it had.
    undo.callback(proof.set_knob, fds, value, knob)
    proof.set_knob(fds, due, knob)


def _count_native(fds: dict[str, int], wanted: bool, undo: contextlib.ExitStack) -> None:
    """Begin or end to count the refusals of the native knob: each allowed system call pays for it."""
    step("count native refusals")
    programs = {name: libbpf.info(fds[name], libbpf.ProgramInfo) for name in COUNTERS}
    for name, program in programs.items():
        place = PINS / link_of(name)
        if wanted:
            if is_counting(name, program) or (
                name != "native" and program.attach_btf_id == programs["native"].attach_btf_id
            ):
                continue
            link = libbpf.attach_fexit(fds[name])
            try:
                undo.callback(place.unlink, missing_ok=True)
                _pin_at(place, link)
            finally:
                os.close(link)
            last = libbpf.read(fds["watching"], layout.Watching).round
            libbpf.store(fds["watching"], layout.Watching, "round", last % 0xFFFFFFFF + 1)
        else:
            place.unlink(missing_ok=True)


def _pin(part: str, fd: int, older: int | None, undo: contextlib.ExitStack) -> None:
    """Pin FD as PART, in the place of the OLDER."""
    native.make_own(PINS)
    undo.callback(_remove_if_empty, PINS)
    place = PINS / part
    _pin_at(place, fd)
    if older is None:
        undo.callback(place.unlink, missing_ok=True)
    else:
        undo.callback(_pin_at, place, older)


def _pin_at(place: Path, fd: int) -> None:
    """Pin FD in one move, so that at every instant what was there before or FD is pinned."""
    fresh = place.with_name(f"new-{place.name}")
    fresh.unlink(missing_ok=True)
    libbpf.pin(fd, fresh)
    fresh.chmod(0o600)
    fresh.rename(place)


def _unpin_others() -> None:
    """Remove what an older version has pinned and this one does not have: a link's program would go on running."""
    ours = {*PARTS, *map(link_of, COUNTERS)}
    for path in [path for path in PINS.iterdir() if path.name not in ours]:
        path.unlink(missing_ok=True)


def set_mode(mode: Mode) -> Policy:
    """Switch the mode of a policy that is in force, and return what is then.

    :raises Failure: none is in force, or it does not answer.
    """
    native.need_root("switches the mode")
    if backend() is Backend.NATIVE:
        return start_native(Policy(), mode).policy
    with locked(), pinned() as found:
        if not found.complete:
            if not found.pins:
                raise not_in_force()
            raise Failure(f"the policy is damaged: {', '.join(found.problems)}", "run uffdguard start")
        with Asker() as asker, native.Knob() as knob:
            proof.see(found.fds, found.policy(), asker, knob)
            return switch(found.fds, mode, asker, knob)


def switch(fds: dict[str, int], mode: Mode, asker: Asker, knob: native.Knob) -> Policy:
    """Switch the mode and return the new policy; the caller has the lock and the descriptors of the maps in force.

    :raises Failure: the mode does not exist here, or the policy does not answer.
    """
    native.check_mode(mode)
    current = read_policy(fds["policy"])
    if current is None:
        raise Failure("the policy cannot be read", "run uffdguard start")
    with contextlib.ExitStack() as undo:
        wanted = current._replace(mode=mode)
        _change(fds, wanted, asker, knob, undo)
        undo.pop_all()
    return wanted


def set_found(fds: dict[str, int], value: int, asker: Asker, knob: native.Knob) -> None:
    """Take VALUE for what the native knob was found with, in audit: there it is meant for the kernel.

    The caller has the lock, as for :func:`switch`.

    :raises Failure: the policy does not answer, or is not in audit.
    """
    policy = read_policy(fds["policy"])
    if policy is None or not policy.audit:
        raise Failure("the policy is not in audit", "run uffdguard start --audit")
    write(FOUND, str(value))
    with contextlib.ExitStack() as undo:
        _change(fds, policy, asker, knob, undo)
        undo.pop_all()


def stop() -> bool:
    """Take the policy out of force and give the native knob the value that it was found with.

    Needs neither libbpf nor a working policy.

    :returns: whether there was anything to take away.
    """
    native.need_root("takes the policy out of force")
    with locked(), contextlib.ExitStack() as undo:
        left = sorted(PINS.iterdir()) if PINS.is_dir() and not foreign_pins() else []
        if not (left or any(native.RUN.iterdir()) or native.VISIBLE_PROC.parent.exists()):
            return False
        if left or LOADED.exists():  # the backend native may be on a kernel without bpffs
            _mount(undo)
        undo.pop_all()
        programs: list[int] = []
        if left:
            # Without libbpf we do not wait for their end.
            with contextlib.suppress(Failure), pinned() as found:
                programs = [program.id for program in found.programs.values()]
                with contextlib.suppress(OSError, KeyError):
                    libbpf.store(found.fds["enforcement"], layout.Enforcement, "knob", 0)
        # Without any of these a start was killed before it had changed the knob, or a stop after it had restored it.
        if left or FOUND.exists() or backend() is not None:
            step("close the native knob")
            _close_knob()
        _end_policy(left, programs)
        native_backend.give_back()
        step("restore the native knob")
        if FOUND.exists():
            # Only a 1 that was found opens it; what cannot be read does not.
            native.write_knob(found_knob(otherwise=0))
            FOUND.unlink()
        step("remove the records")
        # The server's files, and what a kill has left.
        for path in native.RUN.iterdir():
            path.unlink()
        return True


def _end_policy(left: list[Path], programs: list[int]) -> None:
    """Take away what is pinned, and return when nothing of it decides any more.

    :param left: what is in the directory of the pins.
    :param programs: the ids of the programs among that.
    """
    step("uncover the native file")
    _end_server()
    native.uncover()
    for path in sorted(left, key=lambda path: PARTS.index(path.name) if path.name in PARTS else -1, reverse=True):
        if path.name in PARTS:
            step(f"unpin {path.name}")
        path.unlink(missing_ok=True)
    if left:
        PINS.rmdir()
    libbpf.await_end(programs)
    LOADED.unlink(missing_ok=True)


def _close_knob() -> None:
    """Set the native knob to 0, without the guard of sysctls if there is no other way."""
    end = time.monotonic() + 5
    while True:
        try:
            return native.write_knob(0)
        except PermissionError:
            if time.monotonic() > end:
                raise
        (PINS / "guard_sysctl").unlink(missing_ok=True)
        time.sleep(0.02)


def _object_hash() -> str:
    import hashlib  # brings libcrypto into memory, which the server of the interface file does without

    return hashlib.sha256(features.OBJECT.read_bytes()).hexdigest()


def _same_object() -> bool:
    return LOADED.exists() and LOADED.read_bytes() == _object_hash().encode()


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
