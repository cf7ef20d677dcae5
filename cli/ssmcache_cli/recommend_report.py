"""The answer of `recommend` in words, as a table, and as a command that replays it."""

import shlex
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ssmcache_sim.candidates import Shape
from ssmcache_sim.certainty import CaseResult
from ssmcache_sim.recommend import Choice, Recommendation
from ssmcache_sim.recommend_results import tier_names_of
from ssmcache_sim.search import differs
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.sizes import format_size

_CAPTION = (
    "skipped: of the prompt tokens; saved: of the modelled prefill time without a prefix cache; ceiling: saved with "
    "unlimited memory. The best block size and split for each interval; `last`: of each request's last boundary alone."
)
_ESTIMATED = " ~: estimated, not replayed."

# heading, and whether it is shown where there is little room
_COLUMNS = (
    ("interval", True),
    ("block", True),
    ("for SSM", False),
    ("skipped", True),
    ("saved", True),
    ("ceiling", False),
)
_FULL_WIDTH = 60
_ADMISSION_SUFFIX = {"every": "", "last": " last"}
_TIERS = {"gpu": "on the GPU", "host": "in host memory", "disk": "on disk"}
_NO_PHASE = "Phase: not judged, there is no room for longer prompts, or intervals are one block of the trace."
_ONLY_ONE = "No runner-up: there was nothing else to choose from."


def print_report(trace_name: str, model_name: str, answer: Recommendation, replay_words: Sequence[str]) -> None:
    """Prints everything. `replay_words` are the trace and the options that a replay of it needs too."""
    console = Console(highlight=False, markup=False)
    for paragraph in (
        f"{trace_name}, {model_name}{_memory_text(answer.best.settings)}",
        _best_text(answer),
        _runner_up_text(answer),
        _ceiling_text(answer),
        _search_text(answer),
        _parts_text(answer),
        _phases_text(answer),
        _costs_text(answer),
        _left_out_text(answer),
    ):
        if paragraph:
            console.print(f"{paragraph}\n")
    console.print(_table(answer, console.width))
    console.print("To replay it:")
    for line in _wrapped(_replay_words(answer.best.settings, replay_words), console.width):
        console.print(line, soft_wrap=True)


def _best_text(answer: Recommendation) -> str:
    best, cost = answer.best, answer.cost
    pays = "" if best.saved_ns > 0 else "No setting saves time. The least bad one: "
    hours = f"{_seconds(best.saved_ns)} of {_seconds(answer.plain_ns)} on one {cost.device.name}"
    return (
        f"{pays}Use {_shape_text(best.settings)}{_split_text(best)}: {_share(answer.hit_rate(best.hit_tokens))} of the "
        f"prompt tokens are skipped, and {_share(answer.saved_share(best.saved_ns))} of the prefill time is saved "
        f"({hours}, prefill {cost.prefill}).{_tiers_text(answer)}"
    )


def _memory_text(settings: ReplaySettings) -> str:
    """The tiers, where there are several."""
    sizes = {"GPU": settings.gpu_memory_bytes, "host": settings.host_memory_bytes, "disk": settings.disk_memory_bytes}
    shown = [f"{name} {format_size(size)}" for name, size in sizes.items() if size]
    return f"\n{', '.join(shown)}" if len(shown) > 1 else ""


def _tiers_text(answer: Recommendation) -> str:
    """Where the hits lay, with several tiers."""
    best = answer.best
    if len(best.hit_tokens_by_tier) == 1:
        return ""
    named = zip(tier_names_of(best.settings), best.hit_tokens_by_tier, strict=True)
    shares = [f"{_share(answer.hit_rate(tokens))} {_TIERS[name]}" for name, tokens in named]
    return f" They lay {', '.join(shares)}; what came up from there cost time, which is counted."


def _shape_text(settings: ReplaySettings) -> str:
    block = f"block {settings.tokens_per_block:,}"
    if settings.ssm_reuse_interval is None:
        return block
    kept = "" if settings.admission == "every" else ", the last boundary of each request alone"
    return f"interval {settings.ssm_reuse_interval:,}, {block}{kept}"


