"""Running programs that must not outlive this process, whatever ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

from uffdguard.errors import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

log = logging.getLogger("uffdguard")

PR_SET_CHILD_SUBREAPER = 36

#: Also where the system's own tools are, which a user's PATH may lack.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def need(tool: str, package: str) -> str:
    """Return the path of TOOL.

    Raises:
        Failure: It is not installed; names the Debian PACKAGE.
    """
    path = shutil.which(tool, path=PATH)
    if path is None:
        raise Failure(f"lab: {tool} is not installed", f"run `apt-get install {package}`")
    return path


def output(argv: Sequence[str | Path]) -> str:
    """Run ARGV and return its standard output.

    Raises:
        Failure: It failed; tells why, in its own words.
    """
    with process_group(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stdout, stderr = process.communicate()
    if process.returncode:
        raise Failure(f"lab: {Path(argv[0]).name} failed: {reason(stderr)}")
    return stdout.decode(errors="replace")


def reason(stderr: bytes) -> str:
    """Return the line of STDERR that says most: apt's first error, else the last line."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return (errors or lines[-1:] or ["it does not say why"])[0]


@contextlib.contextmanager
def process_group(
    argv: Sequence[str | Path],
    *,
    terminal: bool = False,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ARGV in a process group of its own, of which nothing is left when the context ends.

    The leader of the group waits for the end of a pipe that only this process holds, and then kills the
    group: so it goes also when this process is killed by SIGKILL. With TERMINAL the group has the terminal,
    else its standard input is /dev/null. VARIABLES are added to the environment. Pipes are not buffered.
    """
    log.debug("%s", shlex.join(map(str, argv)))
    leader = ["/bin/sh", "-c", "trap '' INT HUP TERM; read _; kill -KILL 0"]
    with (
        subreaper(),
        subprocess.Popen(leader, stdin=subprocess.PIPE, process_group=0) as group,
        foreground(group.pid) if terminal else contextlib.nullcontext(),
        subprocess.Popen(
            argv,
            bufsize=0,
            stdin=None if terminal else subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env={**os.environ, "PATH": PATH, **(variables or {})},
            process_group=group.pid,
        ) as process,
    ):
        try:
            yield process
        finally:
            os.killpg(group.pid, signal.SIGKILL)
            process.wait()
            group.wait()
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-group.pid, 0)


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Be the parent of orphaned descendants: init may be slow to reap them."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextlib.contextmanager
def foreground(group: int) -> Iterator[None]:
    """Give the terminal to the process GROUP; take it back, with its settings, at the end."""
    import termios

    settings, ours = termios.tcgetattr(0), os.getpgrp()
    handler = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        os.tcsetpgrp(0, group)
        yield
    finally:
        os.tcsetpgrp(0, ours)
        termios.tcsetattr(0, termios.TCSADRAIN, settings)
        signal.signal(signal.SIGTTOU, handler)
