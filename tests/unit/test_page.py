"""The page that `fusewire explain --html` writes, in a browser too, if there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from fusewire.custom_ops.dispatch.served import ServedCalls
from fusewire.fusion_passes.report import model as reports
from fusewire.fusion_passes.report.store import Report
from fusewire.rendering.page import page

from support.pages import Reader, merged, mixed, recorded

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def plain(x, r, w):
    return x + r


@pytest.fixture
def sample():
    """A report of two graphs with all-reduces, fused and not, and one without."""
    found = Report(tuple(map(recorded, (mixed, merged, plain))))
    assert (found.found, found.fused) == (5, 3)
    return found


def test_page_is_self_contained_and_complete(sample):
    text = page(sample, "serve.py --x", [("rank", "0 of 2")], ["a word first"], {"broken by print": 2})
    reader = Reader(text)
    assert reader.loads == []
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttp", text)
    assert sorted(filter(None, reader.rows)) == ["fused"] * 3 + ["refused"] * 2
    assert "<b>3</b> of <b>5</b> all-reduces fused" in text
    for said in ("in 3 graphs; the passes took", "serve.py --x", "0 of 2", "a word first", "2 &times; broken by print"):
        assert said in text
    for entry in sample.entries:
        assert entry.location.replace("/", "/<wbr>") in text
    assert "Graphs without an all-reduce" in text


def test_page_escapes_what_it_is_given():
    bad = "</script><u>&'\""
    entry = reports.Entry(0, bad, "refused", "match", bad, bad, bad, bad, bad, bad, bad, bad, bad)
    found = Report((reports.GraphReport(0, "inference", (entry,), notes=(bad,)),))
    text = page(found, bad, [(bad, bad)], [bad], {bad: 1})
    Reader(text)
    assert "<u>" not in text
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(data) == json.loads(found.to_json())


def test_page_of_an_empty_report():
    text = page(Report(), "nothing.py", notices=["why"])
    Reader(text)
    assert "<b>0</b> of <b>0</b> all-reduces fused" in text


def test_page_of_what_is_not_read_and_who_served():
    unread = reports.Unread("_C.shm_allreduce", 7, "vLLM's <own>")
    entry = reports.Entry(0, "all_reduce", "fused", fusion="all_reduce + rms_norm")
    graphs = (
        reports.GraphReport(0, "inference", (entry,), uses=28, unread=(unread,)),
        reports.GraphReport(1, "inference", unread=(unread,)),
    )
    calls = ServedCalls("all_reduce_rms_norm", "0", 64, "bfloat16", 4, "native", "", 3, 1)
    text = page(Report(graphs, (calls,), ("a <note>",)), "serve.py")
    Reader(text)
    assert "<b>28</b> of <b>28</b> all-reduces fused" in text
    assert ">All <span>1</span>" in text
    assert "1 all-reduces, 1 fused, run in 28 places of the model" in text
    why = (
        "calls _C.shm_allreduce 7 times, an operator of its own that fusewire does not rewrite: vLLM&#x27;s &lt;own&gt;"
    )
    assert text.count(why) == 2
    assert "<li>all_reduce_rms_norm, hidden 64, bfloat16, group 0: native 4 tokens (3 calls, 1 captured)</li>" in text
    assert "a &lt;note&gt;" in text


# --- In a browser ---------------------------------------------------------------------------------------------

# Runs after the page's own script: uses it as a person would, and leaves what it saw in an attribute.
HOOK = """<script>{
const seen = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility()).length;
const state = () => ({rows: seen('tbody tr'), cards: seen('.card'), graphs: seen('.graph'), empty: seen('.empty'),
  pressed: document.querySelector('[aria-pressed=true]').dataset.filter, hash: location.hash});
const states = {start: state()};
for (const name of ['fused', 'refused', 'all']) {
  document.querySelector(`[data-filter=${name}]`).click();
  states[name] = state();
}
const search = document.getElementById('search');
const type = (text) => { search.value = text; search.dispatchEvent(new Event('input')); return state(); };
states.found = type('RELU');
states.nothing = type('no such text');
states.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
states.colour = getComputedStyle(document.body).backgroundColor;
states.pictures = [...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().height > 40);
states.resources = performance.getEntriesByType('resource').map((entry) => entry.name);
document.documentElement.dataset.states = JSON.stringify(states);
}</script>"""
ERRORS = """<script>
window.errors = [];
addEventListener('error', (event) => { errors.push(String(event.message)); report(); }, true);
addEventListener('securitypolicyviolation', (event) => { errors.push(event.blockedURI); report(); });
function report() { document.documentElement.dataset.errors = JSON.stringify(errors); }
report();
</script>"""
# Whatever the page might load is blocked and told.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:\">"
)


def in_browser(tmp_path, text, fragment="", *options):
    """What the hook saw; fails if the page raised an error or asked for anything."""
    head, body = text.split("<head>", 1)
    file = tmp_path / "page.html"
    file.write_text(f"{head}<head>{POLICY}{ERRORS}{body.replace('</body>', HOOK + '</body>')}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1280,900"]
    done = subprocess.run(
        [CHROMIUM, *flags, *options, "--dump-dom", f"file://{file}{fragment}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []

    def attribute(name):
        found = re.search(f'<html[^>]* data-{name}="([^"]*)"', done.stdout)
        assert found, done.stdout[:500] + done.stderr[-2000:]
        return json.loads(found.group(1).replace("&quot;", '"').replace("&amp;", "&"))

    assert attribute("errors") == []
    states = attribute("states")
    assert states["resources"] == []
    return states


needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not os.environ.get("FUSEWIRE_BROWSER_TESTS"),
    reason="needs Chromium, and FUSEWIRE_BROWSER_TESTS=1: a browser does not start in every sandbox",
)


@needs_browser
def test_filters_and_search_work(sample, tmp_path):
    states = in_browser(tmp_path, page(sample, "serve.py"))
    assert states["start"] == states["all"] | {"hash": ""}
    assert (states["all"]["rows"], states["all"]["graphs"], states["all"]["pressed"]) == (5, 2, "all")
    assert (states["fused"]["rows"], states["fused"]["graphs"], states["fused"]["hash"]) == (3, 2, "#fused")
    assert (states["refused"]["rows"], states["refused"]["graphs"], states["refused"]["pressed"]) == (2, 1, "refused")
    assert states["fused"]["cards"] + states["refused"]["cards"] == states["all"]["cards"] >= 4
    assert (states["found"]["rows"], states["found"]["empty"]) == (1, 0)
    assert (states["nothing"]["rows"], states["nothing"]["graphs"], states["nothing"]["empty"]) == (0, 0, 1)
    assert states["pictures"]
    assert all(states["pictures"])


@needs_browser
def test_a_link_can_ask_for_the_refused(sample, tmp_path):
    states = in_browser(tmp_path, page(sample, "serve.py"), "#refused")
    assert (states["start"]["rows"], states["start"]["pressed"]) == (2, "refused")


@needs_browser
@pytest.mark.parametrize("width", [420, 1280])
def test_page_fits_its_window(sample, tmp_path, width):
    assert not in_browser(tmp_path, page(sample, "serve.py"), "", f"--window-size={width},900")["wide"]


@needs_browser
def test_page_has_a_light_and_a_dark_scheme(sample, tmp_path):
    def colour(scheme):
        setting = f"--blink-settings=preferredColorScheme={scheme}"
        return in_browser(tmp_path, page(sample, "serve.py"), "", setting)["colour"]

    light, dark = (sum(map(int, re.findall(r"\d+", colour(scheme)))) for scheme in (1, 0))
    assert dark < 200 < 600 < light
