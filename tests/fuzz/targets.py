"""What is fuzzed: each target takes any bytes, hands them to the product, and raises where a promise is broken.

A target is a function with ``@target`` and a directory of its name in ``seeds``. The parts of its input are
separated by a byte that they cannot have.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import functools
import importlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import tomllib
import unicodedata
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from uffdguard import cli, config, fuse, guard, inspect, install, knob, page, report, state
from uffdguard import events as decisions
from uffdguard.cli.report import facts, show
from uffdguard.cli.watch import Lines, Objects
from uffdguard.errors import Failure, one_line
from uffdguard.journal import MISSING_ID, NOTICE_ID, of_entry, to_event, to_sysctl_write
from uffdguard.kernel import features, layout, libbpf, native, probe
from uffdguard.lab import kernels, vm
from uffdguard.policy import Backend, Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What is imported later is not instrumented.
for verb in cli.VERBS:
    importlib.import_module(f"uffdguard.cli.{verb}")

PR_SET_NAME = 15

TARGETS: dict[str, Callable[[bytes], None]] = {}

#: Events of sys.addaudithook() that may change something outside of this process; and the open of a file to write.
CHANGES = re.compile(r"os\.(?!scandir|listdir)|subprocess\.|socket\.|ctypes\.|shutil\.|signal\.|pty\.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """Forbids the product, while it is entered, to change anything but what is below the scratch directory."""

    on = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        changes = arguments[2] & WRITES if event == "open" else CHANGES.match(event)
        # Of what is open already: fchmod(2) is told as a chmod.
        opened = event == "os.chmod" and isinstance(arguments[0], int)
        if changes and not opened and not str(arguments[0]).startswith(f"{scratch()}/"):
            raise AssertionError(f"{event} {arguments}")

    def __enter__(self) -> None:
        self.on = sys.dont_write_bytecode = True

    def __exit__(self, *error: object) -> None:
        self.on = sys.dont_write_bytecode = False


watch = Watch()


@functools.cache
def scratch() -> Path:
    """Return a directory for the files of this process, which from now on is watched."""
    directory = Path(tempfile.mkdtemp(prefix="uffdguard-fuzz-"))
    atexit.register(shutil.rmtree, directory)
    sys.addaudithook(watch)
    return directory


def target(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[function.__name__] = function
    return function


@contextlib.contextmanager
def replaced(*places: Any, **values: Any) -> Iterator[None]:
    """Have VALUES as attributes of each of PLACES that has one of the name; one at least has."""
    for name in values:
        assert any(hasattr(place, name) for place in places), name
    with contextlib.ExitStack() as stack:
        for place in places:
            mine = {name: value for name, value in values.items() if hasattr(place, name)}
            stack.enter_context(patch.multiple(place, **mine))
        yield


def check_line(text: str) -> None:
    """See that TEXT is one line, whatever it quotes."""
    assert text and text.isprintable(), repr(text)


def put(path: Path, data: bytes | None) -> None:
    """Have DATA in the file, or no file."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)


CHOICES: dict[str, tuple[str, ...]] = {
    "mode": tuple(Mode),
    "user-mode-only": ("deny", "allow"),
    "numeric": ("refuse", "accept"),
    "backend": ("lsm", "native"),
}


def what_toml_says(data: bytes) -> dict[str, str] | list[str]:
    """Return what the bytes of one file ask for, by tomllib alone; or what there is to say against them."""
    try:
        said = tomllib.load(io.BytesIO(data))
    except (ValueError, RecursionError):
        return [""]
    against = [
        f"{key}: must be one of {', '.join(CHOICES[key])}, in quotes" if key in CHOICES else f"{key}: no such key"
        for key, value in said.items()
        if not isinstance(value, str) or value not in CHOICES.get(key, ())
    ]
    return against or said


