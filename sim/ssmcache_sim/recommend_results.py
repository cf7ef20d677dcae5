"""The result directory of a recommendation: `manifest.json`, `recommendation.json`, `settings.parquet`."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmcache_sim.candidates import Question
from ssmcache_sim.certainty import CaseResult
from ssmcache_sim.directories import MANIFEST, json_bytes, new_directory, write_file
from ssmcache_sim.parquet import write_parquet
from ssmcache_sim.recommend import Choice, Recommendation
from ssmcache_sim.results import RunTimes, manifest_head, manifest_with_times
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.trace import Trace

RECOMMENDATION = "recommendation.json"
SETTINGS = "settings.parquet"
RECOMMEND_COMMAND = "recommend"
_NS_PER_SECOND = 1e9
_TIER_NAMES = ("gpu", "host", "disk")


def recommend_manifest(trace: Trace, model_name: str, question: Question) -> dict[str, Any]:
    """What a recommendation was made of; the same for the same input on the same machine."""
    return {**manifest_head(RECOMMEND_COMMAND, trace), "settings": {"model": model_name, **asdict(question)}}


def recommendation_json(answer: Recommendation, manifest: dict[str, Any]) -> dict[str, Any]:
    """The object that `--json` prints and `recommendation.json` holds. Shares of time are of the time without cache."""
    runner_up, certainty = answer.runner_up, answer.certainty
    best = choice_row(answer, answer.best)
    return {
        "requests": answer.num_requests,
        "prompt_tokens": answer.prompt_tokens,
        "plain_seconds": answer.plain_ns / _NS_PER_SECOND,
        "best": best,
        "runner_up": None if runner_up is None else choice_row(answer, runner_up),
        "ceiling": {
            "tokens_per_block": answer.ceiling.shape.tokens_per_block,
            "ssm_reuse_interval": answer.ceiling.shape.ssm_reuse_interval,
            "admission": answer.ceiling.shape.admission,
            "usable_hit_tokens": answer.ceiling.hit_tokens,
            "usable_token_hit_rate": answer.hit_rate(answer.ceiling.hit_tokens),
            "saved_share": answer.saved_share(answer.ceiling.saved_ns),
            "kv_ceiling_hit_tokens": answer.kv_ceiling_hit_tokens,
            "kv_ceiling_token_hit_rate": answer.hit_rate(answer.kv_ceiling_hit_tokens),
        },
        "certainty": {
            "margin_share": certainty.margin_share,
            "noise_share": certainty.noise_share,
            "within_noise": certainty.within_noise,
            "cases": [_case_row(case) for case in certainty.cases],
        },
        "search": {"replays": answer.num_replays, "more_promising": answer.num_promising},
        "settings": [choice_row(answer, choice) for choice in answer.choices],
        "left_out": [
            {**asdict(left_out.shape), "least_memory_bytes": left_out.least_memory_bytes}
            for left_out in answer.left_out
        ],
        "cost_model": asdict(answer.cost),
        "manifest": manifest,
    }


def choice_row(answer: Recommendation, choice: Choice) -> dict[str, Any]:
    """One block size and interval with its best split, as one flat row."""
    settings = choice.settings
    first, last = choice.near_best_slots or (None, None)
    by_tier = dict(zip(tier_names_of(settings), choice.hit_tokens_by_tier, strict=True))
    return {
        "tokens_per_block": settings.tokens_per_block,
        "ssm_reuse_interval": settings.ssm_reuse_interval,
        "admission": settings.admission,
        "known_by": choice.by,
        "gpu_memory_bytes": settings.gpu_memory_bytes,
        "host_memory_bytes": settings.host_memory_bytes,
        "disk_memory_bytes": settings.disk_memory_bytes,
        "ssm_fraction": settings.ssm_fraction,
        "kv_pages": choice.num_pages,
        "kv_bytes": choice.num_pages * choice.page_bytes,
        "ssm_slots": choice.num_slots,
        "ssm_bytes": choice.num_slots * choice.slot_bytes,
        "ssm_slots_near_best_from": first,
        "ssm_slots_near_best_to": last,
        "usable_hit_tokens": choice.hit_tokens,
        "usable_token_hit_rate": answer.hit_rate(choice.hit_tokens),
        **{f"usable_hit_tokens_{tier}": by_tier.get(tier, 0) for tier in _TIER_NAMES},
        "saved_seconds": choice.saved_ns / _NS_PER_SECOND,
        "saved_share": answer.saved_share(choice.saved_ns),
        "snapshots_taken": choice.snapshots_taken,
        "ceiling_hit_tokens": choice.ceiling.hit_tokens,
        "ceiling_token_hit_rate": answer.hit_rate(choice.ceiling.hit_tokens),
        "ceiling_saved_share": answer.saved_share(choice.ceiling.saved_ns),
    }


def tier_names_of(settings: ReplaySettings) -> list[str]:
    """The tiers that there are, from the GPU down."""
    sizes = (1, settings.host_memory_bytes, settings.disk_memory_bytes)
    return [name for name, size in zip(_TIER_NAMES, sizes, strict=True) if size]


def settings_columns(answer: Recommendation) -> dict[str, list[Any]]:
    """One entry a block size and interval for each column, best first."""
    rows = [choice_row(answer, choice) for choice in answer.choices]
    return {name: [row[name] for row in rows] for name in rows[0]}


def case_columns(answer: Recommendation) -> dict[str, list[Any]]:
    """One entry a repetition of the choice for each column."""
    rows = [_case_row(case) for case in answer.certainty.cases]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _case_row(case: CaseResult) -> dict[str, Any]:
    row = asdict(case)
    shape = row.pop("own_shape")
    return {**row, **{f"own_{name}": value for name, value in shape.items()}}


def recommend_directory(path: Path) -> AbstractContextManager[Path]:
    """A folder for `write_recommendation` that becomes `path` at the end of the block. Errors: OutputError."""
    return new_directory(path, RECOMMEND_COMMAND, frozenset({RECOMMENDATION, SETTINGS}))


def write_recommendation(folder: Path, answer: Recommendation, manifest: dict[str, Any], times: RunTimes) -> None:
    """Writes the three files into `folder`: one row of `settings.parquet` a block size and interval, best first.

    Errors: OutputError.
    """
    write_parquet(folder / SETTINGS, settings_columns(answer))
    write_file(folder / RECOMMENDATION, json_bytes(recommendation_json(answer, manifest)))
    write_file(folder / MANIFEST, json_bytes(manifest_with_times(manifest, times)))
