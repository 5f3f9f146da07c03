"""``uffdguard report``."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from uffdguard.report import Report


@click.command("report")
@click.option("--since", metavar="TIME", help="Only what is newer, e.g. yesterday or -2h; as journalctl takes it.")
@click.option("--html", metavar="FILE", help="Write the figures to FILE, too: a page of its own, with charts.")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(since: str | None, html: str | None, json: bool) -> None:
    """Show who used userfaultfd, and what each mode would have done.

    From what `uffdguard log` has written to the journal: which programs of which users and units asked for a
    userfaultfd, how often and how, what each mode with the configuration's options would have answered, and which mode
    that speaks for. What a program is called is its own word; its user and unit are the kernel's.
    """
    from uffdguard import report
    from uffdguard.cli import render

    found = report.read(since)
    if html is not None:
        from uffdguard import page

        page.save(found, html)
    if json:
        render.as_json(facts(found))
    else:
        show(found)


def facts(report: Report) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    from uffdguard.policy import Mode

    return {
        "first": report.first and report.first.isoformat(),
        "last": report.last and report.last.isoformat(),
        "asked": report.asked,
        "allowed": report.allowed,
        "refused": report.refused,
        "not_enforced": report.not_enforced,
        "suppressed": report.suppressed,
        "lost": report.lost,
        "damaged": report.damaged,
        "user_mode_only": report.user_mode_only,
        "uses": [
            {
                **who._asdict(),
                "asked": uses.asked,
                "refused_by": {mode: uses.refused[report.policy(mode)] for mode in Mode},
                "ways": dict(uses.ways),
                "with_user_mode_only": uses.user_mode_only,
            }
            for who, uses in report.ranking()
        ],
        "refused_programs": {
            mode: [
                {**program._asdict(), "refused": refused}
                for program, refused in report.refused_by(report.policy(mode)).items()
            ]
            for mode in Mode
        },
        "sysctls": [
            {**write._asdict(), "refused": refused, "last": report.last_writes[write].isoformat()}
            for write, refused in report.writes.most_common()
        ],
        "silences": report.silences,
        "notes": report.notes(),
        "recommendation": report.recommendation(),
    }


def show(report: Report) -> None:
    """Print REPORT as text."""
    from uffdguard.cli import render
    from uffdguard.policy import Mode

    click.echo(report.summary())
    if report.uses:
        most = max(uses.asked for uses in report.uses.values())
        width = shutil.get_terminal_size().columns // 16
        digits = max(len("asked"), len(str(most)))
        rows = [("program, as it says", "user", "unit or container", "asked".rjust(digits), "", *Mode, "how")]
        for who, uses in report.ranking():
            told = (uses.told(report.policy(mode)) for mode in Mode)
            bar = render.bar(uses.asked, most, width)
            rows.append((who.program, who.user, who.unit or "-", str(uses.asked).rjust(digits), bar, *told, uses.how()))
        click.echo()
        render.columns(rows, cut=(0, 2, len(rows[0]) - 1))
        click.echo()
        totals = [("mode", "would have allowed", "would have refused", "of programs")]
        for mode in Mode:
            programs = report.refused_by(report.policy(mode))
            refused = programs.total()
            totals.append((mode, str(report.asked - refused), str(refused), str(len(programs))))
        render.columns(totals)
    if report.writes:
        click.echo()
        click.echo("Refused writes of sysctls, which would have undone the policy:")
        writes = [("sysctl", "user", "command", "unit or container", "refused", "last")]
        for write, refused in report.writes.most_common():
            writes.append((*write[:3], write.unit or "-", str(refused), f"{report.last_writes[write]:%Y-%m-%d %H:%M}"))
        render.columns(writes, cut=(2, 3))
    for sentences in (report.recommendation(), report.notes()):
        if sentences:
            click.echo()
        for sentence in sentences:
            click.echo(sentence)