@target
def configuration(data: bytes) -> None:
    """The distribution's file, the administrator's and a drop-in: what they say, or one line about the first bad one.

    The parts are separated by ``\\x1e``.
    """
    (scratch() / "d").mkdir(exist_ok=True)
    paths = [scratch() / "default.toml", scratch() / "administrator.toml", scratch() / "d/10.toml"]
    parts = data.split(b"\x1e", 2)
    for path, part in itertools.zip_longest(paths, parts):
        put(path, part)
    says = [what_toml_says(part) for part in parts]
    try:
        with replaced(config, DEFAULT=paths[0], ADMINISTRATOR=paths[1], DROP_INS=scratch() / "d"), watch:
            found = config.load()
    except Failure as failure:
        check_line(str(failure))
        bad, against = next((n, said) for n, said in enumerate(says) if isinstance(said, list))
        assert str(failure).startswith(str(paths[bad])), failure
        assert any(one_line(text) in str(failure) for text in against), failure
        if line := re.search(r"line (\d+)", str(failure)):
            assert 1 <= int(line[1]) <= parts[bad].count(b"\n") + 1, failure
        return
    whole: dict[str, Any] = {"mode": "disabled", "user-mode-only": "deny", "numeric": "refuse", "enforce": True}
    whole |= {"events-per-second": 20, "backend": "lsm"}
    for said in says:
        assert isinstance(said, dict), "a file that is no configuration was taken"
        whole |= said
    assert found == config.Configuration(
        Policy(Mode(whole["mode"]), whole["user-mode-only"] == "allow", not whole["enforce"]),
        whole["numeric"] == "accept",
        whole["events-per-second"],
        Backend(whole["backend"]),
        any("user-mode-only" in said for said in says) and whole["user-mode-only"] == "deny",
    ), (found, whole)


@target
def interface(data: bytes) -> None:
    """A write to the interface file: one of its words and nothing else switches the mode, to just that word.

    A byte of facts, the name of the process that writes, ``\\0``, what it writes.
    """
    facts = data[0] if data else 0
    capable, numeric, kvm, later, audit = (bool(facts >> bit & 1) for bit in range(5))
    name, _, written = data[1:].partition(b"\0")
    server = object.__new__(knob.Server)
    server.words = tuple(Mode) if kvm else (Mode.DISABLED, Mode.ENABLED)
    server.held, server.asker = {"administrators": 0}, SimpleNamespace()  # type: ignore[assignment]
    server.native_knob = SimpleNamespace()  # type: ignore[assignment]
    server.directory = knob._identity(state.PINS)
    asked: list[Mode | int] = []
    lines: list[str] = []
    log = SimpleNamespace(warning=lambda text, *values: lines.append(text % values))
    thread = os.getpid()
    ctypes.CDLL(None).prctl(PR_SET_NAME, name[:15])
    # The header, and struct fuse_write_in.
    header = struct.pack("=IIQQIIII", 80 + len(written), 16, 5, 1, 0, 0, thread, 0)
    request = header + struct.pack("=QQIIQII", 0, int(later), len(written), 0, 0, 1, 0) + written
    with (
        replaced(libbpf, iterate=lambda link: thread.to_bytes(4, "little") * capable),
        replaced(
            guard,
            switch=lambda held, mode, asker, knob: asked.append(mode),
            set_found=lambda held, value, asker, knob: asked.append(value),
        ),
        replaced(knob, log=log, locked=contextlib.nullcontext),
        replaced(
            knob.Server,
            hold=lambda self: None,
            accepts_numbers=lambda self: numeric,
            current=lambda self: Policy(audit=audit),
        ),
        watch,
    ):
        length, error, unique = struct.unpack_from("=IiQ", reply := fuse.answer(request, server))
    assert (length, unique) == (len(reply), 5)
    for line in lines:
        check_line(line)
    word = re.fullmatch(rb"[ \t\n]*([a-z01]+)[ \t\n]*", written)
    words: dict[bytes, Mode | int] = {str(mode).encode(): mode for mode in server.words}
    if audit:  # they are meant for the kernel's own knob
        words |= {b"0": 0, b"1": 1}
    elif numeric:
        words |= {b"0": Mode.DISABLED, b"1": Mode.ENABLED}
    mode = words.get(word[1]) if word and len(written) <= knob.LONGEST and not later else None
    if not capable:
        assert (-error, asked) == (errno.EPERM, [])
    elif mode is None:
        assert (-error, asked) == (errno.EINVAL, [])
    else:
        assert (error, reply[16:], asked) == (0, struct.pack("=II", len(written), 0), [mode])


