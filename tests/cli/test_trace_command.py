import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
RunHere = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "nemotron-h-8b")


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Three conversations of two turns, 100 s each, that start by a rule."""
    path = tmp_path / "talks.jsonl"
    calls = [{"t": t, "in": 1000 + 64 * n, "out": 9, "hash_ids": list(range(15 + n))} for t, n in ((0, 0), (100, 5))]
    row = {"block_size": 64, "hash_id_scope": "local", "requests": calls}
    path.write_text("".join(json.dumps({"id": f"talk{index}", **row}) + "\n" for index in range(3)))
    return path


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.5,374,44\r\n")
    return path


def test_info_shows_lengths_arrivals_and_ceilings_at_80_columns(
    run_here: RunHere, sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run_here("trace", "info", sample)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for words in ("(mooncake)", "13,732,944", "not recorded", "median", "hit depth", "attention alone", "8,192 tokens"):
        assert words in out
    assert "…" not in out


def test_info_as_json_is_one_object(run_here: RunHere, sample: str) -> None:
    options = ("--json", "--ssm-reuse-interval", "512,700,2048", "--tokens-per-block", 1024)
    code, out, _ = run_here("trace", "info", sample, *options)
    info: dict[str, Any] = json.loads(out)
    assert code == 0
    assert (info["requests"], info["sessions"], info["broken_rows"], info["repairs"]) == (1000, None, 0, {})
    assert [ceiling["ssm_reuse_interval"] for ceiling in info["shared"]["ceilings"]] == [None, 2048]
    assert info["shared"]["tokens_per_block"] == 1024
    assert len(info["percents"]) == len(info["prompt_length"]["at_percents"])


def test_the_ceilings_of_info_are_those_of_a_replay(run_here: RunHere, sample: str) -> None:
    _, out, _ = run_here("trace", "info", sample, "--json")
    ceilings = {c["ssm_reuse_interval"]: c["hit_tokens"] for c in json.loads(out)["shared"]["ceilings"]}
    _, out, _ = run_here("replay", sample, *MODEL, "--ssm-reuse-interval", 2048, "--json")
    totals = json.loads(out)
    assert (ceilings[None], ceilings[2048]) == (totals["kv_ceiling_hit_tokens"], totals["ceiling_hit_tokens"])


def test_info_draws_a_picture_of_any_trace(run_here: RunHere, talks: Path, lengths: Path, tmp_path: Path) -> None:
    pictures = []
    for name, trace in (("a.png", talks), ("b.png", talks), ("c.png", lengths)):
        assert run_here("trace", "info", trace, "--plot", tmp_path / name)[0] == 0
        pictures.append((tmp_path / name).read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] == pictures[1]
    code, _, err = run_here("trace", "info", talks, "--plot", tmp_path / "a.gif")
    assert (code, err) == (1, "error: --plot: expected the name of a .png file, got 'a.gif'\n")


def test_lengths_have_an_info_and_no_hit_rates(run_here: RunHere, lengths: Path, tmp_path: Path) -> None:
    code, out, _ = run_here("trace", "info", lengths)
    assert code == 0
    assert "Lengths only" in out
    for command in (
        ("replay", lengths, *MODEL),
        ("sweep", lengths, *MODEL, "--out", tmp_path / "out"),
        ("trace", "convert", lengths, tmp_path / "a.npz"),
        ("trace", "info", lengths, "--tokens-per-block", 64),
    ):
        code, out, err = run_here(*command)
        assert (code, out) == (1, "")
        assert err.startswith("error: lengths.csv: hit rates: expected a trace that tells what prompts share")
        assert err.count("\n") == 1


def test_options_of_reading_reach_every_command(run_here: RunHere, talks: Path, tmp_path: Path) -> None:
    rule = ("--session-start", "spacing:60")
    _, out, _ = run_here("trace", "info", talks, *rule, "--json")
    info = json.loads(out)
    assert (info["span_seconds"], info["sessions"], info["reading"]) == (220, 3, "session start spacing:60")
    _, out, _ = run_here("replay", talks, *MODEL, *rule, "--json")
    assert json.loads(out)["manifest"]["trace"]["reading"] == "session start spacing:60"
    sweep = ("sweep", talks, *MODEL, "--ssm-reuse-interval", 64, "--gpu-memory", "unlimited", "--engine", "replay")
    for starts, finished in ((rule, 0), (rule, 1), ((), 0)):  # another rule is another trace
        code, out, err = run_here(*sweep, *starts, "--out", tmp_path / "sweep", "--jobs", 2)
        assert (code, err) == (0, "")
        assert f"{finished} finished before" in out


@pytest.fixture
def chats(run_here: RunHere, tmp_path: Path) -> Path:
    """Generated chats of several turns, whose next prompts hold the answers."""
    path = tmp_path / "chats.jsonl"
    assert run_here("trace", "generate", "chat", path, "--num-sessions", 30)[0] == 0
    return path


def test_outputs_reach_every_command_that_reads_a_trace(run_here: RunHere, chats: Path, tmp_path: Path) -> None:
    interval = ("--ssm-reuse-interval", 256)
    info = json.loads(run_here("trace", "info", chats, "--outputs", "--json", *interval)[1])
    assert info["reading"] == "outputs"
    without, with_outputs = info["shared"]["ceilings"], info["shared"]["outputs"]["ceilings"]
    assert without[1]["hit_tokens"] < with_outputs[1]["hit_tokens"]
    packed = tmp_path / "chats.npz"
    assert run_here("trace", "convert", chats, packed, "--outputs")[0] == 0
    for trace in (chats, packed):
        for flags, ceilings in (((), without), (("--outputs",), with_outputs)):
            code, out, _ = run_here("replay", trace, *MODEL, *interval, "--gpu-memory", "unlimited", "--json", *flags)
            totals = json.loads(out)
            found = totals["kv_ceiling_hit_tokens"], totals["ceiling_hit_tokens"], totals["usable_hit_tokens"]
            assert (code, *found) == (0, *(ceiling["hit_tokens"] for ceiling in ceilings), ceilings[1]["hit_tokens"])
            told = totals["manifest"]["trace"]
            assert told["reading"] == "".join(flag.strip("-") for flag in flags)
            assert told["name"] == ("chats.jsonl (prompts and outputs)" if flags else "chats.jsonl")
    sweep = ("sweep", chats, *MODEL, *interval, "--gpu-memory", "unlimited", "--engine", "replay")
    for flags, finished in ((("--outputs",), 0), (("--outputs",), 1), ((), 0)):  # prompts only are another trace
        code, out, err = run_here(*sweep, *flags, "--out", tmp_path / "sweep", "--jobs", 2)
        assert (code, err) == (0, "")
        assert f"{finished} finished before" in out
        assert ("(prompts and outputs)" in out) == bool(flags)
    answers = [
        json.loads(run_here("recommend", chats, *MODEL, "--gpu-memory", "20GiB", "--json", *flags)[1])["ceiling"]
        for flags in ((), ("--outputs",))
    ]
    assert [answer["kv_ceiling_hit_tokens"] for answer in answers] == [
        without[0]["hit_tokens"],
        with_outputs[0]["hit_tokens"],
    ]


def test_a_recommendation_with_outputs_is_replayed_with_outputs(run_here: RunHere, chats: Path) -> None:
    code, out, _ = run_here("recommend", chats, *MODEL, "--gpu-memory", "20GiB", "--outputs")
    assert code == 0
    assert " --outputs" in out[out.index("ssmcache replay") :]


def test_info_shows_hits_with_and_without_outputs(
    run_here: RunHere, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run_here("trace", "info", chats, "--outputs", "--plot", tmp_path / "chats.png")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for words in ("prompts only", "with outputs", "% of all output tokens", "read with"):
        assert words in out
    run_here("trace", "info", chats, "--plot", tmp_path / "prompts.png")
    assert (tmp_path / "chats.png").read_bytes() != (tmp_path / "prompts.png").read_bytes()


def test_outputs_of_a_trace_of_lengths_are_refused_in_one_line(run_here: RunHere, lengths: Path) -> None:
    for command in (("trace", "info", lengths), ("replay", lengths, *MODEL)):
        code, out, err = run_here(*command, "--outputs")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("error: --outputs: expected a trace of the format ")


@pytest.mark.parametrize(("admission", "short"), [("every", "20GiB"), ("last", "8GiB")])
def test_without_sessions_a_replay_says_what_decoding_costs(
    run_here: RunHere, sample: str, admission: str, short: str
) -> None:
    def totals(memory: str, *flags: str) -> dict[str, Any]:
        shape = ("--ssm-reuse-interval", 512, "--admission", admission, "--gpu-memory", memory)
        code, out, err = run_here("replay", sample, *MODEL, *shape, "--json", *flags)
        assert (code, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    told = totals("unlimited", "--outputs")["manifest"]["trace"]
    assert told["reading"] == "outputs (none known)"
    assert told["name"] == "mooncake_conversation_1000.jsonl.gz (prompts and outputs, none of them known)"
    # nobody looks up what was decoded; it only takes memory
    hits = [
        [totals(memory, *flags)["usable_hit_tokens"] for flags in ((), ("--outputs",))]
        for memory in ("unlimited", short)
    ]
    assert hits[0][0] == hits[0][1]
    assert hits[1][0] > hits[1][1] > 0


def test_broken_rows_are_counted_on_stderr(run_here: RunHere, bad_trace: Path) -> None:
    code, out, err = run_here("replay", bad_trace, *MODEL, "--skip-broken", "--json")
    assert (code, err) == (0, "bad.jsonl: 1 broken rows, left out\n")
    assert json.loads(out)["manifest"]["trace"]["broken_rows"] == 1


def test_a_converted_trace_replays_to_the_same_figures(run_here: RunHere, sample: str, tmp_path: Path) -> None:
    code, out, _ = run_here("trace", "convert", sample, tmp_path / "a.npz")
    assert (code, out) == (0, f"{tmp_path}/a.npz: 1,000 requests, blocks of 512 tokens\n")
    results = []
    for trace in (sample, tmp_path / "a.npz"):
        result = json.loads(run_here("replay", trace, *MODEL, "--json")[1])
        del result["manifest"]["run"]
        results.append(result)
    assert results[0] == results[1]
    code, _, err = run_here("trace", "convert", sample, tmp_path / "a.zip")
    assert (code, err) == (1, "error: converted trace: expected a name that ends in .npz, got 'a.zip'\n")


def test_generated_traces_are_read_back(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    knobs = ("--num-sessions", 20, "--session-turns-mean", 3, "--branches", 2, "--tokens-per-block", 32, "--seed", 5)
    code, out, _ = run_here("trace", "generate", "chat", path, *knobs)
    assert code == 0
    _, shown, _ = run_here("trace", "info", path, "--json")
    info = json.loads(shown)
    assert out == f"{path}: {info['requests']} requests of 20 sessions\n"
    assert (info["sessions"], info["shared"]["tokens_per_block"]) == (20, 32)
    assert run_here("trace", "generate", "chat", tmp_path / "again.jsonl", *knobs)[0] == 0
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "poem", "a.jsonl"), "kind of trace: expected one of shared-prefix, chat, agent, branching, got"),
        (("generate", "chat", "a.jsonl", "--branches", 0), "branches: expected a number from 1 on, got 0"),
        (("info", "none.jsonl"), "none.jsonl: cannot read the trace: No such file or directory"),
        (("info", "none.jsonl", "--session-start", "now"), "session start: expected all, spacing:SECONDS, "),
        (("info", "none.jsonl", "--format", "poem"), "format: expected one of azure-csv, dynamo-request-trace, "),
    ],
)
def test_a_wrong_argument_is_one_line(run_here: RunHere, arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run_here("trace", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["generate", "--help"]])
def test_help_is_there(ssmcache: Run, arguments: list[str]) -> None:
    result = ssmcache("trace", *arguments)
    assert (result.returncode, result.stderr) == (0, "")


def token_rows(path: Path, *prompts: int, session: str = "s") -> Path:
    """A trace of prompts of so many tokens, a second apart."""
    rows = [
        {
            "arrival_time_ns": time * 10**9,
            "input_toks": n,
            "output_toks": 0,
            "input_tok_ids": [7] * n,
            "session_id": session,
        }
        for time, n in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_guessed_block_is_named_and_warned_of_by_every_command(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 5000, "output_length": 1, "hash_ids": [0, 1]}))
    warning = (
        "warning: one.jsonl: blocks of 4,096 tokens are inferred from a single row, where 512 are usual: "
        "--trace-block (tokens_per_block) says what one id stands for\n"
    )
    code, out, err = run_here("trace", "info", path)
    assert (code, err) == (0, warning)
    assert "4,096 tokens, inferred from a single row" in out
    code, out, err = run_here("trace", "info", path, "--json")
    assert (code, err) == (0, warning)
    assert json.loads(out)["block_origin"] == "4,096 tokens, inferred from a single row"
    for command in (("replay", path, *MODEL, "--json"), ("trace", "convert", path, tmp_path / "a.npz")):
        code, _, err = run_here(*command)
        assert (code, err) == (0, warning)
    assert run_here("trace", "info", tmp_path / "a.npz")[2] == warning
    code, out, err = run_here("trace", "info", path, "--trace-block", 2048)
    assert (code, err) == (0, "")
    assert "inferred" not in out


def test_commands_say_that_empty_prompts_have_no_hit_rate(run_here: RunHere, tmp_path: Path) -> None:
    path = token_rows(tmp_path / "empty.jsonl", 0, 0, 0)
    code, out, _ = run_here("trace", "info", path, "--json", "--plot", tmp_path / "a.png")
    assert (code, json.loads(out, parse_constant=no_constant)["prompt_tokens"]) == (0, 0)
    for command in (
        ("replay", path, *MODEL, "--json"),
        ("verify", path, *MODEL),
        ("explain", path, *MODEL),
        ("recommend", path, *MODEL, "--gpu-memory", "20GiB"),
        ("sweep", path, *MODEL, "--out", tmp_path / "out"),
    ):
        code, out, err = run_here(*command)
        expected = "error: empty.jsonl: hit rates: expected a prompt with tokens, got 3 empty prompts and no other\n"
        assert (code, out, err) == (1, "", expected)
    assert not (tmp_path / "out").exists()


def test_a_recommendation_of_a_trace_that_begins_with_empty_prompts_is_whole(run_here: RunHere, tmp_path: Path) -> None:
    path = token_rows(tmp_path / "half.jsonl", *[0] * 20, *[600] * 20)
    code, out, _ = run_here("recommend", path, *MODEL, "--gpu-memory", "20GiB", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=no_constant)["prompt_tokens"] == 12_000


def test_a_session_of_a_lone_surrogate_is_converted_and_shown(run_here: RunHere, tmp_path: Path) -> None:
    path = token_rows(tmp_path / "lone.jsonl", 40, 40, session="\ud800")
    assert run_here("trace", "convert", path, tmp_path / "a.npz")[0] == 0
    for trace in (path, tmp_path / "a.npz"):
        code, out, err = run_here("explain", trace, *MODEL, "--session", "\\ud800")
        assert (code, err) == (0, "")
        assert "\\ud800" in out


def test_what_the_terminal_cannot_show_is_written_out(ssmcache: Run, tmp_path: Path) -> None:
    path = token_rows(tmp_path / "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n \N{SNOWMAN}.jsonl", 40)
    result = ssmcache("trace", "info", path, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (result.returncode, result.stderr) == (0, "")
    assert "gr\\xfcn \\u2603.jsonl" in result.stdout


@pytest.mark.parametrize("seconds", [1e308, 1e300, float("inf"), float("nan")])
def test_times_that_no_clock_counts_to_are_one_line(run_here: RunHere, tmp_path: Path, seconds: float) -> None:
    row = {"chat_id": 1, "parent_chat_id": -1, "input_length": 16, "output_length": 1, "hash_ids": [1]}
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps({**row, "timestamp": time}) + "\n" for time in (0, seconds)))
    for options in (("--json",), ("--plot", tmp_path / "a.png")):
        code, out, err = run_here("trace", "info", path, *options)
        assert (code, out) == (1, "")
        assert err.startswith("error: late.jsonl:2: timestamp: expected seconds")
        assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_the_latest_times_there_may_be_are_shown_and_drawn(run_here: RunHere, tmp_path: Path) -> None:
    row = {"input_length": 600, "output_length": 1 << 30, "hash_ids": [1, 2]}
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps({**row, "timestamp": time}) + "\n" for time in (0, 5, (1 << 53) - 1)))
    code, out, _ = run_here("trace", "info", path, "--json", "--plot", tmp_path / "a.png")
    assert code == 0
    assert json.loads(out, parse_constant=no_constant)["span_seconds"] == ((1 << 53) - 1) / 1000
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run_here("trace", "info", path)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens-per-block", 512 << 30), "settings: expected blocks of up to 1,048,576 and intervals of up to"),
        (("--ssm-reuse-interval", 512 << 30), "settings: expected blocks of up to 1,048,576 and intervals of up to"),
        (("--trace-block", 1 << 40), "trace block: expected a positive integer up to 1,048,576, got 1099511627776"),
    ],
)
def test_a_size_that_nothing_has_is_one_line(
    run_here: RunHere, sample: str, options: tuple[object, ...], message: str
) -> None:
    code, out, err = run_here("replay", sample, *MODEL, *options, "--gpu-memory", "unlimited")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
