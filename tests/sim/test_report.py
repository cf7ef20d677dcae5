"""The page of a result directory: what it says, that nothing in it is foreign, and how it runs in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ssmcache.models import load_model
from ssmcache_sim.errors import OutputError
from ssmcache_sim.formats import read_trace
from ssmcache_sim.phase import phase_ceilings
from ssmcache_sim.phase_cells import phase_cells
from ssmcache_sim.replay import replay
from ssmcache_sim.report import report_page, write_report
from ssmcache_sim.results import RunTimes, replay_directory, replay_manifest, write_replay
from ssmcache_sim.settings import build_config, make_settings
from ssmcache_sim.sizes import format_size
from ssmcache_sim.sweep import Engine, SweepSpec, plan_sweep, run_sweep
from ssmcache_sim.sweep_details import SweepPhases, write_details
from ssmcache_sim.sweep_results import begin_sweep, finish_sweep, load_sweep

GIB = 1 << 30
SIZES = (5 * GIB, 50 * GIB, 200 * GIB, None)  # the least holds no largest request: its cells are replayed
TIMES = RunTimes("now", 1.0)
HOSTILE_TRACE = (
    '</title></script><script>document.title="owned"</script><img src=x onerror="alert(1)">$\\frac{$&amp;\'"'
)
HOSTILE_MODEL = '</script><!--<script><b onclick="alert(2)">m'


def make_sweep(sample_path: Path, path: Path, *, hostile: bool = False, engine: Engine = "auto") -> Path:
    trace, spec = read_trace(sample_path), load_model("nemotron-h-8b")
    if hostile:
        trace, spec = replace(trace, name=HOSTILE_TRACE), replace(spec, name=HOSTILE_MODEL)
    sweep = SweepSpec((512, 1024), (1024, 4096), SIZES, engine=engine)
    plan = plan_sweep(sweep, trace, spec, path)
    manifest = begin_sweep(path, sweep, trace, spec)
    cells = run_sweep(trace, plan, 1, lambda done: None)
    ceilings = tuple(phase_ceilings(trace, period) for period in (1024, 4096))
    phases = SweepPhases(phase_cells(trace, plan.cells, lambda done: None), ceilings) if engine == "auto" else None
    write_details(path, sweep, trace, spec, list(zip(plan.cells, cells, strict=True)), phases)
    finish_sweep(path, manifest, cells, plan.skipped, TIMES)
    return path


@pytest.fixture(scope="module")
def sweep_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(sample_path, tmp_path_factory.mktemp("report") / "sweep")


@pytest.fixture(scope="module")
def hostile_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(sample_path, tmp_path_factory.mktemp("report") / "hostile", hostile=True)


@pytest.fixture(scope="module")
def replay_path(sample_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trace, spec = replace(read_trace(sample_path), name=HOSTILE_TRACE), load_model("nemotron-h-8b")
    setting = make_settings(spec, 512, ssm_reuse_interval=4096, gpu_memory_bytes=320 * GIB)
    path = tmp_path_factory.mktemp("report") / "replay"
    with replay_directory(path) as folder:
        write_replay(folder, replay(trace, build_config(spec, setting)), replay_manifest(trace, setting), TIMES)
    return path


@cache
def page_of(path: Path) -> str:
    return report_page(path)


def address_of(path: Path) -> str:
    page = path / "page.html"
    page.write_text(page_of(path))
    return page.as_uri()


class Elements(HTMLParser):
    """All elements with their attributes, the text of the page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_a_replay_says_its_numbers(replay_path: Path) -> None:
    text = " ".join(Elements(page_of(replay_path)).text.split())
    for words in ("usable token hit rate12.23%", "1,679,360", "21.55%", "lost: KV evicted", "snapshots"):
        assert words in text


def test_a_sweep_says_its_best_cells_and_skipped_combinations(sweep_path: Path) -> None:
    text = " ".join(Elements(page_of(sweep_path)).text.split())
    cells = load_sweep(sweep_path).cells
    assert f"best usable token hit rate{cells['usable_token_hit_rate'].max():.2%}" in text
    assert f"All {len(cells)} cells" in text
    assert "Phase" in text


def test_the_explorer_holds_the_cells_of_all_models_or_else_those_of_the_sweep(
    sweep_path: Path, sample_path: Path, tmp_path: Path
) -> None:
    replayed = make_sweep(sample_path, tmp_path / "replayed", engine="replay")
    for path, num_models in ((sweep_path, 19), (replayed, 1)):
        run = load_sweep(path)
        assert "replay" in set(run.cells["engine"])
        explored = json.loads(Elements(page_of(path)).scripts[0])
        rows = [dict(zip(explored["columns"], row, strict=True)) for row in explored["rows"]]
        assert len({row["model"] for row in rows}) == num_models
        found = {
            (row["block"], row["interval"], row["memory"]): row["usable"]
            for row in rows
            if row["model"] == "nemotron-h-8b"
        }
        columns = ["tokens_per_block", "ssm_reuse_interval", "gpu_memory_bytes", "usable_hit_tokens"]
        for block, interval, memory, usable in run.cells[columns].astype(object).itertuples(index=False):
            assert found[block, interval, memory if isinstance(memory, int) else None] == usable