def _split_text(best: Choice) -> str:
    memory = best.settings.gpu_memory_bytes
    pages = f"{best.num_pages:,} pages of {format_size(best.page_bytes)}"
    if not best.num_slots or memory is None:
        return f" ({pages})"
    near = ""
    if best.near_best_slots is not None:
        low, high = (slots * best.slot_bytes / memory for slots in best.near_best_slots)
        near = f"; from {low:.1%} to {high:.1%} it saves at most a hundredth less"
    return (
        f", and {best.num_slots * best.slot_bytes / memory:.1%} of {format_size(memory)} for SSM states "
        f"({best.num_slots:,} of {format_size(best.slot_bytes)}, {pages}{near})"
    )


def _runner_up_text(answer: Recommendation) -> str:
    best, runner_up, certainty = answer.best, answer.runner_up, answer.certainty
    if runner_up is None:
        return "No runner-up: nothing else was measured." if answer.num_replays else _ONLY_ONE
    fewer = answer.hit_rate(best.hit_tokens - runner_up.hit_tokens)
    text = (
        f"Runner-up: {_shape_text(runner_up.settings)}, saves {_share(answer.saved_share(runner_up.saved_ns))} of the "
        f"time, {_points(certainty.margin_share)} less, and skips {_share(answer.hit_rate(runner_up.hit_tokens))} of "
        f"the tokens, {_points(abs(fewer))} {'less' if fewer >= 0 else 'more'}."
    )
    if not certainty.within_noise:
        return text
    return (
        f"{text} Warning: that is within noise, {_points(certainty.noise_share)} on its parts and shifts; take either."
    )


def _ceiling_text(answer: Recommendation) -> str:
    ceiling, shape = answer.ceiling, answer.ceiling.shape
    best_of_all = (
        f"block {shape.tokens_per_block:,}"
        if shape.ssm_reuse_interval is None
        else f"interval {shape.ssm_reuse_interval:,}"
    )
    return (
        "Ceiling: with unlimited memory these settings would save "
        f"{_share(answer.saved_share(answer.best.ceiling.saved_ns))} of the time, the best ones ({best_of_all}) "
        f"{_share(answer.saved_share(ceiling.saved_ns))}; attention alone would skip "
        f"{_share(answer.hit_rate(answer.kv_ceiling_hit_tokens))} of the tokens."
    )


def _search_text(answer: Recommendation) -> str:
    """What was replayed, if anything was, and whether that was enough."""
    if not answer.num_replays:
        return ""
    text = f"The grid cannot tell all of this exactly: {answer.num_replays} settings were replayed, best promise first."
    if not answer.num_promising:
        return f"{text} By their estimates, no others come near."
    return f"{text} By their estimates, {answer.num_promising} others might be better: raise --replays to look at them."


def _phases_text(answer: Recommendation) -> str:
    cases = answer.certainty.phase_cases
    if not cases:
        return _NO_PHASE if answer.best.shape.ssm_reuse_interval is not None else ""
    saved = [case.best_saved_share for case in cases]
    ahead = sum(case.margin_share > 0 for case in cases)
    compared = f", and is ahead of the runner-up in {ahead}" if answer.runner_up is not None else ""
    shifts = "1 shift" if len(cases) == 1 else f"{len(cases)} shifts"
    return (
        f"Phase: with {shifts} of all prompts against the interval, as by a longer system prompt, it saves "
        f"{_share(min(saved))} to {_share(max(saved))}{compared}."
    )


def _parts_text(answer: Recommendation) -> str:
    cases = answer.certainty.part_cases
    if not cases:
        return "How sure: the trace is too short to ask parts of it."
    saved = [case.best_saved_share for case in cases]
    ahead = sum(case.margin_share > 0 for case in cases)
    compared = f", is ahead of the runner-up on {ahead}" if answer.runner_up is not None else ""
    among = ", of these two and all that need no replay" if answer.num_replays else ""
    return (
        f"How sure: on {len(cases)} parts of the trace (halves, and random pieces as long, each from an empty cache) "
        f"it saves {_share(min(saved))} to {_share(max(saved))}{compared}, and at most "
        f"{_points(max(map(_regret, cases)))} less than what is best for that part{among}."
    )


