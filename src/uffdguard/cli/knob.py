"""``uffdguard knob``."""

from __future__ import annotations

import click


@click.group("knob", invoke_without_command=True, subcommand_metavar="[serve | mount | unmount]")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Serve the interface file with the three modes.

    It is /proc/sys/vm/unprivileged_userfaultfd. It lists the modes, the current one in brackets; root writes
    one of the words to switch. Runs until it is interrupted or the policy is taken out of force; then the
    native file is seen again. Needs a policy in force.

    The subcommands are the same in steps, for a service manager: serve needs to be root and CAP_SETGID,
    which it gives up; mount and unmount need CAP_SYS_ADMIN.
    """
    if ctx.invoked_subcommand is None:
        _tell()
        from uffdguard import knob

        knob.run()


@command.command("serve")
def serve() -> None:
    """Serve the file; mount, run by somebody who may, mounts it. Tells $NOTIFY_SOCKET when it can be mounted.

    A service manager that keeps descriptors, sd_notify(3), has the next server go on with the same mount.
    """
    from uffdguard import knob

    knob.main()


@command.command("mount")
def mount() -> None:
    """Cover the native file by the one of the server that waits for it, and see that it answers."""
    from uffdguard import knob

    knob.mount()


@command.command("unmount")
def unmount() -> None:
    """Uncover the native file, whichever process served its cover."""
    from uffdguard.kernel import native

    native.need_root("uncovers a file of /proc")
    native.uncover()


def _tell() -> None:
    """Have warnings on standard error: whoever runs the server wants to know of refused writes."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="uffdguard knob: %(message)s")
