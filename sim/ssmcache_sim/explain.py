"""The story of single requests: what each of them shared, lost, when that went, and what would have kept it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from ssmcache.config import KVCacheManagerConfig
from ssmcache_sim.accounting import ReplayResult
from ssmcache_sim.causes import SNAPSHOT_CAUSES
from ssmcache_sim.errors import UserError
from ssmcache_sim.fates import BoundaryFates
from ssmcache_sim.history import NOBODY, History, Int32Array, PathHistory
from ssmcache_sim.remedies import Remedies, Remedy
from ssmcache_sim.replay import replay
from ssmcache_sim.settings import Prefill
from ssmcache_sim.trace import Int64Array, Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class LostPart:
    """Tokens `start_token`..`end_token` - 1 of a prompt that were shared, but not skipped, all for one cause.

    Attributes:
        cause: `kv_evicted`, `too_large`, `alignment`, or `snapshot_` and one of `SNAPSHOT_CAUSES`.
        last_used_by: the last request, served with the cache, whose prompt had all tokens up to the part's end.
        first_taken, last_taken: during which requests its snapshots were taken last.
        first_ended, last_ended: during which requests its KV or snapshots were evicted, or its snapshots skipped, last.
        distance: how many blocks of KV (or snapshots) were used since the one at the part's end, itself included.

    Requests are numbers in order of arrival, from 0; None: none, or not known.
    """

    cause: str
    start_token: int
    end_token: int
    last_used_by: int | None = None
    first_taken: int | None = None
    last_taken: int | None = None
    first_ended: int | None = None
    last_ended: int | None = None
    distance: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.end_token - self.start_token


@dataclass(frozen=True, slots=True)
class RequestStory:
    """What became of one request.

    Attributes:
        session, turn: None and 0 where the trace names none.
        shared_with: the last earlier request whose prompt begins with the same `kv_ceiling_tokens`; None for none.
        parts: what was shared and not skipped, from the first token on; empty: nothing was lost.
        remedies: settings with which it would have skipped more.
    """

    request: int
    arrival_ms: float
    session: str | None
    turn: int
    prompt_tokens: int
    usable_tokens: int
    attention_tokens: int
    ceiling_tokens: int
    kv_ceiling_tokens: int
    never_seen_tokens: int
    last_block_tokens: int
    too_large: bool
    shared_with: int | None
    parts: tuple[LostPart, ...]
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """A replay, and the stories of some of its requests.

    Attributes:
        capacity_blocks, capacity_snapshots: what the cache holds beside what one request takes for itself, where the
            grid is exact for it; else None.
        why_replayed: why the least memory that would have helped cannot be told, and a few others were replayed; empty
            where it can.
    """

    result: ReplayResult = field(repr=False)
    stories: tuple[RequestStory, ...]
    capacity_blocks: int | None
    capacity_snapshots: int | None
    why_replayed: str

    def parts(self) -> "pd.DataFrame":
        """One row a lost part of a story, units in the names."""
        return _frame([{"request": story.request, **asdict(part)} for story in self.stories for part in story.parts])

    def remedies(self) -> "pd.DataFrame":
        """One row a setting with which a request would have skipped more."""
        return _frame([{"request": story.request, **asdict(one)} for story in self.stories for one in story.remedies])


def _frame(rows: Sequence[dict[str, object]]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows)).convert_dtypes(dtype_backend="numpy_nullable")


def explain(
    trace: Trace,
    config: KVCacheManagerConfig,
    *,
    requests: Collection[int] | None = None,
    worst: int = 3,
    variants: Sequence[KVCacheManagerConfig] = (),
    prefill: Prefill = "reserved",
    progress: Callable[[int], None] | None = None,
) -> Explanation:
    """Replays the trace, and tells the stories of some requests.

    Args:
        requests: numbers of requests in order of arrival, from 0; None: those that lost the most tokens, `worst` of
            them, for which the trace is replayed twice.
        variants: configs with another interval or block that may be named as remedies: see `variants_of`.
        progress: called with the number of requests served.

    Errors: UserError for a request that the trace does not have, and as `replay`.
    """
    for request in requests or ():
        if not 0 <= request < trace.num_requests:
            raise UserError(f"request: expected 0 to {trace.num_requests - 1}, got {request}")
    first: ReplayResult | None = None
    if requests is None:
        first = replay(trace, config, prefill=prefill, progress=progress)
        requests = worst_requests(first, worst)
        progress = None if progress is None else _after(progress, trace.num_requests)
    made: list[History] = []
    result = replay(trace, config, prefill=prefill, progress=progress, fates=partial(_history, config, requests, made))
    (history,) = made
    history.remember_up_to(trace.num_requests)
    remedies = Remedies(trace, config, variants, prefill)
    chosen = list(dict.fromkeys(requests))
    stories = tuple(_story(result, config, history.paths[request], remedies, request) for request in chosen)
    capacity = remedies.capacity
    return Explanation(
        result=result,
        stories=stories,
        capacity_blocks=None if capacity is None else capacity.all_blocks,
        capacity_snapshots=None if capacity is None else capacity.snapshots,
        why_replayed=remedies.why_replayed,
    )


def worst_requests(result: ReplayResult, count: int) -> list[int]:
    """The requests that lost the most tokens, the most first, of equal ones the earlier first; none without a loss."""
    lost = result.kv_ceiling - result.usable
    order = np.argsort(-lost, kind="stable")[:count]
    return [int(request) for request in order if lost[request]]


def requests_of_session(trace: Trace, name: str) -> list[int]:
    """The requests of one session in order of arrival. Errors: UserError for one that the trace does not have."""
    sessions = trace.sessions
    if sessions is None:
        raise UserError(f"session: expected a trace that names sessions, got {trace.name}, which names none")
    if name not in sessions.names:
        some = ", ".join(sessions.names[:3])
        raise UserError(f"session: expected one of {len(sessions.names)} such as {some}, got {name!r}")
    return [int(request) for request in np.flatnonzero(sessions.index == sessions.names.index(name))]


def _after(progress: Callable[[int], None], done: int) -> Callable[[int], None]:
    return lambda more: progress(done + more)


def _history(
    config: KVCacheManagerConfig, wanted: Collection[int], made: list[History], trace: Trace, kv_ceiling: Int64Array
) -> BoundaryFates:
    made.append(History(trace, config, kv_ceiling, wanted))
    return made[0]


def _story(
    result: ReplayResult, config: KVCacheManagerConfig, path: PathHistory, remedies: Remedies, request: int
) -> RequestStory:
    trace = result.trace
    ceiling, usable, kv_ceiling = (
        int(tokens[request]) for tokens in (result.ceiling, result.usable, result.kv_ceiling)
    )
    sessions = trace.sessions
    session = -1 if sessions is None else int(sessions.index[request])
    return RequestStory(
        request=request,
        arrival_ms=float(trace.arrival_ms[request]),
        session=None if sessions is None or session < 0 else sessions.names[session],
        turn=0 if sessions is None else int(sessions.turns[request]),
        prompt_tokens=int(trace.prompt_tokens[request]),
        usable_tokens=usable,
        attention_tokens=int(result.attention[request]),
        ceiling_tokens=ceiling,
        kv_ceiling_tokens=kv_ceiling,
        never_seen_tokens=int(result.never_seen[request]),
        last_block_tokens=int(result.last_block[request]),
        too_large=bool(result.too_large[request]),
        shared_with=_shared_with(trace, request, kv_ceiling),
        parts=tuple(_parts(result, config, path, remedies, request)),
        remedies=remedies.of(request, usable, ceiling),
    )


def _shared_with(trace: Trace, request: int, num_tokens: int) -> int | None:
    """The last earlier request whose prompt begins with the same tokens."""
    if not num_tokens:
        return None
    start = int(trace.offsets[request])
    key = trace.block_keys[start + num_tokens // trace.tokens_per_block - 1]
    places = np.flatnonzero(trace.block_keys[:start] == key)
    return int(np.searchsorted(trace.offsets, places[-1], side="right")) - 1


def _parts(
    result: ReplayResult, config: KVCacheManagerConfig, path: PathHistory, remedies: Remedies, request: int
) -> Iterator[LostPart]:
    """From the first lost token on."""
    usable, attention, ceiling = (
        int(tokens[request]) for tokens in (result.usable, result.attention, result.kv_ceiling)
    )
    block, aligned = config.tokens_per_block, attention
    if config.has_ssm:
        interval = config.ssm_reuse_interval
        aligned = attention // interval * interval
        boundaries = range(usable // interval, aligned // interval)
        for mark, same in groupby(boundaries, key=lambda boundary: path.marks[boundary]):
            indices = list(same)
            cause, end = SNAPSHOT_CAUSES[mark - 1], (indices[-1] + 1) * interval
            taken = _range(path.taken[indices])
            ended = (None, None) if cause == "window" else _range(path.ended[indices])
            yield LostPart(
                cause=f"snapshot_{cause}",
                start_token=indices[0] * interval,
                end_token=end,
                last_used_by=_known(path.used_by[end // block - 1]),
                first_taken=taken[0],
                last_taken=taken[1],
                first_ended=ended[0],
                last_ended=ended[1],
                distance=remedies.distance(request, end, interval) if cause == "evicted" else None,
            )
    if aligned < attention:
        yield LostPart("alignment", aligned, attention, _known(path.used_by[attention // block - 1]))
    kept = ceiling - int(result.lost_to_size[request])
    if attention < kept:
        gone = path.kv_gone[attention // block : kept // block]
        ended = _range(gone) if gone[0] != NOBODY else (None, None)  # else a page of a window is missing
        yield LostPart(
            cause="kv_evicted",
            start_token=attention,
            end_token=kept,
            last_used_by=_known(path.used_by[kept // block - 1]),
            first_ended=ended[0],
            last_ended=ended[1],
            distance=remedies.distance(request, kept, block),
        )
    if kept < ceiling:
        yield LostPart("too_large", kept, ceiling, _known(path.used_by[ceiling // block - 1]))


def _known(request: np.int32) -> int | None:
    return None if request == NOBODY else int(request)


def _range(requests: Int32Array) -> tuple[int, int] | tuple[None, None]:
    """The first and the last of some requests."""
    known = requests[requests != NOBODY]
    return (int(known.min()), int(known.max())) if known.size else (None, None)
