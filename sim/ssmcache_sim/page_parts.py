"""Pieces of a report's page. Whatever comes from a file is escaped here: callers give text, and get markup."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

Markup = str  # already escaped

# anchor, term, definition
GLOSSARY = (
    ("usable", "usable token hit rate", "Prompt tokens that requests really skip, of all prompt tokens. Only full "
     "blocks count, and at least one token of each prompt is computed, since its logits are needed."),
    ("ceiling", "ceiling", "The usable token hit rate with unlimited memory, at this snapshot interval and block."),
    ("kv-ceiling", "KV ceiling", "The hit rate with unlimited memory for attention alone, as if no layer had a "
     "recurrent state: full blocks that an earlier prompt began with too."),
    ("attention", "KV present", "Prompt tokens whose KV was in the cache. Without a snapshot at the right place they "
     "cannot be skipped."),
    ("tree", "prefix known", "Prompt tokens of which the cache still knew the prefix, with its KV or without."),
    ("evicted", "lost: KV evicted", "KV ceiling less the KV present: what more memory for KV would hit. In part lost "
     "to requests that are too large for the memory and were served without the cache."),
    ("alignment", "lost: alignment", "KV present beyond the last multiple of the snapshot interval, where no "
     "snapshot is ever taken: what a smaller interval would hit."),
    ("snapshot", "lost: no snapshot", "KV present, but no snapshot at a usable position. Each interval of tokens is "
     "blamed on what happened last to the snapshot at its end: evicted, or not taken and why."),
    ("never-seen", "never seen before", "Full blocks that no earlier prompt began with."),
    ("last-block", "last block of each prompt", "The tokens after a prompt's last countable block: a block that is not "
     "full has no identity, and the last token of a full one must be computed."),
    ("snapshots", "snapshot", "The state of the recurrent (SSM) layers after exactly so many tokens of a prompt. A "
     "prefix can be skipped only up to a position that has one."),
    ("interval", "snapshot interval", "Tokens between two snapshots of a prompt (ssm_reuse_interval)."),
    ("block", "block", "Consecutive tokens whose KV is kept, shared and evicted together (tokens_per_block)."),
    ("phase", "phase", "Where the prompts lie on the grid of snapshots. The figures say what happens if the same "
     "tokens stand in front of every prompt, as from a longer system prompt; tokens in front count neither as hits nor "
     "as prompt tokens. Shifts by whole blocks of the trace are exact, in between there are bounds."),
    ("engine", "engine", "How a cell was made: grid, in one pass over the trace, or replay, through the cache "
     "manager. Where the grid is used both give the same tokens."),
)  # fmt: skip
_DEFINITIONS = {anchor: definition for anchor, _, definition in GLOSSARY}


def text(value: object) -> Markup:
    return escape(str(value))


def term(anchor: str, name: str) -> Markup:
    """A word with its definition: to hover, and a link to the glossary for everybody else."""
    return f'<a class="term" href="#g-{anchor}" title="{escape(_DEFINITIONS[anchor])}">{escape(name)}</a>'


def glossary() -> Markup:
    items = "".join(f'<dt id="g-{anchor}">{text(name)}</dt><dd>{text(what)}</dd>' for anchor, name, what in GLOSSARY)
    return section("Definitions", f"<dl>{items}</dl>")


def section(heading: str, body: Markup) -> Markup:
    return f"<section><h2>{text(heading)}</h2>{body}</section>\n"


def number(label: Markup, value: str, note: str = "") -> Markup:
    """One headline number."""
    return f'<div>{label}<b>{text(value)}</b><span class="soft">{text(note)}</span></div>'


def table(caption: str, headings: Sequence[Markup], rows: Iterable[Sequence[Markup]]) -> Markup:
    """A table that scrolls by itself where it is too wide; the first cell of a row names it."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    inner = f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    # a region that scrolls must be reachable by keyboard, and so have a name
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>{inner}</table></div>'


def folded(summary: str, body: Markup) -> Markup:
    return f"<details><summary>{text(summary)}</summary>{body}</details>"


def warning(body: Markup) -> Markup:
    return f'<p class="warning"><strong>Warning.</strong> {body}</p>'


def picture(svg: bytes, caption: str) -> Markup:
    """An SVG within the page, by its data: as an image of its own its ids and styles meet no others."""
    data = base64.b64encode(svg).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
    )


def script_json(serialised: str) -> Markup:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    for character in "<>&\u2028\u2029":
        serialised = serialised.replace(character, f"\\u{ord(character):04x}")
    return serialised


def percent(share: float) -> str:
    return f"{share:.2%}"
