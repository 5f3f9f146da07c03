"""``uffdguard start``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from uffdguard.cli.words import MODE

if TYPE_CHECKING:
    from uffdguard.policy import Mode


@click.command("start")
@click.option("--mode", type=MODE, help="The mode to set, whatever the configuration files say.")
@click.option(
    "--backend",
    type=click.Choice(["lsm", "native"]),
    help="What carries the policy out: lsm, or native, which needs no BPF and is weaker.",
)
@click.option(
    "--audit/--enforce",
    default=None,
    help="Count and report refusals and let them pass, or carry them out, until it is said otherwise.",
)
def command(mode: Mode | None, backend: str | None, audit: bool | None) -> None:
    """Put the policy in force.

    Loads and attaches the programs, sees them refuse, pins them, and lets the native knob follow. Where a
    policy is in force already, repairs what is amiss and keeps the mode that is set unless --mode is given.

    In audit the native knob stays as it was found: what it refuses is refused.

    The backend native loads nothing: it sets the native knob and the permissions of /dev/userfaultfd, on a kernel
    without bpf among its LSMs for example. It is taken only where --backend or the configuration says so, and then
    stays until --backend lsm or stop.
    """

    from uffdguard import config, guard, state
    from uffdguard.cli import render
    from uffdguard.errors import Failure
    from uffdguard.kernel import native
    from uffdguard.policy import Backend

    configured = config.load()
    native.need_root("puts the policy in force")
    chosen = Backend(backend) if backend else state.backend() or configured.backend
    configured.check(chosen)
    if chosen is Backend.NATIVE:
        if audit:
            raise Failure("the backend native has no audit", "use the backend lsm")
        done = guard.start_native(configured.policy, mode)
        render.warn_of_native()
    else:
        done = guard.start(configured.policy, mode, audit=audit, events_per_second=configured.events_per_second)
    if not done.changed:
        click.echo("already in force; nothing to do")
    if done.before and done.before.audit and not done.policy.audit:
        click.echo("audit has ended: refusals are carried out")
    if done.policy.audit:
        render.warn_of_audit()
