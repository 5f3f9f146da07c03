"""``uffdguard knob``."""

from __future__ import annotations

import click


@click.group("knob", invoke_without_command=True, subcommand_metavar="[serve | mount PID | unmount]")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Serve /proc/sys/vm/unprivileged_userfaultfd with the three modes.

    It lists the modes, the current one in brackets; root writes one of the words to switch. Runs until it is
    interrupted or the policy is taken out of force; then the native file is seen again. Needs a policy in force.

    The subcommands are the same in steps, for a service manager: serve needs to be root and no capability,
    mount and unmount need CAP_SYS_ADMIN.
    """
    if ctx.invoked_subcommand is None:
        _tell()
        from uffdguard import knob

        knob.run()


@command.command("serve")
def serve() -> None:
    """Serve the file; somebody else mounts it. Tells $NOTIFY_SOCKET when it can be mounted."""
    _tell()
    from uffdguard import knob

    knob.serve(knob.notify)


@command.command("mount")
@click.argument("pid", type=click.IntRange(1))
def mount(pid: int) -> None:
    """Cover the native file by the one that PID serves."""
    from uffdguard import knob

    knob.mount(pid)


@command.command("unmount")
def unmount() -> None:
    """Have the native file seen again, whoever served its cover."""
    from uffdguard.kernel import native

    native.need_root("uncovers a file of /proc")
    native.uncover()


def _tell() -> None:
    """Have warnings on standard error: whoever runs the server wants to know of refused writes."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="uffdguard knob: %(message)s")