@target
def protocol(data: bytes) -> None:
    """A request to the server of the interface file gets one answer, in its form; or none where none is wanted.

    A byte that says what is asked for, and what follows the header.
    """
    taken: list[bytes] = []
    file = SimpleNamespace(
        read=lambda: b"content\n",
        check_writer=lambda thread: None,
        write=lambda written, offset, thread: taken.append(written),
    )
    operation = data[0] if data else 0
    request = struct.pack("=IIQQIIII", 39 + len(data), operation, 6, 1, 0, 0, 7, 0) + data[1:]
    reply = fuse.answer(request, file)
    assert not taken or (operation == 16 and taken[0] in data)
    if operation in (2, 42):
        assert reply == b""
        return
    length, error, unique = struct.unpack_from("=IiQ", reply)
    assert (length, unique) == (len(reply), 6)
    assert -errno.ENOSYS <= error <= 0
    assert not error or length == 16


STATUS = state.Status(
    in_force=True,
    answers=True,
    reason=None,
    mode=Mode.KVM,
    user_mode_only=False,
    audit=False,
    since=None,
    kernel="6.12",
    native_knob=1,
    drift=False,
    pins=dict.fromkeys(state.PARTS, True),
    skipped=0,
    lost=0,
    guard="attached",
    interface="native",
    grants=1,
    allowed=1,
    refused=1,
    decisions={},
    native=0,
    let_pass=0,
    suppressed=0,
    sysctl_refused=0,
    problems=[],
    failing=[],
)
WAYS = ("syscall", "syscall-user-mode-only", "device")
ANSWER = inspect.Answer(
    subject="pid 1 (x)",
    allowed=False,
    reason="disabled",
    why="mode is disabled",
    mode=Mode.DISABLED,
    native_knob=0,
    capability=False,
    granted=False,
    user_mode_only=None,
    would_allow=["uffdguard mode enabled"],
)
REPORT = report.Report(user_mode_only=False)
REPORT.add(b"damaged")
#: What each verb does, at the boundary below which something is asked or changed; with its result.
EFFECTS: dict[tuple[object, str], object] = {
    (guard, "start"): guard.Started(False, None, Policy()),
    (guard, "stop"): False,
    (guard, "set_mode"): Policy(Mode.KVM),
    (state, "status"): STATUS,
    (state, "current_policy"): Policy(Mode.KVM),
    (native, "need_root"): None,
    (native, "uncover"): None,
    (native, "is_covered"): False,
    (native, "has_kvm"): True,
    (features, "rows"): [features.Row("kernel", "warning", "6.1", "boot a newer one")],
    (features, "program_rows"): [],
    (inspect, "looking"): contextlib.nullcontext((None, None)),
    (inspect, "holders"): [],
    (inspect, "check_process"): ANSWER,
    (inspect, "check_command"): ANSWER,
    (report, "read"): REPORT,
    (page, "save"): None,
    (probe, "every_way"): dict.fromkeys((*WAYS, "kvm", *(f"{way}-after-kvm" for way in WAYS)), "EPERM"),
    (knob, "run"): None,
    (knob, "main"): None,
    (knob, "mount"): None,
    (importlib.import_module("uffdguard.cli.install"), "completion"): "",  # runs bash
    (install, "install"): install.Installed(Mode.KVM, None, Mode.KVM),
    (install, "uninstall"): ["/etc/changed"],
    (vm, "run"): 0,
    (kernels, "fetch"): None,
    (kernels, "table"): [("6.1", True, None)],
}
#: Those that only look.
QUESTIONS = {
    "completion",
    "need_root",
    "is_covered",
    "has_kvm",
    "status",
    "current_policy",
    "rows",
    "program_rows",
    "looking",
    "holders",
    "check_process",
    "check_command",
    "read",
    "every_way",
    "table",
}
OUTCOMES = (None, Failure("it is so", "do that"), OSError(errno.EPERM, "Operation not permitted", "/a\n\x1b[b"))


