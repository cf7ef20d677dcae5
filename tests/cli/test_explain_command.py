import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ssmcache_cli.explain as explain_module

Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b")
SETTING = (*MODEL, "--ssm-reuse-interval", 1024, "--gpu-memory", "320GiB")


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("columns", [60, 100])
def test_without_an_option_the_totals_by_cause_come_first_and_then_the_worst_three(
    run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run_here("explain", sample, *SETTING)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    counts = {
        name.strip(): int(count.replace(",", ""))
        for name, count in re.findall(r"^ (\s*[a-zA-Z][^\d\n]*?) +([\d,]+) +[\d.]+%", out, flags=re.MULTILINE)
    }
    lost = counts["KV evicted"] + counts["alignment to the interval"] + counts["no snapshot"]
    assert counts["lost of the KV ceiling"] == lost > 0
    parts = ("skipped (usable hit)", "never seen before", "last block of each prompt")
    assert sum(counts[part] for part in parts) + lost == counts["all"] == 13_732_944
    assert "KV evicted: an earlier prompt began with them" in one_line(out)
    assert "no room" not in out
    assert len(re.findall(r"^Request [\d,]+ \(of 0 to 999\)", out, flags=re.MULTILINE)) == 3


def test_the_story_of_one_request_names_who_had_it_when_it_went_and_what_would_keep_it(
    run_here: RunHere, sample: str
) -> None:
    code, out, err = run_here("explain", sample, *SETTING, "--request", 610)
    assert (code, err) == (0, "")
    said = one_line(out)
    assert said.startswith("Request 610 (of 0 to 999), 3.4 min after the first 121,924 prompt tokens: 0 skipped")
    assert "Its first 120,832 tokens are those of request 394, 216 requests before it, 1.1 min earlier" in said
    assert "last used as a whole by request 394, was evicted during requests 567 to 574: the memory for KV" in said
    memory = re.findall(r"With GPU memory of ([\d.]+) GiB or more, now 320 GiB, it would have skipped 120,832", said)
    kept = run_here("replay", sample, *MODEL, "--ssm-reuse-interval", 1024, "--gpu-memory", f"{memory[0]}GiB", "--json")
    less = run_here("replay", sample, *MODEL, "--ssm-reuse-interval", 1024, "--gpu-memory", "320GiB", "--json")
    assert json.loads(kept[1])["usable_hit_tokens"] >= json.loads(less[1])["usable_hit_tokens"] + 120_832
    assert "lost of the KV ceiling" not in out


def test_as_many_of_the_worst_as_asked_for(run_here: RunHere, sample: str) -> None:
    code, out, _ = run_here("explain", sample, *SETTING, "--worst", 7)
    lost = [int(count.replace(",", "")) for count in re.findall(r"skipped, ([\d,]+) lost", one_line(out))]
    assert (code, len(lost)) == (0, 7)
    assert lost == sorted(lost, reverse=True)


def test_all_requests_of_a_session_in_order(run_here: RunHere, tmp_path: Path) -> None:
    trace = tmp_path / "chat.jsonl"
    assert run_here("trace", "generate", "chat", trace, "--num-sessions", 3)[0] == 0
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    name = rows[0]["session_id"]
    expected = [index for index, row in enumerate(rows) if row["session_id"] == name]
    code, out, err = run_here("explain", trace, *MODEL, "--session", name)
    assert (code, err) == (0, "")
    assert [int(number) for number in re.findall(r"Request (\d+) \(of 0", out)] == expected
    code, out, err = run_here("explain", trace, *MODEL, "--session", "nobody")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: session: expected one of 3 such as .*, got 'nobody'\n", err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--request", 1000), "request: expected 0 to 999, got 1000"),
        (("--request", 1, "--worst", 2), "explain: expected one of --request, --worst and --session, got several"),
        (("--session", "a"), "session: expected a trace that names sessions, got .*, which names none"),
        (("--gpu-memory", "1MiB"), "memory too small for every request: expected at least .*"),
    ],
)
def test_a_wrong_option_is_one_line(run_here: RunHere, sample: str, options: tuple[object, ...], message: str) -> None:
    code, out, err = run_here("explain", sample, *MODEL, *options)
    assert (code, out) == (1, "")
    assert re.fullmatch(f"error: {message}\n", err)


def test_a_broken_trace_is_one_line_with_file_and_line(run_here: RunHere, bad_trace: Path) -> None:
    code, out, err = run_here("explain", bad_trace, *MODEL)
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: .*bad\.jsonl:2: .*\n", err)


def test_where_nothing_was_lost_it_says_so(run_here: RunHere, sample: str) -> None:
    code, out, _ = run_here("explain", sample, "--model", "llama-3.1-8b", "--gpu-memory", "unlimited")
    assert code == 0
    assert out.endswith("No request lost anything that it shared with an earlier one.\n")


def test_an_interrupted_explanation_ends_with_130_and_one_line(
    run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(explain_module, "explain", interrupted)
    code, out, err = run_here("explain", sample, *MODEL)
    assert (code, out, err) == (130, "", "interrupted: nothing was written\n")
