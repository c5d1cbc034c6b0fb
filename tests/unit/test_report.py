"""The report: what it counts, where it says things are, how it reads, and what it explains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fusewire
from fusewire import PassConfig
from fusewire.errors import ExpectationError
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report import entries
from fusewire.fusion_passes.report import model as reports
from fusewire.fusion_passes.report.model import Entry, GraphReport
from fusewire.fusion_passes.report.store import Report
from fusewire.patterns.collectives import ALL_REDUCE, WAIT

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.graphs import capture

pytestmark = pytest.mark.usefixtures("fake_world")
aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def fuses(x, r, w):
    return NORMS["L"](r + reduce_functional(x), w, 1e-5)


def does_not(x, r, w):
    return torch.relu(reduce_functional(x)) + r


def both(x, r, w):
    return does_not(fuses(x, r, w), r, w)


def line_of(mark):
    """The number of the one line of this file that ends with a mark."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}")]
    return number


# Counts and texts


def test_counts_and_summary():
    capture(both, *tensors())
    found = fusewire.report()
    assert (found.found, found.fused, found.refused) == (2, 1, 1)
    seconds = found.pass_seconds
    assert seconds > 0
    assert found.summary == (f"fusewire: 1 of 2 all-reduces fused in 1 graph, 1 refused; passes took {seconds:.2f} s")


def test_summary_without_refusals_and_with_several_graphs():
    capture(fuses, *tensors())
    capture(fuses, *tensors(torch.float32))
    summary = fusewire.report().summary
    assert summary.startswith("fusewire: 2 of 2 all-reduces fused in 2 graphs; passes took ")
    assert Report().summary == "fusewire: 0 of 0 all-reduces fused in 0 graphs; passes took 0.00 s"


def test_graphs_are_numbered_in_order_and_entries_with_them():
    capture(fuses, *tensors())
    capture(both, *tensors())
    found = fusewire.report()
    assert [graph.number for graph in found.graphs] == [0, 1]
    assert [entry.graph for entry in found.entries] == [0, 1, 1]
    assert [entry.status for entry in found.entries] == ["fused", "fused", "refused"]


def test_clear_report_forgets_and_counts_anew():
    capture(fuses, *tensors())
    before = fusewire.report()
    fusewire.clear_report()
    assert fusewire.report() == Report()
    assert before.found == 1  # a report is what was known when it was asked for
    capture(fuses, *tensors())
    assert [graph.number for graph in fusewire.report().graphs] == [0]


def test_entry_of_a_fused_all_reduce():
    captured = capture(fuses, *tensors(shape=(2, 3)))
    (entry,) = captured.report.entries
    assert (entry.status, entry.gate) == ("fused", "")
    assert entry.fusion == "all_reduce + fused_add_rms_norm"
    assert entry.provider == "native"
    assert entry.group == dist.group.WORLD.group_name
    assert (entry.shape, entry.dtype) == (f"[2,3,{HIDDEN}]", "bfloat16")
    nodes = captured.before[0]
    assert f"%{entry.node} : " in nodes


def test_account_of_a_graph():
    captured = capture(fuses, *tensors())
    report = captured.report
    assert report.kind == "inference"
    assert not report.cached
    assert report.notes == ()
    assert (
        report.nodes_before
        == captured.before[0].count("%")
        - sum(line.split(" = ", 1)[-1].count("%") for line in captured.before[0].splitlines())
        + 1
    )  # the output node has no name of its own
    assert report.nodes_after == len(captured.graph.nodes)


def test_text_of_a_report():
    """The whole text, of a report made by hand: one line per kind of fusion, two per refusal, notes last."""
    fused = Entry(0, "a", "fused", spelling="L", fusion="all_reduce + rms_norm", provider="native")
    slow = dataclasses.replace(fused, node="b", reason="flashinfer: not installed")
    refused = Entry(
        0,
        "c",
        "refused",
        "match",
        "a LayerNorm follows",
        "model/block.py:7",
        "layers.0.mlp",
        shape="[5,64]",
        dtype="float32",
    )
    nameless = dataclasses.replace(refused, node="all_reduce_9", location="", module="")
    report = GraphReport(0, "inference", (fused, fused, slow, refused, nameless), 1.5, notes=("a word more",))
    cached = GraphReport(1, "training", cached=True)
    assert str(Report((report, cached))) == "\n".join(
        [
            "fusewire: 3 of 5 all-reduces fused in 2 graphs, 2 refused; passes took 1.50 s",
            "graph 0 (inference): 5 all-reduces, 3 fused",
            "     2 x all_reduce + rms_norm, norm spelled L, provider native",
            "     1 x all_reduce + rms_norm, norm spelled L, provider native (flashinfer: not installed)",
            "  refused: layers.0.mlp model/block.py:7 [[5,64] float32]",
            "       match: a LayerNorm follows",
            "  refused: all_reduce_9 [[5,64] float32]",
            "       match: a LayerNorm follows",
            "  note: a word more",
            "graph 1 (training, from the compile cache): 0 all-reduces, 0 fused",
        ]
    )