@target
def arguments(data: bytes) -> None:
    """The command line: status 0, 1 or 2, one line of error, and nothing done that the words do not ask for.

    A byte that chooses how the verb's work ends, then the words, separated by ``\\0``.
    """
    outcome = OUTCOMES[data[0] % len(OUTCOMES)] if data else None
    words = [os.fsdecode(word) for word in data[1:].split(b"\0")]
    done: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def effect(name: str, result: object) -> Callable[..., object]:
        def act(*values: object, **options: object) -> object:
            if name not in QUESTIONS:
                done.append((name, values, options))
                if outcome:
                    raise outcome
            return result

        return act

    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    escaped: BaseException | None = None
    status: object = None
    with contextlib.ExitStack() as stack:
        for (place, name), result in EFFECTS.items():
            stack.enter_context(replaced(place, **{name: effect(name, result)}))
        stack.enter_context(replaced(sys, stdout=out, stderr=err, stdin=io.StringIO()))
        # They would stay after this call.
        stack.enter_context(patch("logging.basicConfig"))
        stack.enter_context(patch("signal.signal"))
        stack.enter_context(replaced(kernels, cache=lambda: scratch() / "cache"))
        stack.enter_context(replaced(config, files=list))
        stack.enter_context(watch)
        try:
            cli.main(words)
        except SystemExit as end:
            status = end.code or 0
        except (Failure, OSError) as error:
            escaped = error
    for stream in (out, err):
        stream.flush()
    shown, told = (stream.buffer.getvalue().decode() for stream in (out, err))

    leading = itertools.takewhile(lambda word: word not in cli.VERBS, words)
    if escaped:
        assert "--debug" in leading, f"a traceback without --debug: {escaped!r}"
        return
    assert status in (0, 1, 2)
    if told:
        assert status, told
        assert told.endswith("\n")
        check_line(told[:-1])
        assert not shown or "watch" in words  # until the policy is gone
    if status == 2:
        assert told
        assert not done
    if outcome and done:
        assert status == 1
        assert told
    assert len(done) <= 1 or {name for name, *_ in done} <= {"fetch", "run"}, done
    for name, values, options in done:
        for mode in {value for value in values if isinstance(value, Mode)}:
            named = {str(mode), f"--mode={mode}"} & set(words)
            assert named, (name, mode)
        if timeout := options.get("timeout"):
            assert isinstance(timeout, int)
            assert timeout > 0


HASH = "5" * 64


@target
def records(data: bytes) -> None:
    """What is read back from /run/uffdguard and from install's manifest: damage opens nothing and breaks no stop.

    The native knob as it was found, the object's hash, the server's pid, the manifest; separated by ``\\x1e``. The
    server's record is locked, as by a server that runs.
    """
    found, *others = data.split(b"\x1e", 3)
    loaded, server, manifest = [*others, None, None, None][:3]
    run = scratch() / "run"
    run.mkdir(exist_ok=True)
    places = {name: run / place for name, place in (("FOUND", "native"), ("LOADED", "object"), ("SERVER", "knob"))}
    for path, part in zip([*places.values(), scratch() / "manifest"], [found, loaded, server, manifest], strict=True):
        put(path, part)
    sound = not server or re.fullmatch(rb"[1-9][0-9]{0,6}\n", server)
    held = contextlib.ExitStack()
    if server is not None:
        fcntl.flock(held.enter_context(places["SERVER"].open("rb")), fcntl.LOCK_EX)
    told: list[int] = []
    wrote: list[int] = []

    def open_process(pid: int) -> int:
        told.append(pid)
        return os.open(os.devnull, os.O_RDONLY)

    with (
        held,
        replaced(native, RUN=run, own=lambda fd: None, uncover=lambda: None),
        replaced(native, need_root=lambda what: None, write_knob=wrote.append),
        replaced(guard, state, PINS=run / "pins", _mount=lambda undo: None, _object_hash=lambda: HASH, **places),
        replaced(install, MANIFEST=scratch() / "manifest"),
        patch("os.pidfd_open", open_process),
        patch("signal.pidfd_send_signal", lambda process, number: held.close()),
        patch("select.select"),
        watch,
    ):
        try:
            known = install._manifest()
            assert all(Path(name).name for name in known)
        except Failure as failure:
            check_line(str(failure))
        assert guard._same_object() == (loaded == HASH.encode())
        try:
            guard.stop()
        except Failure as failure:
            check_line(str(failure))
            assert not sound
            assert wrote == [0], wrote
            return
    assert not run.exists()
    assert wrote == [0, int(found.strip() == b"1")], wrote
    assert sound
    assert told == ([int(server)] if server else [])


