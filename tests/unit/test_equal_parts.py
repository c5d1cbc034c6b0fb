"""Equal parts of a model: one name, one compilation as serving engines have it, and counts of the
running model."""

from __future__ import annotations

import contextlib
import operator
from unittest import mock

import pytest
import torch
import torch._functorch._aot_autograd.autograd_cache as autograd_cache
import torch._inductor.compile_fx as inductor
import torch.distributed as dist
from torch._inductor.utils import fresh_cache
from torch.fx.passes.split_module import split_module

import fusewire
from fusewire.errors import ConfigError, ExpectationError
from fusewire.fusion_passes.report import store
from fusewire.fusion_passes.report.cache import CURRENT_CACHE
from fusewire.fusion_passes.report.expectation import check_model
from fusewire.fusion_passes.report.structure import compilation_name
from fusewire.fusion_passes.spmd import agreement

from support.blocks import HIDDEN
from support.distributed import fake_group

LAYERS = 4


@pytest.fixture(autouse=True)
def _own_cache():
    torch._dynamo.reset()
    with fresh_cache(), fake_group(2), torch.no_grad():
        yield


class Model(torch.nn.Module):
    """Layers that differ in the names of their weights only; `scaled` differs in a constant."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.RMSNorm(HIDDEN, eps=1e-5) for _ in range(LAYERS))
        self.factors = [torch.tensor(float(number)) for number in range(LAYERS)]

    def part(self, number, x, residual):
        residual = residual + dist._functional_collectives.all_reduce(x, "sum", dist.group.WORLD)
        return self.layers[number](residual), residual

    def forward(self, x, residual):
        for number in range(LAYERS):
            x, residual = self.part(number, x, residual)
        return x, residual


def inputs():
    return torch.ones(4, HIDDEN), torch.ones(4, HIDDEN)


class StopCompiling(BaseException):
    """As vLLM's."""


class Engine:
    """Splits a graph at its all-reduces and compiles equal parts once, as vLLM does
    (CompilerManager.compile)."""

    def __init__(self):
        self.compiled, self.loaded = 0, {}

    def __call__(self, model, example_inputs):
        seen = 0

        def part_of(node):
            nonlocal seen
            seen += "all_reduce" in str(node.target)
            return max(seen - 1, 0)

        split = split_module(model, None, part_of, keep_original_order=True)
        for name, part in list(split.named_children()):
            values = [node.meta["example_value"] for node in part.graph.nodes if node.op == "placeholder"]
            split.__dict__[name] = self._compile(part, values)  # found before the module of that name
        return split.forward

    def _compile(self, part, values):
        key, original = None, autograd_cache.autograd_cache_key

        def autograd_cache_key(*args, **kwargs):
            nonlocal key
            result = original(*args, **kwargs)
            key = result[0]
            if key in self.loaded:
                raise StopCompiling
            return result

        normalized = torch._functorch.config.patch(autograd_cache_normalize_inputs=True)
        with normalized, mock.patch.object(autograd_cache, "autograd_cache_key", autograd_cache_key):
            try:
                result = inductor.compile_fx(part, values)
            except StopCompiling:
                return self.loaded[key]
        self.compiled += 1
        self.loaded[key] = result
        return result


def compiled(model, engine, **options):
    """Compile and run with fusewire on, or, without options, off."""
    torch._dynamo.reset()
    with fusewire.enable(inline_native=False, **options) if options else contextlib.nullcontext():
        return torch.compile(model, backend=engine, fullgraph=True)(*inputs())


def test_equal_parts_stay_one_compilation_and_count_for_each_place():
    model, without, engine = Model(), Engine(), Engine()
    compiled(model, without)
    results = compiled(model, engine, expect_fused="all")
    assert engine.compiled == without.compiled == 2  # the first part's inputs are the model's
    assert all(torch.equal(a, b) for a, b in zip(results, model(*inputs()), strict=True))
    found = fusewire.report()
    assert [(graph.uses, len(graph.entries)) for graph in found.graphs] == [(1, 1), (LAYERS - 1, 1)]
    assert (found.found, found.fused, found.refused) == (LAYERS, LAYERS, 0)
    assert found.summary.startswith("fusewire: 4 of 4 all-reduces fused in 2 graphs, which 4 places of the model run; ")
    assert "1 all-reduces, 1 fused, run in 3 places of the model" in str(found)
    assert CURRENT_CACHE.get() is None


def test_a_warm_start_of_equal_parts_counts_the_same():
    compiled(Model(), Engine(), expect_fused="all")
    cold = fusewire.report()
    fusewire.clear_report()
    compiled(Model(), Engine(), expect_fused="all")
    assert [(graph.uses, graph.cached) for graph in fusewire.report().graphs] == [(1, True), (LAYERS - 1, True)]
    assert fusewire.report().entries == cold.entries


def test_equal_parts_found_after_the_report_was_cleared_are_reported_again():
    engine = Engine()
    compiled(Model(), engine, expect_fused="all")
    fusewire.clear_report()
    compiled(Model(), engine, expect_fused="all")
    assert engine.compiled == 2
    assert fusewire.report().fused == LAYERS


@pytest.mark.parametrize("stop", [StopCompiling, KeyboardInterrupt, GeneratorExit, SystemExit])
@pytest.mark.parametrize("way", ["backend", "enable"])
def test_what_is_no_error_is_not_taken_for_a_failure(monkeypatch, way, stop):
    """Nobody is told that this rank could not compile, nothing is counted, and the next compilation
    works."""
    told = []
    monkeypatch.setattr("fusewire.fusion_passes.backend.announce_unfused", told.append)
    with mock.patch.object(autograd_cache, "autograd_cache_key", side_effect=stop), pytest.raises(stop):
        run_whole(way)
    assert told == []
    assert fusewire.report().graphs == ()
    assert CURRENT_CACHE.get() is None
    assert agreement.PUBLISHED.get() == frozenset()
    run_whole(way)
    assert fusewire.report().fused == LAYERS


