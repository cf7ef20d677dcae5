"""`ssmcache models`: what named models and config.json files weigh in a cache."""

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ssmcache.models import CONFIDENCES, LayerSpec, ModelSpec, dtype_name, load_model, preset_names
from ssmcache_cli.console import print_json

# a table of 80 columns has no room for the whole phrase
_SHORT_CONFIDENCES = {"published config": "config", "vendor code": "code"}


def models_command(
    name: Annotated[
        str | None, typer.Argument(help="A preset, or the path of a config.json; all presets if none.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Keep KV in this dtype, instead of the model's own.")] = None,
    state_dtype: Annotated[
        str | None, typer.Option(help="Keep SSM states in this dtype, instead of the default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show bytes of KV per token and bytes per snapshot of published models, or of your own config.json."""
    # a wrong dtype is an error even for models that would not use it
    kv_dtype, state_dtype = (dtype_name(dtype) if dtype else None for dtype in (kv_dtype, state_dtype))
    if name is not None:
        spec = load_model(name)
        if as_json:
            print_json({**_figures(spec, kv_dtype, state_dtype), "layers": list(_layer_runs(spec))}, indent=2)
        else:
            _print_one(spec, kv_dtype, state_dtype)
        return
    specs = [load_model(preset) for preset in preset_names()]
    if as_json:
        print_json({"models": [_figures(spec, kv_dtype, state_dtype) for spec in specs]}, indent=2)
    else:
        _print_all(specs, kv_dtype, state_dtype)


def _figures(spec: ModelSpec, kv_dtype: str | None, state_dtype: str | None) -> dict[str, object]:
    """The figures of one model as they stand in the JSON; bytes are of one sequence, all layers."""
    return {
        "name": spec.name,
        "family": spec.family,
        "num_parameters": spec.num_parameters,
        "num_active_parameters": spec.num_active_parameters,
        "parameters_source": spec.parameters_source,
        "num_layers": len(spec.layers),
        "num_attention_layers": spec.num_attention_layers,
        "num_ssm_layers": spec.num_ssm_layers,
        "kv_dtype": kv_dtype or spec.kv_dtype,
        "state_dtype": state_dtype or spec.state_dtype,
        "conv_dtype": spec.conv_dtype,
        "kv_bytes_per_token": spec.kv_bytes_per_token(kv_dtype),
        "ssm_state_bytes": spec.ssm_state_bytes(state_dtype),
        "conv_state_bytes": spec.conv_state_bytes(),
        "snapshot_bytes": spec.snapshot_bytes(state_dtype),
        "kv_tokens_per_snapshot": spec.kv_tokens_per_snapshot(kv_dtype, state_dtype),
        "source": spec.source,
        "confidence": spec.confidence,
    }


def _layer_runs(spec: ModelSpec) -> Iterator[dict[str, object]]:
    """Runs of equal layers: the first and last index, and what one of them keeps, in elements."""
    for layer, run in groupby(enumerate(spec.layers), key=lambda indexed: indexed[1]):
        indices = [index for index, _ in run]
        yield {
            "first": indices[0],
            "last": indices[-1],
            "kinds": list(layer.kinds),
            "kv_elements_per_token": dict(layer.attention.elements_by_role()) if layer.attention else {},
            "ssm_kind": layer.ssm.kind if layer.ssm else None,
            "state_shape": list(layer.ssm.state_shape) if layer.ssm else None,
            "conv_shape": list(layer.ssm.conv_shape) if layer.ssm else None,
        }


def _plain_table(*columns: tuple[str, bool]) -> Table:
    """A table of one space between columns; each column is a heading and whether it holds numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading, is_number in columns:
        table.add_column(heading, justify="right" if is_number else "left", no_wrap=not is_number, vertical="bottom")
    return table


def _billions(spec: ModelSpec) -> str:
    if spec.num_parameters is None:
        return "-"
    counts = [count for count in (spec.num_parameters, spec.num_active_parameters) if count is not None]
    return "/".join(f"{count / 1e9:.3g}" for count in counts)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}" if num_bytes else "-"


# heading, whether it holds numbers, and whether a narrow terminal shows it too: a number that is cut is worse than none
_COLUMNS = (
    ("model", False, True),
    ("params\nG", True, False),
    ("layers\nA/S", True, True),
    ("KV\nB/token", True, True),
    ("SSM\nMB", True, False),
    ("conv\nMB", True, False),
    ("snap-\nshot MB", True, True),
    ("= KV\ntokens", True, True),
    ("source", False, False),
)
_FULL_WIDTH = 80


def _print_all(specs: list[ModelSpec], kv_dtype: str | None, state_dtype: str | None) -> None:
    console = Console(highlight=False)
    columns = _COLUMNS if console.width >= _FULL_WIDTH else tuple(column for column in _COLUMNS if column[2])
    table = _plain_table(*((heading, is_number) for heading, is_number, _ in columns))
    for spec in specs:
        kv_bytes, weight = spec.kv_bytes_per_token(kv_dtype), spec.kv_tokens_per_snapshot(kv_dtype, state_dtype)
        values = (
            spec.name,
            _billions(spec),
            f"{spec.num_attention_layers}/{spec.num_ssm_layers}",
            f"{kv_bytes:,}" if kv_bytes else "-",
            _megabytes(spec.ssm_state_bytes(state_dtype)),
            _megabytes(spec.conv_state_bytes()),
            _megabytes(spec.snapshot_bytes(state_dtype)),
            f"{weight:,.0f}" if weight is not None else "-",
            _SHORT_CONFIDENCES.get(spec.confidence, spec.confidence),
        )
        table.add_row(*(value for value, column in zip(values, _COLUMNS, strict=True) if column in columns))
    console.print(table)
    console.print(
        "\nparams: total/active, billions. layers: attention/SSM. MB: 10^6 bytes, one sequence. "
        f"KV in {kv_dtype or 'the dtype of the model'}, SSM states in {state_dtype or 'their default dtype'}, "
        "convolution windows in the dtype of the model. `ssmcache models NAME` names the dtypes and the source."
    )


def _layer_text(layer: LayerSpec) -> str:
    parts = []
    if layer.attention:
        elements = ", ".join(f"{role} {count:,}" for role, count in layer.attention.elements_by_role())
        parts.append(f"attention ({elements})")
    if layer.ssm:
        state, conv = (" x ".join(map(str, shape)) for shape in (layer.ssm.state_shape, layer.ssm.conv_shape))
        parts.append(f"{layer.ssm.kind} (state {state}, conv {conv})")
    if layer.feed_forward:
        parts.append(layer.feed_forward)
    return " + ".join(parts)


def _print_one(spec: ModelSpec, kv_dtype: str | None, state_dtype: str | None) -> None:
    weight = spec.kv_tokens_per_snapshot(kv_dtype, state_dtype)
    facts = Table.grid(padding=(0, 2))
    rows = (
        ("model", f"{spec.name} (family {spec.family})"),
        (
            "parameters",
            f"{_billions(spec)} billion ({spec.parameters_source})" if spec.num_parameters else "not stated",
        ),
        ("KV", f"{spec.kv_bytes_per_token(kv_dtype):,} bytes a token, in {kv_dtype or spec.kv_dtype}"),
        ("SSM state", f"{spec.ssm_state_bytes(state_dtype):,} bytes, in {state_dtype or spec.state_dtype}"),
        ("conv state", f"{spec.conv_state_bytes():,} bytes, in {spec.conv_dtype}"),
        ("snapshot", f"{spec.snapshot_bytes(state_dtype):,} bytes"),
        ("weighs", "-" if weight is None else f"as much as the KV of {weight:,.1f} tokens"),
        ("source", spec.source),
        ("how sure", f"{spec.confidence}: {CONFIDENCES.get(spec.confidence, 'read from the file named above')}"),
    )
    for label, text in rows:
        facts.add_row(label, text)
    console = Console(highlight=False, markup=False)
    console.print(facts)
    # the same few layers repeat; a line for each kind is what a reader wants, a line for each run is in the JSON
    layers = Table.grid(padding=(0, 2))
    for layer in dict.fromkeys(spec.layers):
        layers.add_row(f"{spec.layers.count(layer)} x", _layer_text(layer))
    console.print(f"\n{len(spec.layers)} layers; elements per token, shapes of one sequence:")
    console.print(layers)