def _costs_text(answer: Recommendation) -> str:
    cases = [case for case in answer.certainty.cases if case.kind == "cost"]
    others = [case for case in cases if differs(case.own_shape, answer.best.shape)]
    if not others:
        return f"The choice is the same with {len(cases)} other costs: {', '.join(case.label for case in cases)}."
    changes = "; ".join(
        f"{case.label}: {_step_text(case.own_shape)} saves {_points(_regret(case))} more "
        f"({_share(case.own_saved_share)})"
        for case in others
    )
    return f"With {len(others)} of {len(cases)} other costs another choice is better. {changes}."


def _step_text(shape: Shape) -> str:
    return f"{shape.step:,}{_ADMISSION_SUFFIX[shape.admission]}"


def _left_out_text(answer: Recommendation) -> str:
    if not answer.left_out:
        return ""
    steps = sorted({each.shape.step for each in answer.left_out})
    least = min(each.least_memory_bytes for each in answer.left_out)
    which = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
    judged = {choice.shape.admission for choice in answer.choices}
    every = ", every boundary kept" if not judged <= {each.shape.admission for each in answer.left_out} else ""
    return f"Not judged: {which}{every}, where the largest request alone needs {format_size(least)} or more."


def _table(answer: Recommendation, width: int) -> Table:
    choices = list(_best_of_each_interval(answer))
    has_estimates = any(choice.by == "estimate" for choice in choices)
    table = Table(
        caption=_CAPTION + _ESTIMATED * has_estimates, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    columns = _COLUMNS if width >= _FULL_WIDTH else tuple(column for column in _COLUMNS if column[1])
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for choice in choices:
        memory, about = choice.settings.gpu_memory_bytes, "~" * (choice.by == "estimate")
        values = (
            "-" if choice.shape.ssm_reuse_interval is None else _step_text(choice.shape),
            f"{choice.settings.tokens_per_block:,}",
            f"{choice.num_slots * choice.slot_bytes / memory:.1%}" if choice.num_slots and memory else "-",
            about + _share(answer.hit_rate(choice.hit_tokens)),
            about + _share(answer.saved_share(choice.saved_ns)),
            _share(answer.saved_share(choice.ceiling.saved_ns)),
        )
        table.add_row(*(value for value, column in zip(values, _COLUMNS, strict=True) if column in columns))
    return table


def _best_of_each_interval(answer: Recommendation) -> Iterator[Choice]:
    seen = set()
    for choice in answer.choices:  # best first
        if (choice.shape.step, choice.shape.admission) not in seen:
            seen.add((choice.shape.step, choice.shape.admission))
            yield choice


def _replay_words(settings: ReplaySettings, replay_words: Sequence[str]) -> list[str]:
    """The command, in pieces that belong together."""
    trace, *options = replay_words
    words = ["ssmcache replay", shlex.quote(trace)]
    words += _in_pairs([*options, "--tokens-per-block", str(settings.tokens_per_block)])
    if settings.ssm_reuse_interval is not None:
        words += _in_pairs(["--ssm-reuse-interval", str(settings.ssm_reuse_interval)])
        words += _in_pairs(["--admission", "last"]) if settings.admission == "last" else []
        words += _in_pairs(["--ssm-fraction", str(settings.ssm_fraction), "--prefill", settings.prefill])
    return words


def _in_pairs(words: Sequence[str]) -> list[str]:
    """Each option with its value, quoted for a shell."""
    pairs: list[str] = []
    for word in words:
        if word.startswith("--") or not pairs:
            pairs.append(word)
        else:
            pairs[-1] += f" {shlex.quote(word)}"
    return pairs


def _wrapped(words: Sequence[str], width: int) -> Iterator[str]:
    """Lines of a shell command, no longer than the width where words allow it."""
    line = words[0]
    for word in words[1:]:
        if len(line) + len(word) + 3 > width:
            yield f"{line} \\"
            line = f"    {word}"
        else:
            line = f"{line} {word}"
    yield line


def _regret(case: CaseResult) -> float:
    return case.own_saved_share - case.best_saved_share


def _share(share: float) -> str:
    return f"{share:.2%}"


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:,.0f} s"
