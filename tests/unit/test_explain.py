"""`fusewire explain`: the command, the page that it writes (in a browser, if there is one), and the coverage table."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch

import fusewire
from fusewire import __main__ as cli
from fusewire.cli import explain
from fusewire.errors import ConfigError
from fusewire.fusion_passes.report import model as reports
from fusewire.fusion_passes.report.store import Report
from fusewire.rendering import pictures
from fusewire.rendering.drawing import Box, Drawing, draw
from fusewire.rendering.page import page
from fusewire.rendering.pictures import pictures_recorded

from support.blocks import NORMS, reduce_functional, tensors
from support.coverage import as_markdown, measure
from support.graphs import capture
from support.zoo import MODELS

TESTS = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# --- What the pictures show ---------------------------------------------------------------------------------


def fuses(x, r, w):
    return NORMS["L"](r + reduce_functional(x), w, 1e-5)


def gated(x, r, w):
    return NORMS["L"](r + reduce_functional(x) * torch.sigmoid(r), w, 1e-5)


def layer_norm(x, r, w):
    return torch.nn.functional.layer_norm(r + reduce_functional(x), (x.shape[-1],), w)


def two_layers(x, r, w):
    h = r + reduce_functional(x.relu())
    h = h + reduce_functional(NORMS["L"](h, w, 1e-5).relu())
    h = h + reduce_functional(NORMS["L"](h, w, 1e-5).relu())
    return NORMS["L"](h, w, 1e-5)


def merged(x, r, w):
    return NORMS["L"](r + (reduce_functional(x) + reduce_functional(x.sin())), w, 1e-5)


def mixed(x, r, w):
    return fuses(x, r, w), gated(x.cos(), r, w), torch.relu(reduce_functional(x.sin()))


@pytest.fixture
def recorded(fake_world):
    """capture(...) whose account has pictures."""

    def run(block, *inputs, **options):
        with pictures_recorded():
            return capture(block, *(inputs or tensors()), **options).account

    return run


def roles(drawing, role):
    return sorted(box.label for box in drawing.boxes if box.role == role)


def test_picture_of_a_fused_site(recorded):
    account = recorded(fuses)
    (picture,) = account.pictures
    before, after = picture.before, picture.after
    assert roles(before, "collective") == ["all-reduce"]
    assert {"residual", "weight"} <= set(roles(before, "input"))
    assert roles(before, "norm") == sorted(
        ["to float32", "square", "mean", "+ epsilon", "1 / √", "multiply", "to bfloat16", "multiply"]
    )
    assert roles(before, "obstacle") == []
    assert roles(after, "fused") == ["all-reduce + add + RMSNorm"]
    assert roles(after, "collective") == roles(after, "norm") == []
    assert roles(after, "input") == roles(before, "input")
    assert {text for _, _, text in after.edges} == {"", "norm"}


def test_edges_follow_the_computation(recorded):
    (picture,) = recorded(fuses).pictures
    named = {(picture.before.boxes[a].label, picture.before.boxes[b].label) for a, b, _ in picture.before.edges}
    assert {("all-reduce", "add"), ("residual", "add"), ("square", "mean"), ("mean", "+ epsilon")} <= named
    assert all(a < b for a, b, _ in picture.before.edges)


def test_picture_of_a_sandwich_shows_both_norms_as_one(recorded):
    def sandwich(x, r, w):
        h = r + NORMS["G"](reduce_functional(x), w, 1e-6)
        return h, NORMS["G"](h, w, 1e-6)

    (picture,) = recorded(sandwich).pictures
    assert roles(picture.after, "fused") == ["all-reduce + RMSNorm + add + RMSNorm"]
    assert {"residual", "weight"} <= set(roles(picture.after, "input"))
    assert {text for _, _, text in picture.after.edges} == {"", "norm", "sum"}


def test_pictures_of_sequence_parallelism():
    with pictures_recorded():
        measure("native_sequence")
    (graph,) = fusewire.report().graphs
    assert len(graph.pictures) >= 3
    text = page(fusewire.report(), "title")
    assert "left as it is" not in text
    for picture in graph.pictures:
        assert "reduce-scatter" in roles(picture.before, "collective")
        (label,) = roles(picture.after, "fused")
        assert label.startswith("reduce-scatter")
        assert label.endswith("all-gather")


def test_picture_of_a_refused_site_marks_the_obstacle(recorded):
    (picture,) = recorded(gated).pictures
    assert picture.after is None
    assert roles(picture.before, "obstacle") == ["multiply"]


def test_picture_of_a_layer_norm(recorded):
    (picture,) = recorded(layer_norm, *tensors(torch.float32)).pictures
    assert [label for label in roles(picture.before, "obstacle") if "LayerNorm" in label or "mean" in label]


def test_picture_of_merged_all_reduces_is_shared(recorded):
    account = recorded(merged)
    (picture,) = account.pictures
    assert [entry.picture for entry in account.entries] == [0, 0]
    assert roles(picture.before, "collective") == ["all-reduce", "another all-reduce"]
    assert roles(picture.after, "collective") == []
    assert "add" in roles(picture.after, "step")


def test_an_all_reduce_that_stays_is_in_both_pictures(recorded):
    def experts(x, r, w):
        shared = reduce_functional(x.sin()) * torch.sigmoid(r)
        return NORMS["L"](r + (reduce_functional(x) + shared), w, 1e-5)

    account = recorded(experts)
    fused = next(entry for entry in account.entries if entry.status == "fused")
    picture = account.pictures[fused.picture]
    assert roles(picture.before, "collective") == ["all-reduce", "another all-reduce"]
    assert roles(picture.after, "collective") == ["another all-reduce"]


def test_the_same_site_in_every_layer_is_one_picture(recorded):
    account = recorded(two_layers)
    assert account.entries[1].picture == account.entries[0].picture
    assert len(account.entries) == 3
    assert len(account.pictures) == 2  # the last sum is read by the graph's result, the others by the next layer


def test_module_of_a_model_that_a_function_closes_over(fake_world):
    class Model(torch.nn.Module):
        def forward(self, x):
            return NORMS["L"](reduce_functional(x), x[0], 1e-5)

    model = torch.nn.Sequential(Model())
    (entry,) = capture(lambda x: model(x), tensors()[0]).account.entries
    assert entry.module == "model.0"


def test_pictures_are_kept_only_where_wanted(fake_world):
    account = capture(fuses, *tensors()).account
    assert account.pictures == ()
    assert [entry.picture for entry in account.entries] == [-1]


def test_pictures_survive_the_way_through_json(recorded):
    accounts = [recorded(mixed)]
    assert accounts[0].pictures
    assert reports.graph_reports_from_json(reports.graph_reports_to_json(accounts)) == accounts


def test_a_picture_that_fails_costs_nothing(recorded, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pictures, "_Before", broken)
    account = recorded(fuses)
    assert account.entries[0].status == "fused"
    assert account.entries[0].picture == -1
    assert account.notes == ("pictures for the HTML report are missing: ZeroDivisionError: planted",)
    assert "planted" in page(Report((account,)), "title")


# --- How they are drawn -------------------------------------------------------------------------------------

DIAMOND = Drawing(
    (Box("in", "input"), Box("left", "step"), Box("right with a long name", "norm", "detail"), Box("out", "reader")),
    ((0, 1, "norm"), (0, 2, "sum"), (1, 3, ""), (2, 3, ""), (0, 3, "")),
)


def rectangles(svg):
    found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    return [tuple(map(float, each)) for each in found]


def overlap(a, b):
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def check_drawing(drawing):
    svg = draw(drawing, "label")
    boxes = rectangles(svg)
    assert len(boxes) == len(drawing.boxes)
    for start, end, _ in drawing.edges:
        assert boxes[start][1] + boxes[start][3] < boxes[end][1], "an edge does not point down"
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    for x, y, w, h in boxes:
        assert min(x, y) >= 0
        assert x + w <= width
        assert y + h <= height
    return svg


def test_boxes_do_not_overlap_and_edges_point_down():
    assert check_drawing(DIAMOND).count('class="wire"') == len(DIAMOND.edges)


@pytest.mark.parametrize("block", [fuses, gated, merged, two_layers, mixed], ids=lambda block: block.__name__)
def test_real_pictures_are_drawn_well(recorded, block):
    for picture in recorded(block).pictures:
        for drawing in filter(None, (picture.before, picture.after)):
            check_drawing(drawing)


def test_text_of_a_box_is_escaped():
    svg = draw(Drawing((Box("<b>&", "step", '"x"'),), ()), "<label>")
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;" in svg
    assert "<label>" not in svg


# --- The page -----------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects what the page would load and its table rows."""

    EMPTY = frozenset({"meta", "link", "input", "br", "wbr", "path", "rect"})

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.rows = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "srcset") and not value.startswith(("#", "data:,")):
                self.loads.append(value)
        if tag == "tr":
            self.rows.append(dict(attributes).get("data-status"))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def sample(recorded):
    """A report of two graphs with all-reduces, fused and not, and one without."""
    fusewire.clear_report()
    recorded(mixed)
    recorded(merged)
    recorded(lambda x, r, w: x + r)
    found = fusewire.report()
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


