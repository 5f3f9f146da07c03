"""CRIU: a process that is dumped, and restored with its memory fetched page by page as it is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from postcopy import workshop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Writes its number into each of its pages, and then for ever says whether they are all there.
PROGRAM = """\
import sys, time
memory = bytearray(1 << 20)
pages = range(0, len(memory), 4096)
for place in pages:
    memory[place] = place >> 12
while True:
    right = all(memory[place] == place >> 12 for place in pages)
    with open(sys.argv[1], "a") as file:
        file.write("right\\n" if right else "wrong\\n")
    time.sleep(0.1)
"""
SECONDS = 60


@dataclass(frozen=True)
class Restored:
    """A process that has been restored."""

    faults: int  # pages that it was given because it touched them
    said: list[str]  # of its memory, since


def restore(command: Sequence[str], user: int) -> Restored:
    """Dump a process of USER and restore it, both as root by the CRIU that COMMAND is."""
    with workshop() as (stack, folder):
        said = folder / "said"

        def criu(verb: str, *words: str) -> subprocess.Popen[bytes]:
            argv = [*command, verb, "-D", str(folder), "-v4", "-o", f"{verb}.log", *words]
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        def done(verb: str, *words: str) -> None:
            if criu(verb, *words).wait():
                lines = [line for log in folder.glob("*.log") for line in log.read_text().splitlines()]
                raise RuntimeError(f"criu {verb}: " + "\n".join(line for line in lines if "Error" in line))

        process = subprocess.Popen(
            # Without site, which takes seconds here.
            [sys.executable, "-S", "-E", "-c", PROGRAM, said],
            user=user,
            group=user,
            extra_groups=[],
            cwd="/",
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(kill, process.pid)
        until(said.exists)
        done("dump", "-t", str(process.pid))
        process.wait()
        before = len(said.read_text().splitlines())
        criu("lazy-pages")
        until((folder / "lazy-pages.socket").exists)
        done("restore", "--lazy-pages", "-d")
        until(lambda: len(said.read_text().splitlines()) > before + 2)
        return Restored((folder / "lazy-pages.log").read_text().count("#PF"), said.read_text().splitlines()[before:])


def until(condition: Callable[[], bool]) -> None:
    """Wait until CONDITION holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def kill(pid: int) -> None:
    """Kill a process that may have gone, and that may be no child of ours."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
