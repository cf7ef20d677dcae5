"""`ssmcache doctor`: what this machine can do, and how fast."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ssmcache_cli.console import interruptible, print_json, progress_bar
from ssmcache_sim.calibration import Calibration
from ssmcache_sim.diagnosis import LARGE_SLOT_BYTES, SMALL_SLOT_BYTES, WAYS, Diagnosis
from ssmcache_sim.doctor import examine
from ssmcache_sim.doctor_prefill import calibrate, calibration_task
from ssmcache_sim.machine_profile import check_profile_place, write_profile
from ssmcache_sim.sizes import format_size

_COPIES = (None, SMALL_SLOT_BYTES, LARGE_SLOT_BYTES)
_HOW = (
    "GB/s of payload, 10^9 bytes. Plain: one copy of as many bytes. Slots lie at random places and are copied by "
    "CudaMemory, within the host by HostMemory (one thread), to and from the disk by its disk tier."
)
_ANSWERS = {True: "yes", False: "no", None: "-"}


def doctor_command(
    disk_path: Annotated[
        Path | None,
        typer.Option(
            help="Measure the disk of this directory too: writes up to 0.8 GB, 128 MiB at a time, and leaves nothing.",
            metavar="DIR",
        ),
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="The CUDA device to measure.", metavar="INDEX")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write a profile for `--bandwidth-profile` of other commands here.", metavar="FILE"),
    ] = None,
    calibrate_with: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            help="Also time prefills of the model of this config.json, with random weights, for `recommend`. Needs "
            "torch and transformers; for a large model a GPU, and a minute or more.",
            metavar="CONFIG",
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(help="Of the longest prompt that is timed, a multiple of 512.", metavar="N")
    ] = 32768,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON and nothing else.")] = False,
) -> None:
    """Show what this machine can do, what ssmcache does instead where something is missing, and how fast copies are.

    What is missing or fails is a line, not an error. Takes a few seconds; with a GPU, about 20; to calibrate, longer.
    """
    # what the memories would say of missing parts is in the table
    logging.getLogger("ssmcache").addHandler(logging.NullHandler())
    if out is not None:
        check_profile_place(out)
    task = None if calibrate_with is None else calibration_task(calibrate_with, calibrate_tokens)
    with interruptible("nothing was written or left behind"):
        with progress_bar("doctor", 100, shown=not as_json) as progress:
            diagnosis = examine(None if disk_path is None else str(disk_path), device, progress)
        if task is not None:
            with progress_bar("calibrate", 100, shown=not as_json) as progress:
                calibrate(diagnosis, task, device, progress)
        if out is not None:
            write_profile(out, diagnosis.to_json())
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print_diagnosis(diagnosis)
        if out is not None:
            typer.echo(f"profile: {out}")


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Prints the findings, a line each, and the table of bandwidths; legible from 60 columns on."""
    console = Console(highlight=False)
    findings = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for each in diagnosis.findings:
        said = ": ".join(part for part in (each.found, each.meaning) if part)
        findings.add_row(each.what, _ANSWERS[each.is_there], escape(said))
    console.print(findings)
    rates = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rates.add_column("copies")
    for slot_bytes in _COPIES:
        rates.add_column("plain" if slot_bytes is None else f"{format_size(slot_bytes)} slots", justify="right")
    for way, label in WAYS.items():
        found = [diagnosis.bytes_per_second(way, slot_bytes) for slot_bytes in _COPIES]
        if any(found):
            rates.add_row(label, *map(_gigabytes, found))
    console.print(rates)
    console.print(_HOW)
    if diagnosis.calibration is not None:
        console.print(_prefills(diagnosis.calibration))
        console.print(_fit(diagnosis.calibration))
    for what, why in diagnosis.failures:
        console.print(f"not measured: {escape(what)}: {escape(why)}")
    for note in diagnosis.notes:
        console.print(escape(note))


def _prefills(calibration: Calibration) -> Table:
    """Times to the first token."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("cached tokens", "new tokens", "first token", "spread"):
        table.add_column(title, justify="right")
    for each in calibration.times:
        counts = f"{each.cached_tokens:,}", f"{each.new_tokens:,}"
        table.add_row(*counts, f"{each.seconds * 1e3:,.1f} ms", f"{each.spread:.0%}")
    return table


def _fit(calibration: Calibration) -> str:
    return (
        f"Fitted: {calibration.flops_per_second / 1e12:.3g} TFLOP/s, attention {calibration.attention_factor:.3g} "
        f"times as dear as other operations, behind cached tokens {calibration.cached_attention_factor:.3g} times; a "
        f"pass takes {calibration.pass_seconds * 1e3:.3g} ms beside, and at least "
        f"{calibration.pass_floor_seconds * 1e3:.3g} ms."
    )


def _gigabytes(bytes_per_second: float | None) -> str:
    if bytes_per_second is None:
        return "-"
    rate = bytes_per_second / 1e9
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