# --- The page in a browser ----------------------------------------------------------------------------------

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


# --- The command in this process ----------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs `fusewire explain` with a script in this process; its status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(source, *options, arguments=()):
        fusewire.clear_report()
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(source))
        status = cli.main(["explain", *options, str(file), *arguments])
        return status, *capfd.readouterr()

    return run


# Compiles without generating code, over a process group that communicates with nobody.
CAPTURES = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support.blocks import NORMS, reduce_functional, tensors
from support.distributed import fake_group
from support.graphs import capture
with fake_group(2):
    capture(lambda x, r, w: (NORMS["L"](r + reduce_functional(x), w, 1e-5), reduce_functional(r).relu()), *tensors())
"""


def test_arguments_and_name_reach_the_script(command):
    status, out, _ = command("import sys; print(__name__, sys.argv[1:])", arguments=["--html", "x", "-m"])
    assert status == 0
    assert "__main__ ['--html', 'x', '-m']" in out


def test_report_comes_after_what_the_script_prints(command):
    status, out, _ = command(CAPTURES + "print('the script is done')")
    assert status == 0
    assert out.index("the script is done") < out.index("fusewire: 1 of 2 all-reduces fused in 1 graph")
    assert "refused" in out


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit(-1)", -1, ""),
        ("sys.exit('it went wrong')", 1, "it went wrong\n"),
        ("raise ValueError('planted')", 1, "ValueError: planted\n"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped (SIGTERM)"),
    ],
)
def test_status_is_the_scripts_and_the_report_comes_first(command, end, status, said):
    got, out, err = command(CAPTURES + "import sys\n" + end)
    assert got == status
    assert "fusewire: 1 of 2 all-reduces fused" in out
    assert said in err


def test_traceback_is_the_scripts_own(command):
    _, _, err = command("def inner():\n    raise ValueError('planted')\n\ninner()")
    assert err.startswith("Traceback (most recent call last):\n")
    assert [os.path.basename(file) for file in re.findall(r'File "([^"]+)"', err)] == ["script.py"] * 2


def test_a_script_that_is_not_python(command):
    status, _, err = command("this is no Python")
    assert status == 1
    assert "SyntaxError" in err


def test_sigterm_works_as_before_afterwards(command):
    before = signal.getsignal(signal.SIGTERM)
    command("pass")
    assert signal.getsignal(signal.SIGTERM) is before


def test_advice_where_nothing_was_compiled(command):
    _, out, _ = command("print(1)")
    assert "Nothing was compiled in this process" in out
    assert "torch.compile" in out


def test_advice_where_fusewire_is_switched_off(command, monkeypatch):
    monkeypatch.setenv("FUSEWIRE_DISABLE", "1")
    assert "FUSEWIRE_DISABLE" in command("pass")[1]


NO_ALL_REDUCE = CAPTURES.replace("reduce_functional(", "torch.relu(").replace("import sys", "import sys, torch")


def test_advice_where_no_all_reduce_was_found(command, monkeypatch):
    assert "fusewire: 0 of 0" in command(NO_ALL_REDUCE)[1]
    assert "There was one rank" in command(NO_ALL_REDUCE)[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = command(NO_ALL_REDUCE)[1]
    assert "the model is not split over the ranks" in out
    assert "parallelize_module" in out


def test_other_ranks_say_nothing_but_errors(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    status, out, err = command(CAPTURES + "raise ValueError('planted')")
    assert status == 1
    assert "all-reduces" not in out
    assert "ValueError: planted" in err


def test_expect_fused(command):
    status, _, err = command(CAPTURES, "--expect-fused")
    assert status == 1
    assert "--expect-fused: 1 of 2 all-reduces were not fused" in err
    status, _, err = command("pass", "--expect-fused")
    assert status == 1
    assert "no all-reduce was found" in err
    assert command(CAPTURES + "import sys; sys.exit(7)", "--expect-fused")[0] == 7


def test_json_is_all_that_stdout_gets(command):
    status, out, err = command(CAPTURES + "import os; print('chatter'); os.system('echo more chatter')", "--json")
    assert status == 0
    data = json.loads(out)
    assert (data["found"], data["fused"], data["exit_status"], data["error"]) == (2, 1, 0, "")
    assert data["graphs"][0]["entries"][1]["status"] == "refused"
    assert "chatter\n" in err
    assert "more chatter\n" in err


def test_files(command, tmp_path):
    page_file, json_file = tmp_path / "out.html", tmp_path / "out.json"
    status, _, err = command(
        CAPTURES + "raise ValueError('planted')", "--html", str(page_file), "--json-file", str(json_file)
    )
    assert status == 1
    assert f"wrote {page_file}" in err
    text = page_file.read_text()
    Reader(text)
    assert "ValueError: planted" in text
    data = json.loads(json_file.read_text())
    assert (data["found"], data["exit_status"]) == (2, 1)
    assert "ValueError: planted" in data["error"]


def test_graph_breaks_are_told(command):
    source = """
    import torch
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1
    torch.compile(broken, backend="eager")(torch.ones(2))
    """
    assert "graph breaks: 1; nothing fuses across them" in command(source)[1]


def test_module_is_run_by_its_name(command, tmp_path, monkeypatch, capfd):
    (tmp_path / "some_module.py").write_text("import sys; print(__name__, __spec__.name, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "-m", "some_module", "--flag"]) == 0
    assert "__main__ some_module ['--flag']" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["--html", "/nowhere/x.html", __file__], "/nowhere/x.html cannot be written"),
        (["--json-file", "/", __file__], "/ cannot be written"),
        (["-o", "merge_allreduces", __file__], "an option is given as NAME=VALUE"),
        (["-o", "merge_allreduce=False", __file__], "did you mean 'merge_allreduces'?"),
        (["-o", "merge_allreduces=perhaps", __file__], "merge_allreduces is 'perhaps'"),
        (["--nproc-per-node", "0", __file__], "it must be at least 1"),
    ],
)
def test_wrong_calls_are_told_before_the_script_runs(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert cli.main(["explain", *arguments]) == 1
    assert says in capsys.readouterr().err


def test_options():
    parsed = explain.parse_options(
        [
            "merge_allreduces=false",
            "expect-fused=all",
            "fi_allreduce_fusion_max_size_mb=1.5",
            "dump_graphs=none",
            "ir_op_priority=rms_norm=native",
            "ir_op_priority=all_reduce_rms_norm=rank_ordered,native",
            "disabled_passes=eliminate_noops,merge_all_reduces",
        ]
    )
    config = fusewire.PassConfig.from_options(parsed)
    assert config == fusewire.PassConfig(
        merge_allreduces=False,
        expect_fused="all",
        fi_allreduce_fusion_max_size_mb=1.5,
        ir_op_priority={"rms_norm": ("native",), "all_reduce_rms_norm": ("rank_ordered", "native")},
        disabled_passes=("eliminate_noops", "merge_all_reduces"),
    )
    with pytest.raises(ConfigError):
        explain.parse_options(["ir_op_priority=rms_norm"])


def test_ranks_are_started_by_torchs_launcher(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: called.append(arguments))
    monkeypatch.setattr(sys, "argv", ["fusewire", "explain", "--nproc-per-node", "2", "x.py"])
    explain._start_ranks(2)
    (arguments,) = called
    assert arguments[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert arguments[-6:] == ["-m", "fusewire", "explain", "--nproc-per-node", "2", "x.py"]


# --- The command for real -----------------------------------------------------------------------------------

TWO_RANKS = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
import torch.distributed as dist
from support.blocks import NORMS, reduce_functional, tensors


def block(x, r, w):
    return NORMS["L"](r + reduce_functional(x), w, 1e-5)


def other(x, r, w):
    return reduce_functional(x).relu()


dist.init_process_group("gloo")
with torch.no_grad():
    values = [t + dist.get_rank() for t in tensors()]
    want = block(*values)
    got = torch.compile(block)(*values)
    torch.compile(other, backend="fusewire")(*values)
torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
# In one piece: torchrun's ranks write unbuffered, and the pieces of a print() may alternate with the other rank's.
sys.stdout.write("arguments " + str(sys.argv[1:]) + "\\n")
dist.destroy_process_group()
"""


