"""``uffdguard probe``."""

from __future__ import annotations

import click


@click.command("probe")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
def command(json: bool) -> None:
    """Really try to create userfaultfds.

    As whoever runs this, each way there is: by the system call, by the system call with UFFD_USER_MODE_ONLY
    and by /dev/userfaultfd; then the same again after opening /dev/kvm. Prints "allowed" or the name of the
    error. Needs no privilege.
    """
    from uffdguard.cli import render
    from uffdguard.kernel import probe

    answers = probe.every_way()
    if json:
        render.as_json(answers)
        return
    ways = ("syscall", "syscall-user-mode-only", "device")
    after = answers["kvm"]
    render.columns(
        [
            ("way", "as it is", "after opening /dev/kvm" if after == "allowed" else f"/dev/kvm: {after}"),
            *((way, answers[way], answers[f"{way}-after-kvm"]) for way in ways),
        ]
    )
