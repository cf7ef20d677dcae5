"""`ssmcache plot`: pictures of a result directory."""

from pathlib import Path
from typing import Annotated

import typer

from ssmcache_cli.console import interruptible


def plot_command(
    directory: Annotated[Path, typer.Argument(help="What `ssmcache replay --out` or `ssmcache sweep --out` wrote.")],
) -> None:
    """Draw what a result directory holds, as PNG and SVG, into its folder `plots`."""
    with interruptible("pictures written so far are whole"):
        from ssmcache_sim.plots import plot_directory

        for path in plot_directory(directory):
            typer.echo(path)
