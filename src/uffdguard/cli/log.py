"""``uffdguard log``."""

from __future__ import annotations

import click


@click.command("log")
@click.option("--all", "everything", is_flag=True, help="Write the allowed ones, too.")
def command(everything: bool) -> None:
    """Write decisions to the journal.

    Each userfaultfd that is refused, and each write of a sysctl that would undo the policy, with structured fields,
    until it is interrupted; those of before it began too, as far as the kernel side keeps them. To read them:
    journalctl UFFDGUARD_VERDICT=refused. It asks the policy every five seconds, and says when that stops answering.
    """
    from uffdguard import journal

    journal.follow(everything=everything)
