"""``uffdguard doctor``."""

from __future__ import annotations

import click


@click.command("doctor")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Show what enforcement needs of this machine.

    And what to do about what is missing. Loads each program once to see whether the kernel takes it; attaches
    nothing. Exits with 1 when the policy could not be put in force here.
    """
    from dataclasses import asdict

    from uffdguard.cli import render
    from uffdguard.kernel import features

    rows = [*features.rows(), *features.program_rows()]
    if json:
        render.as_json([asdict(row) for row in rows])
    else:
        render.columns([(row.name, row.state, row.fact) for row in rows])
        hints: dict[str, list[str]] = {}
        # A kernel that is too old lacks more, and nothing but a newer one helps.
        too_old = [row for row in rows if row.name == "kernel" and row.state == "missing"]
        for row in too_old or rows:
            if row.state != "ok":
                hints.setdefault(row.hint, []).append(row.name)
        for hint, names in hints.items():
            click.echo(f"{', '.join(names)}: {hint}")
    if any(row.state == "missing" for row in rows):
        raise SystemExit(1)
