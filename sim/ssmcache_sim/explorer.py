"""The cells of a sweep for every model there is, at more memory sizes: what a report's explorer chooses from."""

from collections.abc import Sequence
from functools import cache
from itertools import product

from ssmcache.config import KVCacheManagerConfig
from ssmcache.models import ModelSpec, load_model, preset_names
from ssmcache_sim.grid_cells import GridCapacity, grid_capacity, grid_totals
from ssmcache_sim.plane import memory_steps
from ssmcache_sim.settings import ReplaySettings, build_config, make_settings
from ssmcache_sim.sweep import SweepSpec
from ssmcache_sim.totals import ReplayTotals
from ssmcache_sim.trace import Trace

_NUM_SIZES = 24


def explorer_cells(spec: SweepSpec, trace: Trace, model: ModelSpec) -> list[tuple[ReplaySettings, ReplayTotals]]:
    """The sweep's blocks and intervals for its own model and all presets, at its memory sizes and sizes in between.

    Only cells that the grid can do; combinations that no cache can have are left out. The sweep's own model comes
    first.

    Cost: one pass over the trace, and a config for each cell.
    """
    presets = [load_model(name) for name in preset_names() if name != model.name]
    in_block = cache(trace.with_block)  # many cells share a block size
    found: list[tuple[ReplaySettings, KVCacheManagerConfig, GridCapacity]] = []
    for one in (model, *presets):
        for settings in _combinations(spec, one):
            try:
                config = build_config(one, settings)
                capacity = grid_capacity(in_block(settings.tokens_per_block), config)
            except ValueError:  # an error of the user, or what no pool can be divided into
                continue
            if not isinstance(capacity, str):
                found.append((settings, config, capacity))
    if not found:
        return []
    totals = grid_totals(trace, [(config, capacity) for _, config, capacity in found])
    return [(settings, of_cell) for (settings, _, _), of_cell in zip(found, totals, strict=True)]


def _combinations(spec: SweepSpec, model: ModelSpec) -> Sequence[ReplaySettings]:
    intervals = sorted(spec.ssm_reuse_intervals) if model.num_ssm_layers else [None]
    finite = [size for size in spec.gpu_memory_bytes if size is not None]
    sizes: list[int | None] = [*memory_steps(finite, _NUM_SIZES)] if finite else []
    if None in spec.gpu_memory_bytes:
        sizes.append(None)
    return [
        make_settings(
            model,
            block,
            ssm_reuse_interval=interval,
            gpu_memory_bytes=size,
            ssm_fraction=spec.ssm_fraction,
            kv_dtype=spec.kv_dtype,
            state_dtype=spec.state_dtype,
            prefill=spec.prefill,
        )
        for block, interval, size in product(sorted(spec.tokens_per_block), intervals, sizes)
    ]
