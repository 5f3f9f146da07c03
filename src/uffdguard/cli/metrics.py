"""``uffdguard metrics``."""

from __future__ import annotations

from pathlib import Path

import click

from uffdguard.errors import Failure


@click.command("metrics")
@click.option(
    "--textfile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write them to FILE, whole or not at all, readable by everybody.",
)
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    help="Serve them by HTTP until interrupted; ADDRESS is numeric, of IPv6 in brackets.",
)
@click.pass_context
def command(ctx: click.Context, textfile: Path | None, listen: str | None) -> None:
    """Give the state as metrics for Prometheus.

    What status tells, in the text format of Prometheus, on standard output unless an option says otherwise.
    Where no policy is in force, uffdguard_in_force is 0; where that cannot be told, there is none.
    """
    import logging

    from uffdguard.kernel import native

    try:
        from uffdguard import metrics
    except ModuleNotFoundError as error:
        raise Failure(f"{error.name} is missing", "apt install python3-prometheus-client") from error
    if textfile and listen:
        raise click.UsageError("give either --textfile or --listen", ctx)
    where = None
    if listen is not None:
        try:
            where = metrics.parse(listen)
        except ValueError:
            what = f"{listen!r} is no ADDRESS:PORT such as 127.0.0.1:9101 or [::1]:9101"
            raise click.UsageError(what, ctx) from None
    native.need_root("can see the state of the policy")
    logging.basicConfig(level=logging.WARNING, format="uffdguard metrics: %(message)s")
    if where:
        metrics.serve(*where, click.echo)
    elif textfile:
        metrics.write(textfile, metrics.text())
    else:
        click.echo(metrics.text(), nl=False)
