"""``uffdguard check``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import COMMAND, TakesCommand

if TYPE_CHECKING:
    from uffdguard.inspect import Answer


@click.command("check", cls=TakesCommand)
@click.option("--json", "json", is_flag=True, help="Print JSON.")
@click.argument("pid", metavar="PID | -- COMMAND...", type=click.IntRange(1), required=False)
@click.pass_context
def command(ctx: click.Context, json: bool, pid: int | None) -> None:
    """Tell whether a process would get a userfaultfd, and why.

    That is what userfaultfd(2) without flags would answer to the process or thread PID, which only root can tell; or
    to COMMAND, as the caller would start it and before it does anything. COMMAND is not started. Nothing is
    created. What a seccomp filter or another LSM may refuse is not told.

    Exits with 0 when it would be allowed, with 1 when it would be refused or cannot be told.
    """
    words: tuple[str, ...] = ctx.meta[COMMAND]
    if (pid is None) is (not words):
        raise click.UsageError("give either a PID or, after --, a COMMAND", ctx)

    from dataclasses import asdict

    from uffdguard import inspect
    from uffdguard.cli import render

    if pid is None:
        answer = inspect.check_command(words)
    else:
        with inspect.looking() as (setting, obj):
            answer = inspect.check_process(setting, obj, pid)
    if json:
        render.as_json(asdict(answer))
    else:
        show(answer)
    ctx.exit(0 if answer.allowed else 1)


def show(answer: Answer) -> None:
    """Print ANSWER as text."""
    from uffdguard.cli import render

    def told(allowed: bool) -> str:
        return render.coloured("allowed" if allowed else "refused")

    click.echo(f"{told(answer.allowed)} ({answer.reason}): {answer.why}")
    other = answer.user_mode_only
    if other is None:
        click.echo("with UFFD_USER_MODE_ONLY: only root can tell")
    elif other.allowed is not answer.allowed:
        click.echo(f"with UFFD_USER_MODE_ONLY: {told(other.allowed)} ({other.reason})")
    if answer.would_allow:
        click.echo("would allow it:")
        for change in answer.would_allow:
            click.echo(f"  {change}")
