"""``uffdguard watch``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from uffdguard.events import Entry, Event, SysctlWrite
    from uffdguard.state import Status


@click.command("watch")
@click.option("--all", "everything", is_flag=True, help="Show the allowed ones, too.")
@click.option("--since-boot", is_flag=True, help="Begin with the totals and the newest 2048 events.")
@click.option("--json", "json", is_flag=True, help="Print one JSON object a line.")
def command(everything: bool, since_boot: bool, json: bool) -> None:
    """Show decisions as they happen.

    A line for each userfaultfd that is refused, and for each write of a sysctl that would undo the policy, until it is
    interrupted. What repeats itself is folded, with a count. The configuration limits how many events of one user
    are shown in a second; the others are counted as suppressed. It asks the policy every five seconds, and says when
    that stops answering.

    The command is the name that the process gives itself.
    """
    import select
    import sys

    from uffdguard import events, state
    from uffdguard.policy import Backend

    status = state.status()
    if status.answers is False or status.backend is Backend.NATIVE:
        raise state.not_in_force(status.reason)
    printer = Objects() if json else Lines()
    if since_boot:
        printer.totals(status)
    stream = events.Stream(0 if since_boot else None, everything=everything)
    reader_gone = select.poll()
    reader_gone.register(sys.stdout, select.POLLERR)
    question = events.Question()
    while True:
        question.ask()
        batch = stream.read()
        printer.events(batch.shown(everything=everything))
        if batch.suppressed or batch.lost:
            printer.missing(batch.suppressed, batch.lost)
        sys.stdout.flush()
        if reader_gone.poll(events.INTERVAL * 1000):
            raise BrokenPipeError


class Objects:
    """One JSON object a line: a decision, what has a `sysctl` or `answers` instead, or how many are missing."""

    def totals(self, status: Status) -> None:
        """Print what was decided since the first start."""
        self._print({"decisions": status.decisions, "native": status.native, "suppressed": status.suppressed})

    def events(self, events: list[Entry]) -> None:
        """Print each event."""
        from dataclasses import asdict

        for event in events:
            self._print(asdict(event))

    def missing(self, suppressed: int, lost: int) -> None:
        """Print how many events cannot be shown."""
        self._print({"suppressed": suppressed, "lost": lost})

    @staticmethod
    def _print(facts: object) -> None:
        import json

        click.echo(json.dumps(facts))


class Lines:
    """An aligned line an event; on a terminal one that repeats the last takes its place."""

    HEAD = ("time", "times", "pid", "user", "command", "verdict", "reason", "by", "unit or container", "flags")
    WIDTHS = (12, 5, 7, 10, 15, 8, 14, 7, 25, 0)

    def __init__(self) -> None:
        import shutil
        import sys

        self.width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        self.last: object = None
        self.number = 0
        self._print(self.HEAD)

    def totals(self, status: Status) -> None:
        """Print what was decided since the first start."""
        numbers = (*status.decisions.items(), ("native", status.native))
        decided = [f"{reason} {number}" for reason, number in numbers if number]
        click.echo(
            f"since {status.since}: allowed {status.allowed}, refused {status.refused}"
            f" ({', '.join(decided) or 'nothing decided'}), {status.suppressed} events suppressed"
        )

    def events(self, events: list[Entry]) -> None:
        """Print the events, each that is like the one before with it: what differs is the time and the thread."""
        from itertools import groupby

        from uffdguard.events import Notice, SysctlWrite

        for like, group in groupby(events, lambda event: {**vars(event), "time": "", "tid": 0}):
            *_, event = same = list(group)
            if isinstance(event, Notice):
                click.echo(f"{event.time[11:23]}  {event.line}")
                self.last = None
                continue
            again = like == self.last and self.width is not None
            self.number = len(same) + (self.number if again else 0)
            self.last = like
            self._print(self._cells(event, self.number), again=again)
            if isinstance(event, SysctlWrite):
                click.echo(f"{'':12}  {event.setting}: {event.why}")
                self.last = None

    def missing(self, suppressed: int, lost: int) -> None:
        """Print how many events cannot be shown."""
        numbers = [f"{number} {what}" for number, what in ((suppressed, "suppressed"), (lost, "lost")) if number]
        click.echo(f"{'':12}  {', '.join(numbers)}")
        self.last = None

    @staticmethod
    def _cells(event: Event | SysctlWrite, number: int) -> tuple[str, ...]:
        from uffdguard.events import Event

        head = (event.time[11:23], str(number) if number > 1 else "", str(event.pid), event.user, event.command)
        where = event.unit or event.cgroup
        if not isinstance(event, Event):
            return (*head, event.verdict, "sysctl", event.sysctl, where, "")
        verdict = event.verdict if event.enforced else "let pass"
        return (*head, verdict, event.reason, event.way, where, "|".join(event.flags))

    def _print(self, cells: tuple[str, ...], *, again: bool = False) -> None:
        from uffdguard.cli import render

        line = render.line(cells, self.WIDTHS, self.width)
        click.echo(f"\x1b[1A\x1b[2K{line}" if again else line)
