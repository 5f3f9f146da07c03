"""``uffdguard doctor``."""

from __future__ import annotations

import click


@click.command("doctor")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Show what enforcement needs of this machine.

    And what to do about what is missing; the last line says whether this machine can enforce the policy. Loads each
    program once to see whether the kernel takes it; attaches nothing. Exits with 1 when anything is missing.
    """
    from uffdguard.cli import render
    from uffdguard.kernel import features
    from uffdguard.policy import WEAKER, Backend

    native = features.configured_backend() is Backend.NATIVE
    rows = [*features.rows(), *([] if native else features.program_rows())]
    able = features.can_enforce(rows)
    missing = [row for row in rows if row.state == "missing"]
    if json:
        render.as_json({"can_enforce": able, "rows": [row._asdict() for row in rows]})
    else:
        render.columns([(row.name, row.state, row.fact) for row in rows])
        hints: dict[str, list[str]] = {}
        # A kernel without the hook lacks more, and nothing but another one helps.
        hookless = [row for row in missing if row.name == "hook"]
        for row in hookless or rows:
            if row.state != "ok":
                hints.setdefault(row.hint, []).append(row.name)
        for hint, names in hints.items():
            click.echo(f"{', '.join(names)}: {hint}")
        for sentence in WEAKER if native else ():
            click.echo(f"weaker: {sentence}")
        if able is None:
            click.echo("cannot tell whether this machine can enforce the policy")
        elif able:
            click.echo(f"this machine can enforce the policy{' by the weaker backend native' if native else ''}")
        else:
            count = "1 thing is" if len(missing) == 1 else f"{len(missing)} things are"
            click.echo(f"this machine cannot enforce the policy: {count} missing")
    if missing:
        raise SystemExit(1)