def run_whole(way):
    torch._dynamo.reset()
    options = {"inline_native": False}
    if way == "backend":
        return torch.compile(Model(), backend="fusewire", options=options, fullgraph=True)(*inputs())
    with fusewire.enable(**options):
        return torch.compile(Model(), fullgraph=True)(*inputs())


def test_an_error_is_announced(monkeypatch):
    told = []
    monkeypatch.setattr("fusewire.fusion_passes.backend.announce_unfused", told.append)
    planted = mock.patch.object(inductor, "_compile_fx_main", side_effect=RuntimeError("planted"))
    with planted, pytest.raises(Exception, match="planted"):
        run_whole("backend")
    assert told == ["could not compile a graph: RuntimeError"]


# Names


def graph_of(function, *values):
    """The graph that Dynamo captures."""
    found = []

    def keep(model, example_inputs):
        found.append((model, example_inputs))
        return model

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*values)
    return found[0]


def name_of(function, *values, key="key"):
    return compilation_name(*graph_of(function, *values), key)


def test_names_do_not_depend_on_the_layer():
    model = Model()
    assert name_of(lambda x, r: model.part(0, x, r), *inputs()) == name_of(lambda x, r: model.part(3, x, r), *inputs())


X = torch.ones(4, 4)
TWO, THREE = torch.tensor(2.0), torch.tensor(3.0)


def constant(number):
    """A model with a constant that is an attribute of the graph."""
    model = torch.fx.symbolic_trace(lambda x: x * 1)
    model.register_buffer("held", number)
    (product,) = model.graph.find_nodes(op="call_function", target=operator.mul)
    with model.graph.inserting_before(product):
        product.args = (product.args[0], model.graph.get_attr("held"))
    return model


def nested(inner):
    """A model that calls another graph."""
    model = torch.fx.symbolic_trace(lambda x: x * 1)
    model.inner = torch.fx.symbolic_trace(inner)
    (product,) = model.graph.find_nodes(op="call_function", target=operator.mul)
    with model.graph.inserting_before(product):
        product.args = (product.args[0], model.graph.get_attr("inner"))
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: name_of(lambda x: x + 1, X), lambda: name_of(lambda x: x + 2, X)),
        (lambda: name_of(lambda x: x + 1, X), lambda: name_of(lambda x: x * 1, X)),
        (
            lambda: compilation_name(torch.fx.symbolic_trace(lambda x, y: x - y), [X, X], ""),
            lambda: compilation_name(torch.fx.symbolic_trace(lambda x, y: y - x), [X, X], ""),
        ),
        (lambda: name_of(lambda x: x + 1, X), lambda: name_of(lambda x: x + 1, X.t())),
        (lambda: name_of(lambda x: x + 1, X), lambda: name_of(lambda x: x + 1, X.double())),
        (lambda: name_of(lambda x: x + 1, X), lambda: name_of(lambda x: x + 1, X, key="other")),
        (lambda: compilation_name(constant(TWO), [X], ""), lambda: compilation_name(constant(THREE), [X], "")),
        (
            lambda: compilation_name(nested(lambda x: x + 1), [X], ""),
            lambda: compilation_name(nested(lambda x: x + 2), [X], ""),
        ),
    ],
    ids=["number", "operator", "order", "layout", "dtype", "passes", "constant", "inner graph"],
)
def test_names_depend_on_what_a_report_may_say(one, other):
    assert one() == one()
    assert one() != other()


# For engines and callers by hand


def reported(uses):
    graph = fusewire.report().graphs[-1]
    for _ in range(uses - 1):
        assert store.add_use(graph)
    return fusewire.report().graphs[-1]


def test_a_model_in_parts_is_expected_as_a_whole():
    run_whole("enable")
    graphs = [reported(15)]  # four all-reduces each
    check_model(graphs, 60)
    check_model(graphs, "all")
    with pytest.raises(ExpectationError, match="expect_fused=61, but 60 of 60 all-reduces were fused"):
        check_model(graphs, 61)
    with pytest.raises(ExpectationError, match="expect_fused='all' is not met: no all-reduce of the program was fused"):
        check_model([], "all")
    assert fusewire.report().fused == 60


def test_uses_of_a_graph_that_the_report_no_longer_has_are_not_counted():
    run_whole("enable")
    graph = fusewire.report().graphs[0]
    fusewire.clear_report()
    assert not store.add_use(graph)
    compiled(Model(), Engine(), expect_fused="all")
    assert not store.add_use(graph)
    assert fusewire.report().fused == LAYERS


def test_a_report_is_written_and_read_back(tmp_path):
    run_whole("enable")
    kept = reported(3)
    file = tmp_path / "folder" / "rank0.json"
    fusewire.save_report(file)
    fusewire.clear_report()
    loaded = fusewire.load_report(file)
    assert loaded.graphs == fusewire.report().graphs
    (graph,) = loaded.graphs
    assert (graph.cached, graph.uses, graph.entries) == (True, 3, kept.entries)
    assert fusewire.report().fused == 3 * LAYERS
    fusewire.save_report(file, [])
    assert fusewire.load_report(file).graphs == ()


def test_a_report_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        fusewire.load_report(tmp_path / "none")
    for text in ("{", "[{}]", '{"graphs": 1}', "3"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ConfigError, match="holds no report that this version of fusewire has written"):
            fusewire.load_report(tmp_path / "other")
    assert fusewire.report().graphs == ()
