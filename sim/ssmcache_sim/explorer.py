"""The cells of a sweep for every model there is, at more memory sizes: what a report's explorer chooses from."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from ssmcache.config import GpuCacheTierConfig, KVCacheManagerConfig
from ssmcache.models import ModelSpec, load_model, preset_names
from ssmcache_sim.errors import SettingsError
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

    Cost: one pass over the trace, and little for each cell.
    """
    presets = [load_model(name) for name in preset_names() if name != model.name]
    finite = [size for size in spec.gpu_memory_bytes if size is not None]
    sizes: list[int | None] = [*memory_steps(finite, _NUM_SIZES)] if finite else []
    if None in spec.gpu_memory_bytes:
        sizes.append(None)
    in_block = cache(trace.with_block)  # many cells share a block size
    found: list[tuple[ReplaySettings, KVCacheManagerConfig, GridCapacity]] = []
    for one in (model, *presets):
        for shape, config in _shapes(spec, one):
            for size in sizes:
                sized = replace(config, cache_tiers=(GpuCacheTierConfig(size),))
                capacity = _capacity(in_block, sized)
                if capacity is not None:
                    found.append((replace(shape, gpu_memory_bytes=size), sized, capacity))
    if not found:
        return []
    totals = grid_totals(trace, [(config, capacity) for _, config, capacity in found])
    return [(settings, of_cell) for (settings, _, _), of_cell in zip(found, totals, strict=True)]


def _shapes(spec: SweepSpec, model: ModelSpec) -> Iterator[tuple[ReplaySettings, KVCacheManagerConfig]]:
    """Blocks and intervals that the model can have, as settings and config of unlimited memory."""
    intervals = sorted(spec.ssm_reuse_intervals) if model.num_ssm_layers else [None]
    for block, interval in product(sorted(spec.tokens_per_block), intervals):
        settings = make_settings(
            model,
            block,
            ssm_reuse_interval=interval,
            gpu_memory_bytes=None,
            ssm_fraction=spec.ssm_fraction,
            kv_dtype=spec.kv_dtype,
            state_dtype=spec.state_dtype,
            prefill=spec.prefill,
        )
        try:
            yield settings, build_config(model, settings)
        except SettingsError:
            continue


def _capacity(in_block: Callable[[int], Trace], config: KVCacheManagerConfig) -> GridCapacity | None:
    """None where the grid cannot do the cell, or where there is no such cell."""
    try:
        capacity = grid_capacity(in_block(config.tokens_per_block), config)
    except ValueError:  # a block that the trace does not record, or a pool without a single slot
        return None
    return None if isinstance(capacity, str) else capacity
