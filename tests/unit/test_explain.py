"""The command `fusewire explain`: what it runs, prints and writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fusewire
from fusewire import __main__ as cli
from fusewire.cli import explain
from fusewire.errors import ConfigError

from support.pages import Reader

TESTS = Path(__file__).parents[1]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs `fusewire explain` with a script in this process; its status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_USE_AGENT_STORE"):
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


# Leaves the same counts without compiling anything.
REPORTS = """
from fusewire.fusion_passes.report.model import Entry, GraphReport
from fusewire.fusion_passes.report.store import add_graph_report
add_graph_report(GraphReport(-1, "inference", (Entry(0, "a", "fused"), Entry(0, "b", "refused", "match", "why"))))
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
    got, out, err = command(REPORTS + "import sys\n" + end)
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


def test_sigterm_while_the_report_is_printed_is_ignored(command, monkeypatch):
    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return "the report"

    monkeypatch.setattr(explain, "_as_text", stopped)
    assert command(REPORTS)[:2] == (0, "the report\n")


class LaunchersStore:
    """Stands for torchrun's store; runs `action` when a rank sets or awaits a key."""

    def __init__(self, monkeypatch, action):
        self.action, self.calls = action, []
        monkeypatch.setattr(explain, "_launchers_store", lambda: self)

    def set(self, key, value):
        self.calls.append(("set", key))
        self.action()

    def wait(self, keys):
        self.calls.append(("wait", *keys))
        self.action()


def test_rank_0_can_be_stopped_once_others_may_fail(command, monkeypatch):
    """SIGTERM at the earliest moment at which another rank can fail: there is a report all the same."""
    store = LaunchersStore(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    status, out, err = command("raise ValueError('not reached')")
    assert store.calls == [("set", "fusewire/explain/0")]
    assert status == 143
    assert "fusewire: 0 of 0 all-reduces fused" in out
    assert "stopped (SIGTERM)" in err


def test_other_ranks_wait_for_rank_0_before_their_script_runs(command, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    ran = tmp_path / "ran"
    store = LaunchersStore(monkeypatch, lambda: seen.append((ran.exists(), signal.getsignal(signal.SIGTERM))))
    seen, before = [], signal.getsignal(signal.SIGTERM)
    assert command(f"open({str(ran)!r}, 'w').close()")[0] == 0
    assert store.calls == [("wait", "fusewire/explain/0")]
    assert seen == [(False, before)]
    assert ran.exists()


def test_the_launchers_store_is_torchruns(command, monkeypatch):
    """The one that torchrun keeps, by a key of this attempt."""
    assert explain._launchers_store() is None
    server = torch.distributed.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    assert command("pass")[0] == 0
    assert server.get("fusewire/explain/3") == b"ready"
    monkeypatch.setenv("RANK", "1")
    assert command("pass")[0] == 0


def test_a_store_that_fails_stops_nobody(command, monkeypatch):
    def failing():
        raise torch.distributed.DistStoreError("planted")

    LaunchersStore(monkeypatch, failing)
    monkeypatch.setenv("RANK", "1")
    status, out, err = command("print('ran')")
    assert (status, out) == (0, "ran\n")
    assert "rank 1 cannot coordinate its start with rank 0: planted" in err


def test_advice_where_nothing_was_compiled(command):
    _, out, _ = command("print(1)")
    assert "Nothing was compiled in this process" in out
    assert "torch.compile" in out


def test_advice_where_fusewire_is_switched_off(command, monkeypatch):
    monkeypatch.setenv("FUSEWIRE_DISABLE", "1")
    assert "FUSEWIRE_DISABLE" in command("pass")[1]


NO_ALL_REDUCE = CAPTURES.replace("reduce_functional(", "torch.relu(").replace("import sys", "import sys, torch")


def test_advice_where_no_all_reduce_was_found(command, monkeypatch):
    out = command(NO_ALL_REDUCE)[1]
    assert "fusewire: 0 of 0" in out
    assert "There was one rank" in out
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = command(NO_ALL_REDUCE)[1]
    assert "the model is not split over the ranks" in out
    assert "parallelize_module" in out
    assert "does not fuse" not in out  # reduce-scatters fuse, and are in the report


def test_other_ranks_say_nothing_but_errors(command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    status, out, err = command(REPORTS + "raise ValueError('planted')")
    assert status == 1
    assert "all-reduces" not in out
    assert "ValueError: planted" in err


def test_expect_fused(command):
    status, _, err = command(REPORTS, "--expect-fused")
    assert status == 1
    assert "--expect-fused: 1 of 2 all-reduces were not fused" in err
    status, _, err = command("pass", "--expect-fused")
    assert status == 1
    assert "no all-reduce was found" in err
    assert command(REPORTS + "import sys; sys.exit(7)", "--expect-fused")[0] == 7


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
torch._inductor.config.fallback_by_default = True
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
    arguments = (*launcher, "-m", "fusewire", "explain", *options, str(script), "--epochs", "3")
    done = run_for_real(*arguments, TMPDIR=str(tmp_path))  # where torchrun leaves a folder
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("arguments ['--epochs', '3']") == 2
    assert done.stdout.count("fusewire: 1 of 2 all-reduces fused in 2 graphs, 1 refused") == 1
    assert "no RMSNorm follows; aten::relu reads its result" in done.stdout
    data = json.loads(json_file.read_text())
    assert data["rank"] == "0 of 2"
    assert [len(graph["pictures"]) for graph in data["graphs"]] == [1, 1]
    places = [entry["location"].split(":")[0] for graph in data["graphs"] for entry in graph["entries"]]
    assert places == ["support/blocks.py"] * 2
    reader = Reader(page_file.read_text())
    assert list(filter(None, reader.rows)) == ["fused", "refused"]


ALONE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from support.blocks import NORMS, reduce_functional, tensors

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
torch._inductor.config.fallback_by_default = True
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
    done = run_for_real("-m", "fusewire", "explain", "--nproc-per-node", "2", str(script), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert "ValueError: planted" in done.stderr
    assert "fusewire: 0 of 0 all-reduces fused" in done.stdout
