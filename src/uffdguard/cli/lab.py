"""``uffdguard lab``."""

from __future__ import annotations

import re
import sys

import click

from uffdguard.cli.words import COMMAND, TakesCommand


class Lab(TakesCommand, click.Group):
    """A group that takes a COMMAND, too."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the subcommand, or say where a COMMAND goes."""
        if args[0] not in self.commands:
            raise click.UsageError(f"COMMAND goes after --, as in: -- {' '.join(args)}", ctx)
        if ctx.meta[COMMAND]:
            raise click.UsageError(f"{args[0]} takes no COMMAND; a COMMAND of that name goes after --", ctx)
        return super().resolve_command(ctx, args)


def size(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return VALUE if it is a SIZE as QEMU takes it."""
    if not re.fullmatch(r"[1-9][0-9]*[MG]", value):
        raise click.BadParameter(f"{value!r} is no SIZE such as 512M or 2G", ctx, param)
    return value


@click.group("lab", cls=Lab, invoke_without_command=True, subcommand_metavar="[-- COMMAND...] | kernels [--json]")
@click.option(
    "--arch",
    metavar="ARCH",
    type=click.Choice(["amd64", "arm64"]),
    default="amd64",
    show_default=True,
    help="The architecture of the VM, amd64 or arm64.",
)
@click.option(
    "--kernel",
    metavar="LINE",
    default="6.12",
    show_default=True,
    help="A kernel line that lab kernels lists, or the oldest or newest supported.",
)
@click.option("--cpus", metavar="N", type=click.IntRange(1), help="CPUs of the VM; 2 by default.")
@click.option(
    "--memory",
    metavar="SIZE",
    default="1G",
    show_default=True,
    callback=size,
    help="Memory of the VM, in M or G.",
)
@click.option(
    "--count-instructions",
    is_flag=True,
    help="Let the VM's clock advance by a nanosecond an instruction: what it measures does not depend on the "
    "load of this machine. With one CPU.",
)
@click.option(
    "--append",
    metavar="PARAMETER",
    multiple=True,
    help="A parameter for the kernel's command line, such as preempt=full; can be given more than once.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.IntRange(1, 1_000_000),
    help="End the VM after this time, boot included, and exit with 124.",
)
@click.pass_context
def command(
    ctx: click.Context,
    arch: str,
    kernel: str,
    cpus: int | None,
    memory: str,
    count_instructions: bool,
    append: tuple[str, ...],
    timeout: int | None,
) -> None:
    """Run COMMAND as root on a stock kernel.

    A stock Debian kernel, in a micro-VM on this machine's root file system. The VM is emulated by QEMU, with
    SVM: it has a real /dev/kvm and needs none here, nor root. Without COMMAND it runs a shell on the
    terminal; Ctrl-A X ends the VM.

    COMMAND runs in the current directory, with standard input from /dev/null. Of the environment it has PATH,
    with /usr/sbin and /sbin added; HOME, LANG and TERM are set. Its standard output, standard error and exit
    status are those of the lab.

    In the VM the root file system is read-only. /etc, /home, /opt, /srv, /tmp, /usr, /var and /run can be
    written; what is written is gone with the VM. Everybody may enter the directories that lead to the current
    directory and to this Python, in the VM only. Neither may be below /dev or /run, of which the VM has its own.

    With --arch arm64 the root file system is a disk with a Debian of that architecture, of this machine's own
    suite. It is made the first time, of packages that are fetched as kernels are, and kept in disks. All of it can
    be written. The current directory, and the environment of this Python when it is outside of that, are visible
    at their places, read-only; this Python runs there as Debian's own.

    A line that ends in -rt is of Debian's preemptible build; the VM then passes for one of VMware's, without which
    there is no KVM. One that ends in -cloud has no 9p, and virtiofsd serves its root file system: this machine's, or
    that of Debian 13, which is fetched.

    Kernel messages go to a log. Its lines are shown, and it is kept, when the VM ended before COMMAND did
    (exit status 1), when COMMAND was not done in time (124), and when the kernel reported a bug.

    The first time that a line is asked for, its highest kernel is fetched from the Debian archive that apt is
    configured for; apt checks the signatures, and of modules that have left its lists the kernel does. It is
    kept in kernels/LINE/RELEASE below $XDG_CACHE_HOME/uffdguard (~/.cache/uffdguard) and used from then on
    without the network; remove it there to fetch anew. Nothing is installed on this machine.
    """
    if ctx.invoked_subcommand:
        return
    words = ctx.meta[COMMAND]
    if count_instructions and cpus not in (None, 1):
        raise click.UsageError("--count-instructions takes one CPU", ctx)
    if not words and not sys.stdin.isatty():
        raise click.UsageError("a shell needs a terminal; give a COMMAND after --", ctx)

    import signal

    from uffdguard.lab import kernels, vm
    from uffdguard.lab.architectures import ARCHITECTURES

    # Ends by exception, as SIGINT does: what a context manager began is undone.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    status = vm.run(
        kernels.get(kernel, ARCHITECTURES[arch]),
        words,
        cpus=cpus or (1 if count_instructions else 2),
        memory=memory,
        count_instructions=count_instructions,
        append=append,
        timeout=timeout,
    )
    ctx.exit(status)


@command.command("kernels")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
@click.pass_context
def kernels(ctx: click.Context, json: bool) -> None:
    """List the kernel lines and what is cached.

    Oldest line first, with the release that is in the cache. On a line that is refused the policy cannot be put
    in force. Does not use the network.
    """
    from uffdguard.cli import render
    from uffdguard.lab import kernels
    from uffdguard.lab.architectures import ARCHITECTURES

    assert ctx.parent
    rows = list(kernels.table(ARCHITECTURES[ctx.parent.params["arch"]]))
    if json:
        render.as_json([{"line": name, "supported": supported, "cached": release} for name, supported, release in rows])
    else:
        told = {True: "supported", False: "refused"}
        render.columns([(name, told[supported], release or "not cached") for name, supported, release in rows])
