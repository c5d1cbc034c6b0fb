"""Arithmetic that must stay where it is, arguments of the wrong kind, and what must not cost a fusion or a compilation."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import fusewire
from fusewire import PassConfig
from fusewire.errors import ConfigError, NoProviderError
from fusewire.fusion_passes import registry
from fusewire.fusion_passes.analysis.graph import sort_topologically
from fusewire.patterns.collectives import ALL_REDUCE, WAIT

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.distributed import shared_pool
from support.graphs import capture


@pytest.fixture(autouse=True)
def _world(fake_world):
    passes = list(registry._PASSES)
    yield
    registry._PASSES[:] = passes


def norm_after(x, r, w):
    return NORMS["L"](r + reduce_functional(x), w, 1e-5)


def verdict(fn, *inputs, **options):
    captured = capture(fn, *inputs, **options)
    return captured, captured.reasons()[0] if "refused" in dict(captured.verdicts()) else ""


# Scales and addends


def test_a_scale_that_changes_the_dtype_stays():
    """The accumulators of an int8 model: to scale before the all-reduce is to add what float32 cannot hold."""
    x = torch.arange(6 * HIDDEN, dtype=torch.int32).reshape(6, HIDDEN) + 2**30

    def block(x):
        return F.rms_norm(reduce_functional(x) * 0.5, (HIDDEN,), None, 1e-5)

    captured, reason = verdict(block, x)
    assert "a scale between the all-reduce and the norm makes torch.float32 of torch.int32" in reason
    assert torch.equal(captured.result, block(x))


SCALED = {
    "above one": (lambda s, c: s * 64.0, False),
    "below one": (lambda s, c: s * 0.25, True),
    "divided": (lambda s, c: s / 4, True),
    "divided by less than one": (lambda s, c: s / 0.25, False),
    "negative": (lambda s, c: -s, True),
    "a tensor": (lambda s, c: s * c, False),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", SCALED)
def test_scales_in_float16_that_could_overflow_stay(kind, dtype):
    scaled, may_move = SCALED[kind]
    x, r, w = tensors(dtype)
    c = torch.full((), 0.5, dtype=dtype)

    def block(x, r, w, c):
        return NORMS["L"](r + scaled(reduce_functional(x), c), w, 1e-5)

    captured, reason = verdict(block, x, r, w, c)
    if may_move or dtype == torch.bfloat16:
        assert reason == ""
        torch.testing.assert_close(captured.result, block(x, r, w, c), rtol=0.02, atol=0.02)
    else:
        assert "more than float16 holds" in reason
        assert torch.equal(captured.result, block(x, r, w, c))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sums_in_float16_do_not_merge(dtype):
    x, r, w = tensors(dtype)

    def block(x, r, w):
        return NORMS["L"](r + (reduce_functional(x) + reduce_functional(x * 0.5)), w, 1e-5)

    captured = capture(block, x, r, w)
    assert sum(str(node.target) == str(ALL_REDUCE) for node in captured.graph.nodes) == (dtype == torch.float16)
    assert sum(entry.fusion.startswith("merged") for entry in captured.graph_reports[0].entries) == (
        dtype != torch.float16
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_tensor_before_the_residual_stays_in_float16(dtype):
    x, r, w = tensors(dtype)

    def block(x, r, w):
        return NORMS["L"](r + (reduce_functional(x) + r.flip(0)), w, 1e-5)

    _, reason = verdict(block, x, r, w)
    assert ("more than float16 holds" in reason) == (dtype == torch.float16)


class Scaled(torch.nn.Module):
    """Granite's residual multiplier, and an epsilon below a plain root."""

    def __init__(self):
        super().__init__()
        self.residual_multiplier, self.eps = 0.22, 1e-5

    def forward(self, x, r, w):
        return NORMS["L"](r + reduce_functional(x) * self.residual_multiplier, w, self.eps)


def test_a_modules_multiplier_stays_a_number_under_dynamic():
    captured, reason = verdict(Scaled(), *tensors(), dynamic=True)
    assert reason == ""
    assert captured.verdicts() == [("fused", "")]


# Residuals and tokens


def test_tokens_that_depend_on_data_are_not_sharded():
    x, _, w = tensors(torch.float32)

    def block(x, chosen, w):
        r = x = x[torch.nonzero(chosen).squeeze(-1)]
        for _ in range(3):
            r = r + reduce_functional(torch.tanh(x))
            x = NORMS["L"](r, w, 1e-5)
        return x

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(block, x, torch.arange(len(x)) % 3, w, shard_residual=True)
    assert captured.verdicts() == [("fused", "")] * 3
    assert any("the number of tokens depends on data" in note for note in captured.graph_reports[0].notes)


