"""Who makes a cell of a sweep: the one-pass grid where it is exact, else a replay; and for which kind of memory."""

from typing import Literal, cast, get_args

from ssmcache.config import Admission, KVCacheManagerConfig
from ssmcache_sim.errors import UserError
from ssmcache_sim.grid_cells import ARENA, EXACT, EXACT_LAST, ArenaCapacity, GridCapacity, arena_capacity, grid_capacity
from ssmcache_sim.memory_needed import check_memory
from ssmcache_sim.trace import Trace

# auto: the one-pass grid where it is exact, else a replay
Engine = Literal["auto", "replay"]
# separate: a pool for each layer group, as a manager has; arena: one budget of bytes, which the grid alone can do
Pools = Literal["separate", "arena"]


def parse_engine(text: str) -> Engine:
    """Errors: UserError."""
    if text not in get_args(Engine):
        raise UserError(f"engine: expected {' or '.join(get_args(Engine))}, got {text!r}")
    return cast(Engine, text)


def parse_pools(text: str) -> Pools:
    """Errors: UserError."""
    if text not in get_args(Pools):
        raise UserError(f"pools: expected {' or '.join(get_args(Pools))}, got {text!r}")
    return cast(Pools, text)


def check_pools(
    pools: Pools,
    engine: Engine,
    ssm_fraction: float | None,
    has_lower_tiers: bool = False,
    admissions: tuple[Admission, ...] = ("every",),
) -> None:
    """Errors: UserError for an arena with what only pools have."""
    if pools != "arena":
        return
    if engine != "auto":
        raise UserError(f"engine: expected auto for an arena, which no manager can replay, got {engine}")
    if ssm_fraction is not None:
        raise UserError(f"ssm_fraction: expected none for an arena, which has no shares, got {ssm_fraction:g}")
    if has_lower_tiers:
        raise UserError("host and disk memory: expected none for an arena, which is one tier, got some")
    if admissions != ("every",):
        raise UserError(f"admission: expected every for an arena, got {', '.join(admissions)}")


def choose_engine(
    pools: Pools, engine: Engine, trace: Trace, config: KVCacheManagerConfig
) -> tuple[GridCapacity | ArenaCapacity | None, str]:
    """What the grid needs to know of a cell, None for a replay; and why, in plain words.

    Args:
        trace: in blocks of the config.

    Errors: UserError where neither can do the cell.
    """
    if pools == "arena":
        return arena_capacity(trace, config), ARENA
    check_memory(trace, config)
    if engine == "replay":
        return None, "asked for"
    capacity = grid_capacity(trace, config)
    if isinstance(capacity, str):
        return None, capacity
    return capacity, EXACT_LAST if config.has_ssm and config.admission == "last" else EXACT