def run_for_real(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_ranks_under_torchrun(tmp_path):
    """Both ways of compiling, a file of each kind, and one report although there are two ranks."""
    script, page_file, json_file = (tmp_path / name for name in ("script.py", "out.html", "out.json"))
    script.write_text(TWO_RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--html", str(page_file), "--json-file", str(json_file), "-o", "inline_native=False"]
    done = run_for_real(*launcher, "-m", "fusewire", "explain", *options, str(script), "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("arguments ['--epochs', '3']") == 2
    assert done.stdout.count("fusewire: 1 of 2 all-reduces fused in 2 graphs, 1 refused") == 1
    assert "no RMSNorm follows; aten::relu reads its result" in done.stdout
    data = json.loads(json_file.read_text())
    assert data["rank"] == "0 of 2"
    assert [len(graph["pictures"]) for graph in data["graphs"]] == [1, 1]
    places = [entry["location"].split(":")[0] for graph in data["graphs"] for entry in graph["entries"]]
    assert places == ["tests/blocks.py"] * 2
    reader = Reader(page_file.read_text())
    assert list(filter(None, reader.rows)) == ["fused", "refused"]


ALONE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from support.blocks import NORMS, reduce_functional, tensors

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
with torch.no_grad():
    torch.compile(lambda x, r, w: NORMS["L"](r + reduce_functional(x), w, 1e-5))(*tensors())
"""


def test_alone_and_again_with_a_warm_compile_cache(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    for _ in range(2):
        done = run_for_real(
            "-m", "fusewire", "explain", "--expect-fused", str(script), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
        )
        assert done.returncode == 0, done.stderr
        assert "fusewire: 1 of 1 all-reduces fused in 1 graph" in done.stdout


def test_ranks_of_its_own_and_a_rank_that_fails(tmp_path):
    """Rank 1 fails; torchrun stops rank 0, which still says what it knows."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1':\n    raise ValueError('planted')\ntime.sleep(120)\n"
    )
    done = run_for_real("-m", "fusewire", "explain", "--nproc-per-node", "2", str(script))
    assert done.returncode == 1
    assert "ValueError: planted" in done.stderr
    assert "fusewire: 0 of 0 all-reduces fused" in done.stdout


# --- Coverage of the zoo ------------------------------------------------------------------------------------

QUICK = ("llama", "gemma2", "deepseek_v3", "qwen3_next", "native")


def _model(name):
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.nightly])