@pytest.mark.parametrize("kind", ["replay_path", "hostile_path"])
def test_names_from_files_are_text_and_nothing_else(kind: str, request: pytest.FixtureRequest) -> None:
    page = Elements(page_of(request.getfixturevalue(kind)))
    assert HOSTILE_TRACE in page.text
    assert [attributes.get("type") for tag, attributes in page.elements if tag == "script"] in (
        [None],
        ["application/json", None],
    )
    for tag, attributes in page.elements:
        assert tag not in ("b", "iframe", "object") or attributes == {}
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or str(attributes["src"]).startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize("kind", ["replay_path", "sweep_path"])
def test_the_page_needs_no_other_file_and_no_network(kind: str, request: pytest.FixtureRequest) -> None:
    page = page_of(request.getfixturevalue(kind))
    for _, attributes in Elements(page).elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert name not in attributes or re.match(r"data:|#g-[a-z-]+$", str(attributes[name]))
    assert "@import" not in page
    assert "url(" not in page
    assert 'content="default-src &#x27;none&#x27;' in page or "content=\"default-src 'none'" in page


def test_every_control_is_labelled_every_picture_described_and_every_term_defined(sweep_path: Path) -> None:
    elements = Elements(page_of(sweep_path)).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for tag, attributes in elements if tag == "label"}
    assert {attributes["id"] for tag, attributes in elements if tag in ("select", "input")} == labelled
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert {str(attributes["href"])[1:] for tag, attributes in elements if tag == "a"} <= set(ids)
    assert all(attributes.get("aria-label") for _, attributes in elements if attributes.get("tabindex"))


def test_the_same_results_give_the_same_page_and_the_file_goes_where_asked(
    sweep_path: Path, replay_path: Path, tmp_path: Path
) -> None:
    for path in (sweep_path, replay_path):
        written = write_report(path)
        assert written == path / "report.html"
        assert written.read_text() == report_page(path)
        assert write_report(path, tmp_path / "elsewhere.html").read_bytes() == written.read_bytes()