@target
def archive(data: bytes) -> None:
    """Names of kernels: the one that is asked for, one line when there is none, whatever else lies about.

    In lines: what is asked for, what is in the cache and what the archive has.
    """
    word, *names = (os.fsdecode(line) for line in data.split(b"\n"))
    names = [name[:255] for name in names]  # NAME_MAX; a package's is no longer
    directories = [Path(name.replace("/", "")) for name in names if name.endswith("-amd64") and "\0" not in name]
    cache = SimpleNamespace(glob=lambda pattern: directories)
    apt = SimpleNamespace(names=lambda: names)
    with replaced(kernels, cache=lambda: cache, Apt=lambda suites, architecture: apt), watch:
        kernels.archives("\n".join(names))
        list(kernels.table())
        try:
            line = kernels.find_line(word)
            if kernel := kernels.cached(line):
                assert kernel.directory in directories
            release, packages = kernels.choose(names, line)
            assert {f"linux-image-{release}", f"linux-binary-{release}"} & set(names)
            assert all(package.endswith(release) for package in packages)
        except Failure as failure:
            check_line(str(failure))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


#: Always the same: click keeps what it has printed to.
PIPE, TERMINAL = io.StringIO(), Terminal()
#: What only a terminal gets: a colour, and what has a line take the place of the last.
SEQUENCES = re.compile(r"\x1b\[(?:\d*m|1A\x1b\[2K)")


def printed(act: Callable[[], object], width: int | None = None) -> list[str]:
    """Return the lines that ACT prints, on a terminal of WIDTH or into a pipe; each is one, whatever it quotes."""
    out = PIPE if width is None else TERMINAL
    out.seek(0)
    out.truncate()
    with (
        replaced(sys, stdout=out),
        patch("shutil.get_terminal_size", lambda: os.terminal_size((width or 80, 24))),
        watch,
    ):
        act()
    text = out.getvalue()
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    if width is not None:
        lines = [SEQUENCES.sub("", line) for line in lines]
    for line in filter(None, lines):
        check_line(line)
    return lines


@target
def events(data: bytes) -> None:
    """A record of the kernel side, whatever it has: it is passed over, or shown in one line, which fits the terminal.

    The terminal's width, the record, then the paths of the control group and of the program, separated by ``\\0``.
    """
    width, data = data[0] if data else 0, data[1:]
    size = ctypes.sizeof(layout.Event)
    record = layout.Event.from_buffer_copy(data[:size].ljust(size, b"\0"))
    cgroup, _, program = data[size:].partition(b"\0")
    find = decisions.executable_of
    with (
        replaced(
            decisions,
            cgroup_of=lambda number: os.fsdecode(cgroup),
            executable_of=lambda record: (find(record), os.fsdecode(program))[bool(program)],
        ),
        watch,
    ):
        event = decisions.entry_of(record)
    known = record.way < len(layout.WAYS) and record.reason <= len(layout.REASONS)
    known = record.mode < len(Mode) and (record.sysctl <= len(layout.SYSCTLS) if record.sysctl else known)
    assert (event is not None) == known
    if event is None:
        return
    check_line(event.line)
    back = to_event if isinstance(event, decisions.Event) else to_sysctl_write
    assert back(of_entry(event)) == event
    assert back(json.loads(json.dumps(of_entry(event)))) == event

    (line,) = printed(lambda: Objects().events([event]))
    assert json.loads(line) == json.loads(json.dumps(asdict(event)))
    lines = printed(lambda: Lines().events([event]))
    if isinstance(event, decisions.SysctlWrite):
        assert len(lines) == 3
        return
    assert len(lines) == 2

    def twice() -> None:
        printer = Lines()
        printer.events([event])
        printer.events([event])

    lines = printed(twice, width or 1)
    assert len(lines) == 3
    for line in lines:
        assert sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line) <= (width or 1), line


@target
def journal(data: bytes) -> None:
    """Lines of journalctl: each is a use, a refused write, a notice, a number of missing ones or damaged; all is shown.

    A byte for the option user-mode-only, then the lines.
    """
    found = report.Report(user_mode_only=data[:1] > b"0")
    for line in data[1:].split(b"\n"):
        before = found.asked + found.damaged + found.writes.total()
        with watch:
            found.add(line)
        if (now := found.asked + found.damaged + found.writes.total()) == before:
            assert line.startswith(b"-- ") or json.loads(line)["MESSAGE_ID"] in (MISSING_ID, NOTICE_ID)
        else:
            assert now == before + 1
    with watch:
        assert page.html(found).replace("\n", "").isprintable()
        told = facts(found)
    assert (told["asked"], told["damaged"]) == (found.asked, found.damaged)
    json.dumps(told)
    for width in (None, 80):
        printed(lambda: show(found), width)