@pytest.mark.parametrize("name", [_model(name) for name in MODELS])
def test_every_fusible_all_reduce_is_fused(name):
    spec = MODELS[name]
    if spec.skip_reason or not spec.counted:
        pytest.skip(spec.skip_reason or "the zoo's numbers are of another version of transformers")
    found = measure(name)
    assert not found.notes
    assert not found.graph_breaks
    assert (found.all_reduces, found.reduce_scatters) == (spec.all_reduces, spec.reduce_scatters)
    assert (found.reported, found.fused, found.merged) == (found.sums, spec.fusible, spec.merges)
    assert sum(found.reasons.values()) == found.sums - spec.fusible


def test_documentation_has_a_line_for_every_model():
    text = (TESTS.parent / "docs" / "coverage.md").read_text()
    assert set(re.findall(r"^(?:\| |- )(\w+)(?: \||: )", text, re.MULTILINE)) - {"model"} >= set(MODELS)


def test_table_tells_what_is_missing():
    spec = dataclasses.replace(MODELS["native"], name="some", fusible=3, note="odd", has_cache=False)
    from support.coverage import Coverage

    row = Coverage(spec, all_reduces=4, reported=3, fused=2, merged=1, graphs=2)
    row.reasons["because"] = 1
    row.graph_breaks["print() breaks\nmore"] = 2
    text = as_markdown([row, Coverage(spec, failed="not installed")])
    for said in (
        "| some | 4 | 3 | 2 (1) | 2 | odd; fusewire's report knows 3 of the 4 only; **1 fusible",
        "- 1 x because: some 1",
        "- some: 2 x print() breaks\n",
        "- some: not installed",
        "there are 4 all-reduces, and 2 were fused. In the 1 models",
        "3 are fusible, and 2 were fused; 0 of these models fuse all",
    ):
        assert said in text, said