def test_json():
    capture(both, *tensors())
    found = fusewire.report()
    data = json.loads(found.to_json())
    assert data["found"], data["fused"] == (2, 1)
    assert data["refused"] == 1
    assert data["pass_seconds"] == found.pass_seconds
    (graph,) = data["graphs"]
    assert set(graph) == {field.name for field in dataclasses.fields(GraphReport)}
    assert [set(entry) for entry in graph["entries"]] == [{field.name for field in dataclasses.fields(Entry)}] * 2
    assert [entry["reason"] for entry in graph["entries"]] == [entry.reason for entry in found.entries]
    assert data == json.loads(json.dumps(found.to_dict()))


def test_accounts_survive_a_round_trip():
    capture(both, *tensors())
    capture(fuses, *tensors(), dynamic=True)
    graphs = list(fusewire.report().graphs)
    assert len(graphs) == 2
    assert reports.graph_reports_from_json(reports.graph_reports_to_json(graphs)) == graphs


# Places


def test_location_is_the_users_line():
    def block(x, r, w):
        reduced = dist._functional_collectives.all_reduce(x, "sum", dist.group.WORLD)  # the call
        return NORMS["L"](reduced + r, w, 1e-5)

    (entry,) = capture(block, *tensors()).report.entries
    assert entry.location == f"unit/test_report.py:{line_of('the call')}"


def test_location_of_an_in_place_call():
    def block(x, r, w):
        x = x.clone()
        dist.all_reduce(x)  # the in-place call
        return NORMS["L"](x + r, w, 1e-5)

    (entry,) = capture(block, *tensors()).report.entries
    assert entry.location == f"unit/test_report.py:{line_of('the in-place call')}"