def test_what_is_no_result_or_cannot_be_written_is_an_error_of_the_user(sweep_path: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected a result directory of ssmcache"):
        write_report(tmp_path)
    for output in (tmp_path / "none" / "page.html", tmp_path):
        with pytest.raises(OutputError, match="cannot write here"):
            write_report(sweep_path, output)
    assert list(tmp_path.iterdir()) == []


@dataclass
class Browser:
    """Headless Chromium, cut off from the network: what it would fetch, also for itself, goes to a port of nobody."""

    program: str
    folder: Path

    def run(self, url: str, *options: str) -> tuple[str, list[str]]:
        """Standard output, and the lines of the console."""
        command = [self.program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--no-first-run", "--enable-logging=stderr", "--lang=en-US", "--proxy-server=http://127.0.0.1:9"]
        command += [f"--user-data-dir={self.folder}", "--virtual-time-budget=3000", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    def dom(self, url: str) -> str:
        """The page after its scripts ran. Its console must be silent: it tells errors, and whatever the page's own
        policy kept it from fetching.
        """
        page, console = self.run(url, "--dump-dom")
        assert console == []
        return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium")
    return Browser(program, tmp_path_factory.mktemp("browser"))


def said(dom: str) -> str:
    found = re.search(r'<p id="said"[^>]*>(.*?)</p>', dom, re.DOTALL)
    assert found is not None
    return unescape(found[1])


def expected(path: Path, block: int, interval: int, memory: int | None) -> str:
    cells = load_sweep(path).cells
    sizes = cells["gpu_memory_bytes"].isna() if memory is None else cells["gpu_memory_bytes"] == memory
    cell = cells[(cells["tokens_per_block"] == block) & (cells["ssm_reuse_interval"] == interval) & sizes].iloc[0]
    rates = [f"{cell[name]:.2%}" for name in ("usable_token_hit_rate", "ceiling_token_hit_rate")]
    return (
        f"block {block}, interval {interval}, {format_size(memory)}: usable token hit rate {rates[0]} of a ceiling of "
        f"{rates[1]}."
    )


def test_a_choice_in_the_address_changes_numbers_and_curve(browser: Browser, sweep_path: Path) -> None:
    url = address_of(sweep_path)
    curves = set()
    for block, interval, memory in ((512, 1024, 50 * GIB), (512, 4096, 200 * GIB), (1024, 1024, None)):
        dom = browser.dom(f"{url}#model=nemotron-h-8b&block={block}&interval={interval}&memory={memory or 'unlimited'}")
        assert expected(sweep_path, block, interval, memory) in said(dom)
        curves.add(re.findall(r'<polyline points="([^"]*)"[^>]*stroke-width="3"', dom)[0])
        assert f'aria-valuetext="{format_size(memory)}"' in dom
    assert len(curves) == 3


def test_another_model_takes_its_own_cells_and_what_it_has_not_falls_back(browser: Browser, sweep_path: Path) -> None:
    url = address_of(sweep_path)
    explored = load_sweep(sweep_path).details.explorer
    assert explored is not None
    cells = explored[(explored["model"] == "llama-3.1-8b") & (explored["tokens_per_block"] == 512)]
    cell = cells[cells["gpu_memory_bytes"] == 200 * GIB].iloc[0]
    dom = browser.dom(f"{url}#model=llama-3.1-8b&block=512&interval=4096&memory={200 * GIB + 1}")
    rate = f"{cell['usable_hit_tokens'] / cell['prompt_tokens']:.2%}"
    assert f"llama-3.1-8b, block 512, no SSM layers, 200 GiB: usable token hit rate {rate}" in said(dom)
    first = said(browser.dom(url))
    assert said(browser.dom(f"{url}#model=none-such")) == first
    assert said(browser.dom(f"{url}#g-usable")) == first


def test_hostile_names_stay_names_in_the_browser(browser: Browser, hostile_path: Path) -> None:
    dom = browser.dom(address_of(hostile_path))
    assert HOSTILE_MODEL in said(dom)
    found = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert found is not None
    assert unescape(found[1]) == f"{HOSTILE_TRACE}, {HOSTILE_MODEL}"


def test_a_replay_runs_clean(browser: Browser, replay_path: Path) -> None:
    assert "Where the prompt tokens went" in browser.dom(address_of(replay_path))


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_window(browser: Browser, sweep_path: Path, tmp_path: Path, width: int) -> None:
    """Headless windows have a least width: a frame has none."""
    measure = "const root = document.documentElement; parent.postMessage(root.scrollWidth - root.clientWidth, '*')"
    probe = f"<script>{measure}</script></body>"
    (tmp_path / "page.html").write_text(page_of(sweep_path).replace("</body>", probe))
    frame = f'<p>?</p><iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>'
    tell = "<script>onmessage = (event) => { document.querySelector('p').textContent = event.data }</script>"
    (tmp_path / "frame.html").write_text(tell + frame)
    assert "<p>0</p>" in browser.dom((tmp_path / "frame.html").as_uri())


@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_a_screenshot_shows_a_page_with_its_curve(
    browser: Browser, sweep_path: Path, tmp_path: Path, scheme: str
) -> None:
    import matplotlib.image
    import numpy as np

    path = tmp_path / "shot.png"
    options = (f"--screenshot={path}", "--window-size=1200,900", f"--blink-settings=preferredColorScheme={scheme}")
    url = address_of(sweep_path)
    browser.run(f"{url}#interval=1024", "--force-color-profile=srgb", "--hide-scrollbars", *options)
    shot = (255 * np.asarray(matplotlib.image.imread(path))[..., :3]).round().astype(int)
    assert shot.shape[:2] == (900, 1200)
    page, curve = ((18, 22, 29), (185, 154, 255)) if scheme == "0" else ((246, 247, 249), (106, 61, 154))
    assert tuple(shot[5, 5]) == page
    assert (shot == curve).all(axis=-1).sum() > 500  # of the thick curve of the first interval


@pytest.mark.parametrize(
    ("foreign", "complaint"),
    [
        ("<script>nonsense()</script>", "nonsense is not defined"),
        ('<img src="http://foreign.invalid/a.png">', "foreign.invalid"),
        ("<script>fetch('http://foreign.invalid/b')</script>", "foreign.invalid"),
        ('<link rel="stylesheet" href="http://foreign.invalid/c.css">', "foreign.invalid"),
    ],
)
def test_the_console_would_tell_of_errors_and_of_the_network(
    browser: Browser, replay_path: Path, tmp_path: Path, foreign: str, complaint: str
) -> None:
    page = tmp_path / "bad.html"
    page.write_text(page_of(replay_path).replace("</body>", foreign + "</body>"))
    _, console = browser.run(page.as_uri(), "--dump-dom")
    assert any(complaint in line for line in console)