def test_a_size_of_the_collective_is_no_reader():
    """Under dynamic=True views are given sizes, which may be asked of the all-reduce itself."""
    x, r, w = tensors(torch.float32)

    def asks(graph, _):
        (reduced,) = graph.find_nodes(op="call_function", target=ALL_REDUCE)
        (wait,) = reduced.users
        with graph.inserting_after(wait):
            size = graph.call_function(torch.ops.aten.sym_size.int, (reduced, 0))
        size.meta["val"] = reduced.meta["val"].shape[0]
        (taken,) = graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
        size.append(taken)
        taken.args = ([size], *taken.args[1:])

    fusewire.register_pass("asks", asks, before="eliminate_noops", source="1")
    captured = capture(lambda x, r, w: (norm_after(x, r, w), torch.full((3,), 2.0)), x, r, w, dynamic=True)
    assert captured.verdicts() == [("fused", "")]
    assert captured.result[1].shape == (len(x),)


# Writes in place keep their place


def test_a_write_of_what_was_moved_still_happens():
    """A cache that takes the sum: the write is the graph's last, and its value is computed from what is moved."""
    x, w = torch.randn(1, HIDDEN), torch.rand(HIDDEN)
    index = torch.tensor([2])

    def block(x, w, cache, index):
        reduced = (x @ x.t() @ x).clone()
        dist.all_reduce(reduced)  # in place: what views it is computed again from the sum
        total = reduced.unsqueeze(0).view(1, HIDDEN)
        normed = NORMS["L"](total, w, 1e-5)
        cache.index_copy_(0, index, total.reshape(-1, HIDDEN))
        out = cache.sum(0)
        x.mul_(0.5)
        return out, total, normed

    last = []  # before Inductor's own passes, which may write in place instead
    fusewire.register_pass("see", lambda graph, _: last.append(list(graph.nodes)[-1].op), after="lower_ops", source="1")
    want = [x.clone(), w, torch.ones(5, HIDDEN), index]
    expected = [*block(*want), *want]
    given = [x.clone(), w, torch.ones(5, HIDDEN), index]
    captured = capture(block, *given)
    assert captured.verdicts() == [("fused", "")]
    for got, wanted in zip([*captured.result, *given], expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert last == ["output"]


def _graph_of(*steps):
    """A graph of calls: (target, positions of the nodes it takes); the last but one is returned."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x")]
    for target, sources in steps:
        nodes.append(graph.call_function(target, tuple(nodes[i] for i in sources)))
    graph.output(nodes[-1])
    return graph, nodes


SIN, RELU, COPY_ = torch.ops.aten.sin.default, torch.ops.aten.relu.default, torch.ops.aten.copy_.default
ADD = torch.ops.aten.add.Tensor


def test_nodes_move_behind_what_they_use_and_no_further():
    graph, (_, sin, relu, both, last) = _graph_of((SIN, [0]), (RELU, [0]), (ADD, [1, 2]), (SIN, [0]))
    both.append(sin)
    sort_topologically(graph)
    assert [node for node in graph.nodes if node.op == "call_function"] == [relu, sin, both, last]
    graph.lint()
    before = list(graph.nodes)
    sort_topologically(graph)
    assert list(graph.nodes) == before


def test_nothing_changes_places_with_a_write():
    graph, (_, sin, _, _, last) = _graph_of((SIN, [0]), (RELU, [1]), (COPY_, [0, 0]), (SIN, [0]))
    last.append(sin)  # what is read before the write now needs what stands behind it
    with pytest.raises(RuntimeError, match="would have to change places with copy_"):
        sort_topologically(graph)


# Users' passes, dumps, disabled passes, expectations

_LIB = torch.library.Library("hardening", "FRAGMENT")
_LIB.define("reduce(Tensor x) -> Tensor")
_LIB.impl("reduce", lambda x: x.clone(), "CPU")
torch.library.register_fake("hardening::reduce", torch.empty_like, lib=_LIB)


def _translate(graph, config):
    for node in list(graph.nodes):
        if node.target is torch.ops.hardening.reduce.default:
            with graph.inserting_before(node):
                reduced = graph.call_function(ALL_REDUCE, (node.args[0], "sum", dist.group.WORLD.group_name))
                waited = graph.call_function(WAIT, (reduced,))
            reduced.meta["val"] = waited.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(waited)
            graph.erase_node(node)


def _remove(graph, config):
    for node in list(graph.nodes):
        if node.target is WAIT:
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.target is ALL_REDUCE:
            graph.erase_node(node)


def test_what_a_first_pass_makes_of_the_graph_is_judged():
    fusewire.register_pass("translate", _translate, before="eliminate_noops", source="1")

    def block(x, r, w):
        return NORMS["L"](r + torch.ops.hardening.reduce(x), w, 1e-5)

    captured = capture(block, *tensors())
    assert captured.verdicts() == [("fused", "")]
    assert torch.equal(captured.result, block(*tensors()))


@pytest.mark.parametrize("place", ["eliminate_noops", "fuse_all_reduce"])
def test_a_pass_that_takes_an_all_reduce_away(place):
    fusewire.register_pass("remove", _remove, before=place, source="1")
    captured = capture(lambda x, r, w: (reduce_functional(x) * 2, r * w), *tensors())
    assert captured.verdicts() == ([] if place == "eliminate_noops" else [("refused", "match")])
    assert torch.equal(captured.result[0], tensors()[0] * 2)


def test_a_dump_that_cannot_be_written_costs_nothing():
    with tempfile.NamedTemporaryFile() as file:
        captured = capture(norm_after, *tensors(), dump_graphs=file.name)
    assert captured.verdicts() == [("fused", "")]
    (note,) = captured.graph_reports[0].notes
    assert note.startswith(f"dump_graphs: graphs are missing in {file.name}")


@pytest.mark.parametrize("name", ["raise_ops", "fuse_all_reduce"])
def test_a_disabled_pass_is_the_reason(name):
    captured, reason = verdict(norm_after, *tensors(), disabled_passes=[name])
    assert reason == f"disabled_passes switches {name} off"
    assert str(captured.graph) == captured.before[0] or name == "fuse_all_reduce"


def test_an_expectation_of_a_graph_for_training_is_not_met():
    x, r, w = tensors(torch.float32)
    function = torch.compile(norm_after, backend="fusewire", options={"expect_fused": "all"})
    with pytest.raises(Exception, match="run the model under torch"):
        function(x, r, w.clone().requires_grad_())


def _forced():
    x, r, w = tensors(torch.float32)
    torch._dynamo.reset()
    options = {"ir_op_priority": {"all_reduce_rms_norm": ("flashinfer",)}}
    try:
        with torch.no_grad():
            torch.compile(norm_after_world, backend="fusewire", options=options)(x, r, w)
    except NoProviderError as error:
        return str(error)
    return ""


def norm_after_world(x, r, w):
    return NORMS["L"](r + functional.all_reduce(x, "sum", dist.group.WORLD), w, 1e-5)


def test_a_forced_provider_that_cannot_serve_is_an_error():
    for said in shared_pool(2).run(_forced):
        assert "no provider of fusewire::all_reduce_rms_norm can serve this call" in said
        assert "flashinfer: " in said


# Arguments of another kind


def _graph():
    return capture(norm_after, *tensors()).graph


def _dynamo_graph():
    seen = []
    torch._dynamo.reset()
    torch.compile(norm_after, backend=lambda model, _: seen.append(model) or model.forward)(*tensors())
    return seen[0].graph


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fusewire.enable({"expect_fused": "all"}).__enter__(), "fields as keywords, not dict"),
        (lambda: fusewire.run_passes(_graph().owning_module), "give its .graph"),
        (lambda: fusewire.run_passes(_graph(), {"expect_fused": "all"}), r"not dict: PassConfig\(\*\*options\)"),
        (lambda: fusewire.run_passes(_dynamo_graph()), "this is one as Dynamo captures it"),
        (lambda: PassConfig(disabled_passes=[3]), "must be a list of names"),
        (lambda: fusewire.prepare(None, "64", torch.float32, max_tokens=4), "hidden='64'"),
        (lambda: fusewire.prepare(None, 64, "float32", max_tokens=4), "dtype a torch.dtype"),
        (lambda: fusewire.prepare(None, 64, torch.float32, max_tokens=True), "max_tokens=True"),
    ],
    ids=["enable", "module", "dict", "dynamo", "pass", "hidden", "dtype", "tokens"],
)
def test_wrong_kinds_of_arguments(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


@pytest.mark.parametrize(("options", "says"), [({3: 4}, "names of options are strings"), ([1], "must be a mapping")])
def test_wrong_options(options, says):
    with pytest.raises((BackendCompilerFailed, ConfigError, RuntimeError, TypeError), match=says):
        fusewire.fusion_passes.backend.fusewire_backend(_dynamo_graph().owning_module, [], options=options)


def test_a_configuration_as_options():
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(norm_after, backend="fusewire", options=PassConfig(inline_native=False))(*tensors())
    assert fusewire.report().fused == 1


@pytest.mark.parametrize(("redirect", "status"), [(">&-", 0), ("> /dev/full", 1)])
def test_output_that_cannot_be_written(redirect, status):
    command = f"{sys.executable} -m fusewire doctor {redirect}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode == status