def test_location_in_parallelize_module_is_the_layers_call():
    """The collective is issued in a hook of torch's; the user looks for the layer in the model."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)

        def forward(self, x, residual):
            return self.norm(residual + self.down(x))  # the layer's call

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Identity(), Block()])

        def forward(self, x, residual):
            return self.layers[1](x, residual)

    model = Model()
    parallelize_module(model.layers[1], init_device_mesh("cpu", (2,)), {"down": RowwiseParallel()})
    (entry,) = capture(model, torch.randn(4, HIDDEN // 2), torch.randn(4, HIDDEN)).report.entries
    assert entry.status == "fused"
    assert entry.module == "layers.1.down"
    assert entry.location == f"unit/test_report.py:{line_of(chr(116) + 'he layer' + chr(39) + 's call')}"


def _frames(*places):
    return "".join(f'  File "{path}", line {line}, in {name}\n    code()\n' for path, line, name in places)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (
            [("/home/u/model/block.py", 3, "forward"), ("/x/torch/nn/linear.py", 9, "forward")],
            "model/block.py:3",
        ),
        (
            [
                ("/home/u/model/mlp.py", 8, "forward"),
                ("/x/transformers/integrations/tensor_parallel.py", 1, "all_reduce"),
            ],
            "model/mlp.py:8",
        ),
        ([("/home/u/model/mlp.py", 8, "forward"), ("<eval_with_key>.3", 1, "forward")], "model/mlp.py:8"),
        ([("/home/u/a.py", 1, "f"), ("/home/u/b.py", 2, "g")], "u/b.py:2"),
        ([("/x/torch/nn/linear.py", 9, "forward")], "nn/linear.py:9"),
        ([], ""),
    ],
)
def test_location_skips_machinery(places, expected):
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = _frames(*places)
    assert entries.source_location(node) == expected


def test_location_without_a_stack_trace():
    node = torch.fx.Graph().placeholder("x")
    assert entries.source_location(node) == ""
    node.meta["stack_trace"] = None
    assert entries.source_location(node) == ""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['3']", "model.layers.3"),
        ("L['self'].layers[12].mlp", "layers.12.mlp"),
        ("L['self']", ""),
    ],
)
def test_module_path(path, expected):
    node = torch.fx.Graph().placeholder("x")
    assert entries.module_path(node) == ""
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (path, object)}
    assert entries.module_path(node) == expected


# Spellings

NAMES_IN_FP32 = {
    "L": "L or M in fp32",
    "M": "L or M in fp32",
    "L'": "L' or M' in fp32",
    "M'": "L' or M' in fp32",
    "F": "L' or M' in fp32",
    "G": "G in fp32",
    "weightless": "weightless in fp32",
}


@pytest.mark.parametrize("kind", list(NORMS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_spelling(kind, dtype):
    captured = capture(lambda x, r, w: NORMS[kind](r + reduce_functional(x), w, 1e-5), *tensors(dtype))
    (entry,) = captured.report.entries
    assert entry.spelling == (kind if dtype is torch.bfloat16 else NAMES_IN_FP32[kind])
    assert f"norm spelled {entry.spelling}" in str(fusewire.report())


def test_spelling_of_an_operator_is_its_name():
    captured = capture(lambda x, r, w: fusewire.rms_norm(reduce_functional(x), w, 1e-5), *tensors())
    (entry,) = captured.report.entries
    assert entry.spelling == "fusewire::rms_norm"
    assert entry.fusion == "all_reduce + rms_norm"


# expect_fused


@pytest.mark.parametrize("expected", ["all", 1], ids=str)
def test_expectation_that_is_met(expected):
    assert capture(fuses, *tensors(), expect_fused=expected).verdicts() == [("fused", "")]


@pytest.mark.parametrize(("block", "expected"), [(both, "all"), (fuses, 2), (fuses, 0), (does_not, 1)])
def test_expectation_that_is_not_met(block, expected):
    with pytest.raises(Exception, match="expect_fused=") as error:
        capture(block, *tensors(), expect_fused=expected)
    fused = fusewire.report().fused
    found = fusewire.report().found
    text = str(error.value)
    assert f"expect_fused={expected!r}, but {fused} of {found} all-reduces were fused." in text
    assert str(fusewire.report()) in text


def test_expectation_counts_graph_by_graph_and_skips_those_without_all_reduces():
    assert capture(lambda x, r, w: x + r, *tensors(), expect_fused=1).verdicts() == []
    assert capture(lambda x, r, w: x + r, *tensors(), expect_fused="all").verdicts() == []


def test_training_graphs_are_left_alone():
    x, r, w = tensors(torch.float32)
    w.requires_grad_()
    captured = capture(fuses, x, r, w, grad=True)
    assert captured.graph_reports[0].kind == "training"
    assert captured.verdicts() == [("refused", "match")]


def _by_backend():
    return torch.compile(both, backend="fusewire", options={"expect_fused": "all"})(*tensors())


def _by_enable():
    with fusewire.enable(expect_fused="all"):
        return torch.compile(both)(*tensors())


@pytest.mark.parametrize("way", [_by_backend, _by_enable])
def test_expectation_fails_torch_compile_with_the_report(way):
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        way()
    assert isinstance(error.value.inner_exception, ExpectationError)
    text = str(error.value)
    assert "expect_fused='all', but 1 of 2 all-reduces were fused." in text
    assert "graph 0 (inference): 2 all-reduces, 1 fused" in text
    assert "match: no RMSNorm follows; aten::relu reads its result" in text


# Explanations


def reason(block, *inputs, **options):
    captured = capture(block, *(inputs or tensors()), **options)
    (entry,) = [e for e in captured.report.entries if e.status == "refused" and e.collective == "all_reduce"]
    assert entry.gate == "match"
    return entry.reason


def _broken(x, r, w):
    return reduce_functional(x)


def _layer_norm(x, r, w):
    return F.layer_norm(r + reduce_functional(x), (HIDDEN,), w)


def _matmul(x, r, w):
    return (r + reduce_functional(x)) @ r.t()


def _leaves(x, r, w):
    return r + reduce_functional(x)


def _relu(x, r, w):
    return torch.relu(reduce_functional(x)) * 2


def _gated(x, r, w):
    return NORMS["L"](r + reduce_functional(x) * torch.sigmoid(r), w, 1e-5)


def _broadcast(x, r, w):
    return NORMS["L"](reduce_functional(x) + r[:, :1] + r, w, 1e-5)


def _two_all_reduces(x, r, w):
    return NORMS["L"](reduce_functional(x) + reduce_functional(r), w, 1e-5)


def _scattered(x, r, w):
    reduced = reduce_functional(x)
    return dist._functional_collectives.reduce_scatter_tensor(reduced, "sum", 0, dist.group.WORLD)


def _gathered(x, r, w):
    reduced = reduce_functional(x) * 2
    return dist._functional_collectives.all_gather_tensor(reduced, 0, dist.group.WORLD)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        (
            _broken,
            "the norm lies beyond a graph break or the end of a nested_compile_region, or outside the compiled part; "
            "compile with fullgraph=True",
        ),
        (_layer_norm, "a LayerNorm follows, which subtracts the mean"),
        (_matmul, "a matrix product follows, not a norm"),
        (_leaves, "its result leaves the graph without an RMSNorm after it"),
        (_relu, "no RMSNorm follows; aten::relu reads its result"),
        (_gated, "multiplied by a tensor (mul) before the norm"),
        (_broadcast, "aten::add (add) adds a tensor of another shape than the all-reduce's result"),
        (_scattered, "a reduce-scatter (sequence parallelism) follows, not a norm"),
        (_gathered, "an all-gather follows, not a norm"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_explanation(block, says):
    assert says in reason(block, *tensors(torch.float32, shape=(4,)))


def test_explanation_of_a_sum_of_two():
    assert reason(_two_all_reduces, merge_allreduces=False) == (
        "it is added to another all-reduce (add), and a sum can be fused with one of its two all-reduces only; "
        "the other becomes the residual"
    )


def test_explanation_of_the_switch():
    assert reason(fuses, fuse_allreduce_rms=False) == "fuse_allreduce_rms=False switches the fusion off"


class _Handmade:
    """A post-grad graph built node by node, for what Dynamo and Inductor never hand us."""

    def __init__(self):
        self.graph = torch.fx.Graph()
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = torch.empty(4, HIDDEN)

    def call(self, target, *args):
        node = self.graph.call_function(target, args)
        node.meta["val"] = self.x.meta["val"]
        return node

    def explain(self, *outputs):
        self.graph.output(outputs)
        (entry,) = run_passes(self.graph).entries
        assert (entry.status, entry.gate) == ("refused", "match")
        return entry.reason


def test_explanation_of_an_in_place_all_reduce():
    made = _Handmade()
    reduced = made.call(c10d.all_reduce_.default, made.x, "sum", dist.group.WORLD.group_name)
    says = made.explain(made.call(WAIT, reduced))
    assert says == "the all-reduce overwrites its input in place, so it cannot be moved to the norm"


def test_explanation_of_several_waits():
    made = _Handmade()
    reduced = made.call(ALL_REDUCE, made.x, "sum", dist.group.WORLD.group_name)
    says = made.explain(made.call(WAIT, reduced), made.call(WAIT, reduced))
    assert says.startswith("its result is waited for in several places of this graph, or also read before it")


def test_explanation_of_no_wait():
    made = _Handmade()
    reduced = made.call(ALL_REDUCE, made.x, "sum", dist.group.WORLD.group_name)
    assert made.explain(made.call(aten.relu.default, reduced)) == "its result is waited for nowhere in this graph"


def test_explanation_of_a_wait_behind_a_graph_break():
    made = _Handmade()
    says = made.explain(made.call(ALL_REDUCE, made.x, "sum", dist.group.WORLD.group_name))
    assert says.startswith("its result leaves this graph before it is waited for: the wait lies beyond a graph break")
    assert says.endswith("compile with fullgraph=True to see what breaks the graph")


def test_explanation_of_an_unread_result():
    made = _Handmade()
    made.call(WAIT, made.call(ALL_REDUCE, made.x, "sum", dist.group.WORLD.group_name))
    assert made.explain(made.x) == "nothing reads its result in this graph"


def test_notes_reach_the_text(monkeypatch):
    from fusewire.fusion_passes.compiler.inductor import FusionMatcher

    def broken(self, graph):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(FusionMatcher, "apply", broken)
    capture(fuses, *tensors(), config=PassConfig())
    (note,) = fusewire.report().graphs[0].notes
    assert note == "a pass of fusewire failed and the graph was left alone: ZeroDivisionError: planted"
    assert f"  note: {note}" in str(fusewire.report()).splitlines()
