"""Trace-driven simulation of a prefix cache: replay a request trace through the manager and see what it gains.

What most users need is here, for scripts and notebooks; models come from `ssmcache.models.load_model`:

- `read_trace`, `describe`;
- `make_settings` and `replay_run`, `sweep_run`, `Question` and `recommend_run`: results as data frames, one row a
  request, a cell or a setting, units in the names of the columns;
- `load_run`, `load_sweep`: what the commands have written with `--out`, as the same kind of result;
- pictures of all of them: `ssmcache_sim.plots`.

Nothing is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmcache_sim.candidates import Question
    from ssmcache_sim.errors import UserError
    from ssmcache_sim.formats import ReadOptions, read_trace
    from ssmcache_sim.results import ReplayRun, load_run
    from ssmcache_sim.runs import RecommendRun, recommend_run, replay_run, sweep_run
    from ssmcache_sim.sessions import parse_session_start
    from ssmcache_sim.settings import ReplaySettings, build_config, make_settings
    from ssmcache_sim.sizes import format_size, parse_size
    from ssmcache_sim.sweep_results import SweepRun, load_sweep
    from ssmcache_sim.trace import Trace
    from ssmcache_sim.trace_info import describe

_MODULES = {
    "candidates": ("Question",),
    "errors": ("UserError",),
    "formats": ("ReadOptions", "read_trace"),
    "results": ("ReplayRun", "load_run"),
    "runs": ("RecommendRun", "recommend_run", "replay_run", "sweep_run"),
    "sessions": ("parse_session_start",),
    "settings": ("ReplaySettings", "build_config", "make_settings"),
    "sizes": ("format_size", "parse_size"),
    "sweep_results": ("SweepRun", "load_sweep"),
    "trace": ("Trace",),
    "trace_info": ("describe",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Question",
    "ReadOptions",
    "RecommendRun",
    "ReplayRun",
    "ReplaySettings",
    "SweepRun",
    "Trace",
    "UserError",
    "build_config",
    "describe",
    "format_size",
    "load_run",
    "load_sweep",
    "make_settings",
    "parse_session_start",
    "parse_size",
    "read_trace",
    "recommend_run",
    "replay_run",
    "sweep_run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # asked once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
