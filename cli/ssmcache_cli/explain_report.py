"""What `explain` prints: totals by cause with what they mean, and stories, legible from 60 columns on."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from ssmcache.config import KVCacheManagerConfig
from ssmcache_cli.tables import add_causes, memory_words
from ssmcache_sim.explain import Explanation, RequestStory
from ssmcache_sim.explain_words import closing_words, heading, lost_words, paragraphs, remedy_words
from ssmcache_sim.settings import ReplaySettings
from ssmcache_sim.totals import ReplayTotals

# column: what it means, and what would help
_MEANINGS = (
    (
        "lost_evicted_tokens",
        "KV evicted",
        "an earlier prompt began with them, but their KV is gone: more memory for KV.",
    ),
    (
        "lost_evicted_too_large_tokens",
        "requests too large",
        "the request, or all before it that had their block, does not fit into the memory even alone, and is served "
        "without the cache: more memory for KV.",
    ),
    (
        "lost_alignment_tokens",
        "alignment",
        "their KV was there beyond the last boundary of the interval: a smaller interval.",
    ),
    (
        "lost_snapshot_evicted_tokens",
        "snapshot evicted",
        "their KV was there, but the state at the end of their interval had to make way: more memory for states, or a "
        "larger interval.",
    ),
    (
        "lost_snapshot_no_room_tokens",
        "no room",
        "their KV was there, but no state was kept at the end of their interval, since all states of one prompt do not "
        "fit: more memory for states, or a larger interval.",
    ),
    (
        "never_seen_tokens",
        "never seen",
        "no earlier prompt began with their block: no cache helps, smaller blocks may.",
    ),
    ("last_block_tokens", "last block", "the rest of each prompt after its last countable block: smaller blocks."),
)


def print_totals(trace_name: str, settings: ReplaySettings, totals: ReplayTotals) -> None:
    """Where all prompt tokens went, and what that means."""
    interval = settings.ssm_reuse_interval
    shape = f"block {settings.tokens_per_block}" + (f", interval {interval}" if interval else ", no SSM layers")
    title = f"{trace_name}, {settings.model}\n{shape}, {memory_words(settings)}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("prompt tokens")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_row("[bold]skipped (usable hit)[/bold]", *_tokens(totals, totals.usable_hit_tokens))
    add_causes(table, totals)
    table.add_row("all", *_tokens(totals, totals.prompt_tokens))
    console = Console(highlight=False)
    console.print(table)
    for column, name, meaning in _MEANINGS:
        if getattr(totals, column):
            console.print(Padding(f"[bold]{name}[/bold]: {meaning}", (0, 0, 0, 2)))
    console.print()


def print_stories(explanation: Explanation, config: KVCacheManagerConfig) -> None:
    console = Console(highlight=False)
    if not explanation.stories:
        console.print("No request lost anything that it shared with an earlier one.")
    for number, story in enumerate(explanation.stories):
        if number:
            console.print()
        _print_story(console, story, explanation, config)


def _print_story(console: Console, story: RequestStory, explanation: Explanation, config: KVCacheManagerConfig) -> None:
    console.print(f"[bold]{escape(heading(story, explanation))}[/bold]")
    for words in paragraphs(story, explanation, config):
        console.print(words, markup=False)
    for part in story.parts:
        _item(console, lost_words(part, story, explanation, config))
    for remedy in story.remedies:
        _item(console, remedy_words(remedy, config), mark="+")
    if words := closing_words(story, explanation):
        console.print(words, markup=False)


def _item(console: Console, words: str, mark: str = "-") -> None:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2, justify="right")
    table.add_column()
    table.add_row(mark, escape(words))
    console.print(table)


def _tokens(totals: ReplayTotals, tokens: int) -> tuple[str, str]:
    return f"{tokens:,}", f"{totals.rate(tokens):.2%}"
