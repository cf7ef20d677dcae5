"""The app, and the entry point that turns errors of the user into one line."""

import io
import sys
from typing import Annotated

import typer

from ssmcache import __version__
from ssmcache.models import ModelError
from ssmcache_cli.doctor import doctor_command
from ssmcache_cli.explain import explain_command
from ssmcache_cli.models import models_command
from ssmcache_cli.plot import plot_command
from ssmcache_cli.recommend import recommend_command
from ssmcache_cli.replay import replay_command
from ssmcache_cli.report import report_command
from ssmcache_cli.sweep import sweep_command
from ssmcache_cli.trace import trace_app
from ssmcache_cli.verify import verify_command
from ssmcache_sim.errors import UserError

# A bug of ours must stay loud and plain: no framed tracebacks.
app = typer.Typer(name="ssmcache", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("replay")(replay_command)
app.command("sweep")(sweep_command)
app.command("explain")(explain_command)
app.command("recommend")(recommend_command)
app.command("verify")(verify_command)
app.command("plot")(plot_command)
app.command("report")(report_command)
app.command("models")(models_command)
app.command("doctor")(doctor_command)
app.add_typer(trace_app, name="trace")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ssmcache {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prefix caching of hybrid attention + SSM language models: what would your traffic gain?"""


def run() -> None:
    """Entry point: exit code 1 and one line on stderr for an error of the user, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except (UserError, ModelError) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        raise SystemExit(1) from None
