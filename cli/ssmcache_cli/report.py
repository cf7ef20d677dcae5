"""`ssmcache report`: one HTML page of a result directory."""

from pathlib import Path
from typing import Annotated

import typer

from ssmcache_cli.console import interruptible


def report_command(
    directory: Annotated[Path, typer.Argument(help="What `ssmcache replay --out` or `ssmcache sweep --out` wrote.")],
    output: Annotated[Path | None, typer.Option(help="The file to write; by default report.html in it.")] = None,
) -> None:
    """Write tables, pictures and an explorer of a result directory as one HTML page that needs no network."""
    with interruptible("nothing was written"):
        from ssmcache_sim.report import write_report

        typer.echo(write_report(directory, output))
