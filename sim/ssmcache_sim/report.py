"""One HTML page of a result directory, complete in itself: no network, no other files."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ssmcache_sim.directories import write_file
from ssmcache_sim.page_parts import Markup, glossary, picture, section, table, text
from ssmcache_sim.plots import load_result, rendered, run_figures
from ssmcache_sim.replay_page import replay_body
from ssmcache_sim.results import REPORT
from ssmcache_sim.sweep_page import sweep_body
from ssmcache_sim.sweep_results import SweepRun

# What a page may load: nothing but itself.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


def write_report(directory: str | Path, output: Path | None = None) -> Path:
    """Writes the page of a replay's or a sweep's directory; the file written, `report.html` in it if none is given.

    The same results give the same bytes. Errors: OutputError if it is no such directory, or cannot be written.
    """
    directory = Path(directory)
    page = report_page(directory)
    path = directory / REPORT if output is None else output
    write_file(path, page.encode())
    return path


def report_page(directory: Path) -> str:
    """The page as text. Errors: OutputError, as `write_report`."""
    run = load_result(directory)
    manifest = run.manifest
    body = sweep_body(run) if isinstance(run, SweepRun) else replay_body(run)
    title = f"{manifest['trace']['name']}, {manifest['settings']['model']}"
    pictures = "".join(picture(rendered(figure, "svg"), _caption(figure)) for _, figure in run_figures(run))
    subtitle = (
        f"ssmcache {manifest['command']}: {manifest['trace']['requests']:,} requests, "
        f"{manifest['trace']['prompt_tokens']:,} prompt tokens"
    )
    return _PAGE.format(
        policy=_POLICY,
        title=text(title),
        subtitle=text(subtitle),
        style=_asset("report.css"),
        script=_asset("report.js"),
        body=body + section("Pictures", pictures) + glossary() + _provenance(manifest),
    )


def _caption(figure: Figure) -> str:
    return ": ".join(figure.get_suptitle().split("\n", 1)).replace("\n", ", ").replace(r"\$", "$")


def _provenance(manifest: dict[str, Any]) -> Markup:
    """Everything of the manifest that has one line."""
    rows = [
        (f"{group}: {name}", ", ".join(map(str, value)) if isinstance(value, list) else value)
        for group in ("trace", "settings", "versions", "run")
        for name, value in manifest[group].items()
    ]
    shown = [(text(name), text("default" if value is None else value)) for name, value in rows if value not in ("", {})]
    return section("How this was made", table("What the manifest of the results says", ("", ""), shown))


def _asset(name: str) -> str:
    return files("ssmcache_sim").joinpath("report_assets", name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{title}</h1><p class="soft">{subtitle}</p></header>
<main>
{body}</main>
<script>
{script}</script>
</body>
</html>
"""