def test_table_of_versions_that_the_zoo_does_not_know():
    from support.coverage import Coverage

    spec = dataclasses.replace(MODELS["llama"], check=str)
    layer_norms = dataclasses.replace(MODELS["olmo"], check=str)
    with mock.patch.object(type(spec), "counted", False):
        assert Coverage(spec, all_reduces=4, reported=4, fused=4).fusible == 4
        assert Coverage(spec, all_reduces=4, reported=4, fused=3).fusible is None
        assert Coverage(layer_norms, all_reduces=4, reported=4).fusible == 0
        text = as_markdown([Coverage(spec, all_reduces=4, reported=4, fused=3)], ["## other versions\n"])
    assert "| llama | 4 | ? | 3 | 0 |  |" in text
    assert "The zoo's numbers are of transformers" in text
    assert text.endswith("## other versions\n")
    assert "--also DIRECTORY" in text


def test_a_model_that_fails_without_fusewire_is_told_as_such(monkeypatch):
    def broken(dtype, device, sharded):
        raise TypeError("planted\nmore")

    monkeypatch.setitem(MODELS, "broken", dataclasses.replace(MODELS["native"], make=broken))
    assert measure("broken").failed == "fails as it is, without fusewire: TypeError: planted"


@pytest.mark.nightly
def test_passes_cost_little(tmp_path):
    """The benchmark at small sizes: it runs, everything fuses, and the time grows as the layers do."""
    file = TESTS.parent / "examples" / "benchmarks" / "compile_cost.py"
    done = run_for_real(str(file), "--layers", "4", "16", "--full", "4", "--out", str(tmp_path / "cost.json"))
    assert done.returncode == 0, done.stderr
    small, large = json.loads((tmp_path / "cost.json").read_text())
    assert (small["fused"], large["fused"]) == (8, 32)
    assert large["pass_seconds"] < 8 * small["pass_seconds"]
    assert large["peak_megabytes"] < 20
    assert small["clock_share"] > 0
