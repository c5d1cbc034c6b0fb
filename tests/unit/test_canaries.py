"""One canary for each private part of PyTorch that fusewire relies on, and for public parts whose details it
relies on.

A canary that fails names, in its docstring, what to change in fusewire.
`test_every_private_name_has_a_canary` reads our sources and fails when they use a private name that no canary
here watches.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import pickle
import re
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass, pattern_matcher
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.compiler._cache import CacheArtifactManager
from torch.fx.experimental.proxy_tensor import make_fx
from torch.torch_version import TorchVersion

import fusewire
from fusewire.custom_ops.coordination import timeouts
from fusewire.fusion_passes import backend
from fusewire.fusion_passes.analysis import graph as graph_tools
from fusewire.fusion_passes.compiler import dynamo
from fusewire.fusion_passes.compiler import inductor as matcher
from fusewire.fusion_passes.compiler.cache_artifact import GraphReportArtifact
from fusewire.patterns import collectives as spellings

from support.blocks import tensors
from support.distributed import fake_group
from support.graphs import capture

aten, prims, c10d = torch.ops.aten, torch.ops.prims, torch.ops._c10d_functional
WATCHED = set()
FOLDERS = ("custom_ops", "patterns", "fusion_passes", "fusewire")


def canary(*names):
    """Mark a test as the one that watches these private names (dotted if they are reached from torch)."""
    WATCHED.update(names)
    return lambda test: test


def graph_of(*calls, placeholders=1):
    """A graph of calls (target, args), where an int argument i in a one-element list means node i."""
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(placeholders)]
    for target, args in calls:
        resolved = tuple(nodes[a[0]] if isinstance(a, list) else a for a in args)
        nodes.append(graph.call_function(target, resolved))
    graph.output(nodes[-1])
    for node in nodes:
        node.meta["val"] = torch.empty(2)
    return graph


# fusion_passes/compiler/inductor.py: the pattern matcher, fake values, copies of graphs


def _matched(pattern, graph, check=lambda match: True):
    found = []
    matches = pattern_matcher.PatternMatcherPass(pass_name="canary")

    def handler(match, **captures):
        found.append((captures, match.kwargs, match.output_node(), list(match.nodes)))
        root = match.output_node()
        root.replace_all_uses_with(match.nodes[0].args[0])
        graph.erase_node(root)

    pattern_matcher.register_graph_pattern(pattern, extra_check=check, pass_dict=matches)(handler)
    if graph.owning_module is None:
        torch.fx.GraphModule(torch.nn.Module(), graph)
    count = matches.apply(graph)
    assert count == len(found)
    return found


def _sin_clamp(users=1):
    inner = pattern_matcher.CallFunction(aten.sin.default, pattern_matcher.KeywordArg("x"), _users=users)
    return pattern_matcher.CallFunction(
        aten.clamp.default,
        inner,
        pattern_matcher.KeywordArg("low"),
        pattern_matcher.KeywordArg("high"),
        _users=1,
    )


@canary("torch._inductor.pattern_matcher")
def test_pattern_matcher_captures_nodes_numbers_and_none():
    """FusionMatcher and _tree in compiler/inductor.py: captures by keyword, root and nodes of a match, the count that
    apply returns."""
    graph = graph_of((aten.sin.default, ([0],)), (aten.clamp.default, ([1], None, 2.5)))
    x, sin, clamp, _ = graph.nodes
    ((captures, kwargs, root, nodes),) = _matched(_sin_clamp(), graph)
    assert captures == kwargs == {"x": x, "low": None, "high": 2.5}
    assert root is clamp
    assert set(nodes) == {sin, clamp}


def test_pattern_matcher_extra_check_leaves_the_graph():
    """FusionMatcher.add in compiler/inductor.py: a check that says no must keep the handler from being called,
    and the graph as it was."""
    graph = graph_of((aten.sin.default, ([0],)), (aten.clamp.default, ([1], None, 2.5)))
    before = str(graph)
    seen = []
    assert _matched(_sin_clamp(), graph, lambda match: seen.append(dict(match.kwargs)) or False) == []
    assert len(seen) == 1
    assert str(graph) == before


@pytest.mark.parametrize(("users", "count"), [(1, 0), (pattern_matcher.MULTIPLE, 1)])
def test_pattern_matcher_users_of_inner_nodes(users, count):
    """_tree in compiler/inductor.py: `_users=1` refuses inner nodes read elsewhere, MULTIPLE (patterns.fusions'
    `shared`) takes them."""
    graph = graph_of((aten.sin.default, ([0],)), (aten.clamp.default, ([1], None, 2.5)))
    sin, clamp = list(graph.nodes)[1:3]
    with graph.inserting_after(clamp):
        graph.call_function(aten.relu.default, (sin,)).meta["val"] = torch.empty(2)
    assert len(_matched(_sin_clamp(users), graph)) == count


@canary("torch.fx.experimental.symbolic_shapes.statically_known_true")
def test_sizes_that_guards_make_equal_are_known_to_be():
    """known_equal in compiler/inductor.py: what was guarded is known, what was not stays open, and asking adds no guard."""
    found = []

    def backend(model, given):
        values = {node.name: node.meta["example_value"] for node in model.graph.nodes if "example_value" in node.meta}
        x = next(value for value in values.values() if isinstance(value, torch.Tensor))
        twice = next(value for name, value in values.items() if name.startswith(("cat", "twice")))
        assert str(twice.shape[0]) != str(x.shape[0])
        guards = len(x.shape[0].node.shape_env.guards)
        found.extend(matcher.known_equal(x.shape[0], size) for size in (twice.shape[0], x.shape[1]))
        assert len(x.shape[0].node.shape_env.guards) == guards
        return model.forward

    def block(x):
        half = x[: x.shape[0] // 2]
        twice = torch.cat([half, half])
        return twice + x

    torch._dynamo.reset()
    torch.compile(block, backend=backend, dynamic=True)(torch.ones(6, 4))
    assert found == [True, False]


@canary("torch._ops.HigherOrderOperator")
def test_a_users_triton_kernel_is_known_to_write():
    """writes_in_place in graph_tools.py."""
    from torch._higher_order_ops.triton_kernel_wrap import (
        triton_kernel_wrapper_functional,
        triton_kernel_wrapper_mutation,
    )

    graph = torch.fx.Graph()
    written = graph.call_function(triton_kernel_wrapper_mutation)
    functional = graph.call_function(triton_kernel_wrapper_functional)
    assert graph_tools.writes_in_place(written)
    assert not graph_tools.writes_in_place(functional)


@canary("_codegen", "_owning_module", "_root", "_tracer_cls", "_tracer_extras")
def test_graphs_that_exchange_their_nodes():
    """exchange_nodes in compiler/inductor.py: a graph is its attributes, and each node knows its graph."""
    one, other = graph_of((torch.relu, ([0],))), graph_of((torch.sin, ([0],)), (torch.cos, ([1],)))
    one.output(list(one.nodes)[-1])
    other.output(list(other.nodes)[-1])
    module = torch.fx.GraphModule(torch.nn.Module(), one)
    graph = module.graph
    names = [node.name for node in graph.nodes], [node.name for node in other.nodes]
    x = torch.ones(2)
    matcher.exchange_nodes(graph, other)
    assert ([node.name for node in other.nodes], [node.name for node in graph.nodes]) == names
    assert all(node.graph is graph for node in graph.nodes)
    assert graph.owning_module is module
    graph.lint()
    module.recompile()
    assert torch.equal(module(x), x.sin().cos())
    added = graph.call_function(torch.tan, (next(iter(graph.nodes)),))
    assert added in graph.find_nodes(op="call_function", target=torch.tan)
    assert not other.find_nodes(op="call_function", target=torch.sin)


@canary("_device_types", "_get_backend", "_timeout")
def test_the_time_limit_of_a_group():
    """collective_timeouts_s in custom_ops/_torch_private.py: without it a group's own limit is not heard of."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    try:
        assert timeouts.group_timeout_s(dist.group.WORLD) == 7.0
    finally:
        dist.destroy_process_group()


@canary("torch.compiler._cache")
def test_what_a_portable_cache_takes_along(tmp_path, monkeypatch):
    """GraphReportArtifact in cache_artifact.py: a kind of artifact of our own, by name, as bytes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with CacheArtifactManager.with_fresh_cache():
        CacheArtifactManager.record_artifact(GraphReportArtifact.type(), "name.json", b"{}")
        data, _ = torch.compiler.save_cache_artifacts()
    with CacheArtifactManager.with_fresh_cache():
        torch.compiler.load_cache_artifacts(data)
    assert (tmp_path / "fusewire" / "name.json").read_bytes() == b"{}"


@canary("torch._dynamo.exc.RestartAnalysis")
def test_what_makes_dynamo_capture_again_is_no_failure():
    """_compilation in backend.py tells the peers of a compilation that fails; this is none."""
    assert issubclass(torch._dynamo.exc.TensorifyScalarRestartAnalysis, torch._dynamo.exc.RestartAnalysis)
    assert issubclass(torch._dynamo.exc.RestartAnalysis, Exception)


@canary("torch._inductor.decomposition.select_decomp_table", "torch.fx.experimental.proxy_tensor.make_fx")
def test_tracing_native_gives_post_grad_operators():
    """trace in compiler/inductor.py, _copy_in in lower_ops.py: make_fx with Inductor's decompositions gives primitive
    operators with values; the casts among them must be in graph_tools.CASTS."""
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(value) for value in tensors()]
    graph = matcher.trace(lambda x, r, w: torch.nn.functional.rms_norm(x, (64,), w, 1e-5), values[:3]).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert {node.target for node in calls} >= {aten.rsqrt.default, aten.mean.dim}
    assert any(node.target in graph_tools.CASTS for node in calls)
    assert all(isinstance(node.meta["val"], FakeTensor) for node in calls)
    assert not any("rms_norm" in str(node.target) for node in calls)


@canary("torch._inductor.lowering", "torch._library.utils.get_layout_constraint_tag", "torch._inductor.virtualized.V")
@pytest.mark.parametrize("kept", [False, True])
def test_outputs_of_an_operator_can_be_kept_from_reuse(kept):
    """never_reuse_outputs in compiler/inductor.py: an operator's lowering made as Inductor makes it, and a buffer's name in
    `never_reuse_buffers`, which takes it out of memory planning."""
    library = torch.library.Library("fusewire_canary", "FRAGMENT")
    name = f"pair_{kept}"
    library.define(f"{name}(Tensor x, str policy) -> (Tensor, Tensor)")
    library.impl(name, lambda x, policy: (x + 1, x + 2), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusewire_canary::{name}", lambda x, policy: (x + 1, x + 2), lib=library)
    op = getattr(torch.ops.fusewire_canary, name).default
    if kept:
        matcher.never_reuse_outputs(op, lambda args: args[-1] == "keep")

    def fn(x):
        a, b = op(x, "keep")
        made = [a @ b]
        for _ in range(3):  # all of them kept to the end, so that each takes memory that something is done with
            made.append((made[-1] @ x).sin() @ x)
        return made

    aligned = mock.patch("torch._inductor.graph.should_assume_input_aligned", return_value=True)
    with aligned, inductor_config.patch(force_disable_caches=True), torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(fn), torch.ones(16, 16))
    outputs = set(re.findall(r"(\w+) = buf0\[\d\]", code))
    reused = {line.split("=")[1].split(";")[0].strip() for line in code.splitlines() if "# reuse" in line}
    assert len(outputs) == 2
    assert bool(outputs & reused) is not kept


@canary(
    "torch._library.autograd.make_autograd_impl",
    "torch._C._after_autograd_keyset",
    "torch._C.DispatchKey",
    "_backward_fn",
    "_setup_context_fn",
)
def test_kernels_of_autograd_see_what_is_left_to_dispatch_to():
    """autograd_kernel in custom_ops/_torch_private.py: the highest key after autograd's is the backend's for plain
    tensors, and another one under a tracing mode; make_autograd_impl takes an object with two functions."""
    seen = []
    library = torch.library.Library("fusewire_canary_keys", "FRAGMENT")
    library.define("same(Tensor x) -> Tensor")
    library.impl("same", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("fusewire_canary_keys::same", torch.empty_like, lib=library)
    op = torch.ops.fusewire_canary_keys.same.default
    formula = SimpleNamespace(_backward_fn=lambda ctx, grad: grad * 3, _setup_context_fn=None)
    with_gradient = torch._library.autograd.make_autograd_impl(op, formula)

    def autograd(keys, x):
        seen.append((keys & torch._C._after_autograd_keyset).highestPriorityTypeId())
        return with_gradient(keys, x)

    library.impl("same", autograd, "Autograd", with_keyset=True)
    x = torch.ones(2, requires_grad=True)
    op(x).sum().backward()
    assert x.grad.tolist() == [3, 3]
    with FakeTensorMode(allow_non_fake_inputs=True):
        op(torch.ones(2))
    assert seen == [torch._C.DispatchKey.CPU, torch._C.DispatchKey.Python]


@canary("torch._guards.TracingContext.try_get")
def test_names_of_graphs_tell_training_from_inference():
    """graph_kind in compiler/dynamo.py reads the tracing context's aot_graph_name, whose last part ends in what the
    graph is."""
    kinds = []

    def compiler(graph_module, inputs):
        kinds.append((torch._guards.TracingContext.try_get().aot_graph_name[-1], dynamo.graph_kind()))
        return make_boxed_func(graph_module.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler)
    function = torch.compile(lambda x: x.sin().sin(), backend=backend)
    with torch.no_grad():
        function(torch.ones(2))
    function(torch.ones(2, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    names, said = zip(*kinds, strict=True)
    assert said == ("inference", "training", "training")
    assert [name.rstrip("_0123456789").rsplit("_", 1)[-1] for name in names] == [
        "inference",
        "forward",
        "backward",
    ]
    assert dynamo.graph_kind() == "inference"  # no context, as in run_passes on a graph by hand


# fusion_passes/compiler/{compile_fx,compile_cache,dynamo}.py: Inductor's entry points


@canary("torch._inductor.config")
def test_inductors_configuration():
    """option_type, option_names and with_custom_passes in compiler/compile_fx.py: types of options by name, nested ones and
    aliases among them, KeyError for others; a copy of all options; patching."""
    assert inductor_config.get_type("max_autotune") is bool
    assert inductor_config.get_type("triton.cudagraphs") is bool
    assert inductor_config.get_type("force_disable_caches") is bool  # stands for torch.compiler.config's
    for name in ("max_autotun", "os", "triton"):
        with pytest.raises(KeyError):
            inductor_config.get_type(name)
    assert {"max_autotune", "triton.cudagraphs"} <= set(inductor_config.get_config_copy())
    assert inductor_config.post_grad_custom_post_pass is None
    with inductor_config.patch({"triton.cudagraphs": True}):
        assert inductor_config.triton.cudagraphs


@canary("torch._functorch.config.patch")
def test_switches_of_the_compile_caches():
    """switched_off in compiler/compile_cache.py: the explain command switches all four caches off, so that
    there is something to explain."""
    with inductor_config.patch({"fx_graph_cache": False, "fx_graph_remote_cache": False}):
        assert inductor_config.fx_graph_cache is False
    with torch._functorch.config.patch({"enable_autograd_cache": False, "enable_remote_autograd_cache": False}):
        assert torch._functorch.config.enable_autograd_cache is False
    assert torch._functorch.config.enable_autograd_cache is True


class _Pass(CustomGraphPass):
    def __init__(self, key):
        self.key = key
        self.graphs, self.asked = [], 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph):
        self.graphs.append(graph)

    def uuid(self):
        self.asked += 1
        return self.key


@canary("torch._inductor.custom_graph_pass", "torch._inductor.compile_fx.compile_fx")
@pytest.mark.parametrize("key", ["key", None])
def test_compile_fx_takes_a_custom_pass_as_a_patch(key):
    """compile_graph in compiler/compile_fx.py and the two pass classes in backend.py: compile_fx(model, inputs,
    config_patches=...) calls the hook with the graph alone, asks for its uuid, and does not cache without one."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_cache

    hook = _Pass(key)
    counters.clear()
    patches = {"post_grad_custom_post_pass": hook}
    with fresh_cache(), torch.no_grad():
        function = torch.compile(
            lambda x: x @ x, backend=lambda model, inputs: compile_fx(model, inputs, config_patches=patches)
        )
        function(torch.ones(3, 3))
    torch._dynamo.reset()
    (graph,) = hook.graphs
    assert isinstance(graph, torch.fx.Graph)
    assert hook.asked > 0
    assert counters["inductor"]["fxgraph_cache_miss" if key else "fxgraph_cache_bypass"] == 1


def test_custom_pass_is_left_out_of_the_pickled_configuration():
    """FusewirePass in backend.py enters the cache's key by its uuid alone; pickled with the configuration it
    would enter a second time, by its attributes, and would have to be picklable."""
    with inductor_config.patch(post_grad_custom_post_pass=_Pass("key")):
        saved = inductor_config.save_config_portable(ignore_private_configs=False)
    assert "post_grad_custom_post_pass" not in saved
    chosen = fusewire.PassConfig(expect_fused=1)
    for copied in (copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
        assert copied == chosen


def test_inference_aware_passes_and_lists_of_passes_come_together():
    """ChainedPass in backend.py gives CustomInferenceAwareGraphPass its second argument; chained_hook takes
    lists."""
    aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)
    assert (aware is None) == (not hasattr(custom_graph_pass, "get_custom_graph_passes"))
    if aware is not None:
        assert issubclass(aware, CustomGraphPass)
        assert list(inspect.signature(aware.__call__).parameters) == ["self", "graph", "is_inference"]


@canary("torch._inductor.cudagraph_trees")
def test_resetting_dynamo_resets_backends(monkeypatch):
    """free_cuda_graphs in compiler/compile_fx.py: torch._dynamo.reset() calls a backend's `reset`, and the
    function that frees CUDA graphs."""
    called = []
    monkeypatch.setattr(backend.fusewire_backend, "reset", lambda: called.append(1))
    torch.compile(lambda x: x + 1, backend="fusewire")(torch.ones(1))
    torch._dynamo.reset()
    assert called
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert list(inspect.signature(trees.reset_cudagraph_trees).parameters) == []


@canary("torch._inductor.list_mode_options")
def test_options_of_modes():
    """options_of_mode in compiler/compile_fx.py."""
    assert torch._inductor.list_mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    assert torch._inductor.list_mode_options("max-autotune")["max_autotune"] is True
    with pytest.raises(RuntimeError):
        torch._inductor.list_mode_options("quick")


@canary("torch._inductor.runtime.cache_dir_utils.cache_dir")
def test_cache_directory(monkeypatch, tmp_path):
    """cache_folder in compiler/cache_artifact.py lies in Inductor's cache directory, which follows the environment
    at any time."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert cache_dir() == str(tmp_path)


@canary("torch.utils._python_dispatch._disable_current_modes")
def test_real_tensors_while_a_graph_is_traced():
    """compiler.eager.call_now: no mode makes fake tensors of real ones, or traces what is called."""
    from fusewire.fusion_passes.compiler.eager import call_now

    def function(x):
        sums.append(call_now(lambda: float(torch.ones(3).sum())))
        return x + 1

    sums = []
    traced = make_fx(function, tracing_mode="fake")(torch.zeros(2))
    assert sums == [3.0]
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [aten.add.Tensor]


@canary("torch._dynamo.utils.counters", "torch._dynamo.config.patch")
def test_dynamos_counters_and_switch():
    """hits in compiler/compile_cache.py (the counts themselves: test_cache.py); graph_breaks and
    floats_as_numbers in compiler/dynamo.py."""
    from torch._dynamo.utils import counters

    assert counters["inductor"]["no such count"] == 0
    counters["graph_break"].clear()
    torch.compile(lambda x: torch._dynamo.graph_break() or x + 1, backend="eager")(torch.ones(2))
    torch._dynamo.reset()
    assert sum(counters["graph_break"].values()) == 1
    assert torch._dynamo.config.specialize_float is False
    with torch._dynamo.config.patch(specialize_float=True):
        assert torch._dynamo.config.specialize_float is True


@canary(
    "torch._dynamo.exc.TensorifyScalarRestartAnalysis",
    "torch._dynamo.symbolic_convert.TensorifyState",
    "_expr",
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
    "torch._dynamo.config.recompile_limit",
)
def test_restart_that_makes_a_float_input_a_number():
    """float_inputs, steady_attributes, capture_again_with_numbers and forget_numbers in
    compiler/dynamo.py: under dynamic=True a float is a 0-d input whose item has a symbol's name,
    with its value and the module in its source. A backend that raises
    TensorifyScalarRestartAnalysis after TensorifyState.specialize(name) is called again with a
    number. The name stays until TensorifyState.clear().
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import InstructionTranslator, TensorifyState

    calls, codes = [], []

    def backend(model, inputs):
        found = []
        for node in model.graph.nodes:
            memo = getattr(node.meta.get("example_value"), "item_memo", None)
            if node.op == "placeholder" and memo is not None:
                found.append(memo.node._expr.name)
                argument = node.meta["grapharg"]
                assert float(argument.example) == 2.5
                assert (type(argument.source.base).__name__, argument.source.name) == (
                    "UnspecializedNNModuleSource",
                    "L['self'].factor",
                )
        calls.append(found)
        codes.append(InstructionTranslator.current_tx().f_code)
        for name in found:
            assert not TensorifyState.should_specialize(name)
            TensorifyState.specialize(name)
            assert TensorifyState.should_specialize(name)
        if found:
            raise TensorifyScalarRestartAnalysis
        return model.forward

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 2.5

        def forward(self, x):
            return x * self.factor

    assert torch.equal(torch.compile(Scaled(), backend=backend, dynamic=True)(torch.ones(2)), torch.full((2,), 2.5))
    assert TensorifyState.should_specialize(calls[0][0])
    TensorifyState.clear()
    assert not TensorifyState.should_specialize(calls[0][0])
    assert codes == [Scaled.forward.__code__] * 2
    assert torch._dynamo.config.recompile_limit == 8
    torch._dynamo.reset()
    (first, second) = calls
    assert len(first) == 1
    assert second == []


# custom_ops/_torch_private.py: the groups of a process


@canary("torch.distributed.distributed_c10d._world")
def test_known_groups(fake_world):
    """process_groups: each enters the compile cache's key, with name and size, and is told of a
    rank that does not compile."""
    pair = dist.new_group([0])
    sizes = {group.group_name: group.size() for group in dist.distributed_c10d._world.pg_map}
    assert sizes == {fake_world.group_name: 2, pair.group_name: 1}


def test_copied_graphs_keep_names_and_have_metadata_of_their_own():
    """GraphRecord in compiler/inductor.py: reasons found on a copy are recorded by the names of its nodes, and
    copies show the graph as it was, also after a node's arguments, metadata or place have changed."""
    graph = graph_of((aten.sin.default, ([0],)), (aten.sin.default, ([1],)))
    first = next(iter(graph.nodes))
    graph.erase_node(graph.call_function(aten.sin.default, (first,)))  # names have gaps in real graphs
    names, text = [node.name for node in graph.nodes], str(graph)
    record = matcher.GraphRecord(graph)
    copied = record.copy()
    assert ([node.name for node in copied.nodes], str(copied)) == (names, text)
    next(iter(copied.nodes)).meta["val"] = None
    assert first.meta["val"] is not None
    _, sin, again, output = graph.nodes
    output.replace_input_with(again, sin)
    graph.erase_node(again)
    first.meta.clear()
    with graph.inserting_before(sin):
        graph.call_function(aten.cos.default, (first,))
    copied = record.copy()
    assert ([node.name for node in copied.nodes], str(copied)) == (names, text)
    assert all("val" in node.meta for node in copied.nodes if node.op != "output")
    assert copied.owning_module is not None


@pytest.mark.parametrize("contiguous", [False, True])
def test_fresh_fakes_of_symbolic_sizes(contiguous):
    """fresh_fake in compiler/inductor.py: metadata as a factory function gives it, a storage of its own, no guards."""

    def fn(x):
        return x + 1, (x * 2).transpose(1, 2) + 1

    graph = capture(fn, torch.ones(2, 6, 4), dynamic=True).graph
    values = [node.meta["val"] for node in graph.nodes if node.op == "call_function"]
    guards = values[0].fake_mode.shape_env.guards
    before = len(guards)
    for value in values:
        fresh = matcher.fresh_fake(value, contiguous=contiguous)
        with value.fake_mode:
            strides = torch.empty(value.shape).stride() if contiguous else value.stride()
        assert str((fresh.shape, fresh.stride(), fresh.dtype, fresh.device)) == str(
            (value.shape, strides, value.dtype, value.device)
        )
        assert fresh.untyped_storage()._cdata != value.untyped_storage()._cdata
        sizes = [tensor.untyped_storage().nbytes().node.expr for tensor in (fresh, value)]
        assert (sizes[0] - sizes[1]).expand() == 0
    assert len(guards) == before
    assert {value.is_contiguous() for value in values} == {True, False}


# fusion_passes/analysis/graph.py and passes/: nodes of graphs


@canary("_erased")
def test_erased_nodes_say_so():
    """erase_unused in graph_tools.py, norms_at in norm_reader.py and others skip nodes that are gone."""
    graph = graph_of((aten.sin.default, ([0],)))
    extra = graph.call_function(aten.cos.default, (next(iter(graph.nodes)),))
    assert extra._erased is False
    graph.erase_node(extra)
    assert extra._erased is True


def test_waits_are_impure():
    """erase_unused in graph_tools.py leaves collectives' waits alone; _drop in raise_ops.py erases those it
    has moved."""
    graph = graph_of((spellings.WAIT, ([0],)), (aten.relu.default, ([1],)))
    _, wait, relu, _ = graph.nodes
    assert wait.is_impure()
    assert not relu.is_impure()


def test_a_gather_waited_for_twice_is_refused_by_torch_itself():
    """_refused_by_torch in fuzz_check.py: up to 2.14 torch compiles this, 2.15 does not."""

    def twice(x):
        raw = c10d.all_gather_into_tensor(x * 2, 2, dist.group.WORLD.group_name)
        first, second = c10d.wait_tensor(raw), c10d.wait_tensor(raw)
        rows = c10d.reduce_scatter_tensor(torch.relu(second * 2), "sum", 2, dist.group.WORLD.group_name)
        return first, c10d.wait_tensor(rows)

    with fake_group(2):
        torch._dynamo.reset()
        refuses = TorchVersion(torch.__version__) >= (2, 15)
        told = pytest.raises(Exception, match="used before it has been defined")
        with told if refuses else contextlib.nullcontext():
            torch.compile(twice)(torch.randn(6, 16))


@canary("torch._ops.OpOverload", "_schema")
def test_schemas_of_operators():
    """positional and op_name in patterns/all_reduce.py, writes_in_place in graph_tools.py, operator_name in
    custom_ops/_torch_private.py."""
    add = aten.add.Tensor
    assert isinstance(add, torch._ops.OpOverload)
    assert add.namespace == "aten"
    assert add._schema.name == "aten::add"
    assert [(a.name, a.default_value) for a in add._schema.arguments] == [
        ("self", None),
        ("other", None),
        ("alpha", 1),
    ]
    assert not add._schema.is_mutable
    assert aten.add_.Tensor._schema.is_mutable


def test_sizes_are_symbols_with_expressions():
    """same_size in graph_tools.py compares sizes by their expressions, which adds no guard."""
    graph = capture(lambda x: (x + 1).relu(), torch.ones(6, 4), dynamic=True).graph
    before, after = (node.meta["val"].shape for node in graph.nodes if node.op == "call_function")
    assert isinstance(before[0], torch.SymInt)
    assert before[0].node.expr == after[0].node.expr
    assert before[0].node.expr != before[1].node.expr


def test_fake_tensors_know_their_mode():
    """new_call in graph_tools.py and others compute the values of new nodes under the mode of their inputs'
    values."""
    with FakeTensorMode() as mode:
        assert mode.from_tensor(torch.empty(2)).fake_mode is mode


def test_metadata_of_post_grad_nodes(fake_world):
    """report.py reads stack_trace and nn_module_stack, copy_origin in graph_tools.py hands them on,
    everything reads val."""

    class Inner(torch.nn.Module):
        def forward(self, x):
            return functional.all_reduce(x, "sum", dist.group.WORLD)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)

    (node,) = capture(Outer(), torch.ones(2)).graph.find_nodes(op="call_function", target=spellings.ALL_REDUCE)
    assert f'File "{__file__}", line ' in node.meta["stack_trace"]
    assert ", in forward" in node.meta["stack_trace"]
    paths = [path for path, _ in node.meta["nn_module_stack"].values()]
    assert paths[-1].endswith("inner")
    assert isinstance(node.meta["val"], FakeTensor)


# patterns/all_reduce.py


@canary("torch.ops._c10d_functional")
@pytest.mark.parametrize(
    ("op", "names", "mutable"),
    [
        ("all_reduce", ["input", "reduce_op", "group_name"], False),
        ("all_reduce_", ["input", "reduce_op", "group_name"], True),
        ("all_reduce_coalesced", ["inputs", "reduce_op", "group_name"], False),
        ("reduce_scatter_tensor", ["input", "reduce_op", "group_size", "group_name"], False),
        ("all_gather_into_tensor", ["input", "group_size", "group_name"], False),
        ("wait_tensor", ["tensor"], None),
    ],
)
def test_schemas_of_collectives(op, names, mutable):
    """SPELLINGS, OTHER_COLLECTIVES, ALL_REDUCE and WAIT in patterns/all_reduce.py; all_reduce_sum and
    sum_in_rank_order in custom_ops/all_reduce_norm.py."""
    schema = getattr(c10d, op).default._schema
    assert [argument.name for argument in schema.arguments] == names
    if mutable is not None:
        assert schema.is_mutable is mutable


@pytest.mark.parametrize("spelling", ["functional", "in place"])
def test_all_reduces_arrive_in_one_form(fake_world, spelling):
    """read_all_reduce in patterns/all_reduce.py: whatever the program writes, all_reduce(x, 'sum', name) and
    one wait."""

    def fn(x):
        if spelling == "functional":
            return functional.all_reduce(x, "sum", dist.group.WORLD).relu()
        x = x.clone()
        dist.all_reduce(x)
        return x.relu()

    graph = capture(fn, torch.ones(2)).graph
    (node,) = graph.find_nodes(op="call_function", target=spellings.ALL_REDUCE)
    assert node.args[1:] == ("sum", fake_world.group_name)
    (user,) = node.users
    assert user.target is spellings.WAIT


@canary("_to_copy", "_unsafe_view")
def test_casts_and_views_of_post_grad_graphs():
    """CASTS and VIEWS in graph_tools.py: how Inductor writes conversions and reshapes at our hook, and how
    plain make_fx does, whose graphs run_passes takes too."""

    def fn(x):
        return (x.to(torch.float32) * 2).reshape(-1).unsqueeze(0)

    captured = capture(fn, torch.ones(2, 3, dtype=torch.bfloat16))
    targets = {node.target for node in captured.graph.nodes if node.op == "call_function"}
    assert prims.convert_element_type.default in targets
    assert targets <= graph_tools.CASTS | graph_tools.VIEWS | graph_tools.MULS
    plain = make_fx(fn)(torch.ones(2, 3, dtype=torch.bfloat16)).graph
    targets = {node.target for node in plain.nodes if node.op == "call_function"}
    assert aten._to_copy.default in targets
    assert targets <= graph_tools.CASTS | graph_tools.VIEWS | graph_tools.MULS
    assert {aten._to_copy.default, aten._unsafe_view.default} <= graph_tools.CASTS | graph_tools.VIEWS


# custom_ops/ir.py and the operators


def test_inferred_schemas():
    """_register in ir.py writes native's schema, with one argument more, from what infer_schema returns."""

    def native(
        x: torch.Tensor, w: torch.Tensor | None, eps: float = 1e-6, form: str = "a"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    native.__annotations__ = {
        "x": torch.Tensor,
        "w": torch.Tensor | None,
        "eps": float,
        "form": str,
        "return": tuple[torch.Tensor, torch.Tensor],
    }
    schema = torch.library.infer_schema(native, mutates_args=())
    head, arrow, returns = schema.rpartition(" -> ")
    assert head.startswith("(Tensor x, Tensor? w, float eps=")
    assert head.endswith(")")
    assert (arrow, returns) == (" -> ", "(Tensor, Tensor)")
    op = fusewire.all_reduce_rms_norm.torch_op
    assert [a.name for a in op._schema.arguments][-1] == "policy"
    assert op._schema.arguments[-1].default_value == ""


@canary("torch.distributed.distributed_c10d._resolve_process_group")
def test_groups_by_name(fake_world):
    """process_group in custom_ops/_torch_private.py, also on the dispatcher's fast path."""
    assert dist.distributed_c10d._resolve_process_group(fake_world.group_name) is fake_world
    with pytest.raises(Exception, match="no such group"):
        dist.distributed_c10d._resolve_process_group("no such group")


@canary("torch._C._distributed_c10d._register_process_group", "torch._C._distributed_c10d._unregister_process_group")
def test_a_group_can_have_further_names(fake_world):
    """register_group_name in custom_ops/_torch_private.py: a name that is taken must be given up
    first."""
    from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

    resolve = dist.distributed_c10d._resolve_process_group
    _register_process_group("another name", fake_world)
    assert resolve("another name") is fake_world
    with pytest.raises(RuntimeError, match="already registered"):
        _register_process_group("another name", fake_world)
    _unregister_process_group("another name")
    with pytest.raises((RuntimeError, ValueError)):
        resolve("another name")


@canary("torch.distributed.distributed_c10d._get_process_group_store")
def test_store_of_a_group(fake_world):
    """store_of in custom_ops/_torch_private.py: the ranks vote through the group's store."""
    store = dist.distributed_c10d._get_process_group_store(fake_world)
    assert all(callable(getattr(store, name)) for name in ("set", "compare_set", "delete_key"))
    with pytest.raises(KeyError):
        dist.distributed_c10d._get_process_group_store(None)


@canary("torch._C._cuda_isCurrentStreamCapturing")
def test_capture_of_the_current_stream():
    """is_capturing in custom_ops/_torch_private.py takes nothing; torch.cuda's own function calls
    it."""
    source = inspect.getsource(torch.cuda.graphs.is_current_stream_capturing)
    assert "_cuda_isCurrentStreamCapturing()" in source


@canary("torch._C._cuda_getCurrentRawStream")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_raw_stream_of_a_device():
    """current_raw_stream in custom_ops/_torch_private.py takes a device's index."""
    assert callable(torch._C._cuda_getCurrentRawStream)


@canary("torch.distributed._symmetric_memory", "_SymmetricMemory")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
def test_symmetric_memory():
    """symmetric_buffer and map_peers in custom_ops/_torch_private.py: memory outside torch's pool, met by group."""
    from torch.distributed import _symmetric_memory as symm_mem

    assert callable(symm_mem._SymmetricMemory.empty_strided_p2p)
    assert list(inspect.signature(symm_mem.rendezvous).parameters)[:2] == ["tensor", "group"]


# custom_ops/_triton_private.py


def test_how_triton_launches_a_compiled_kernel():
    """custom_ops/_triton_private.py launches compiled kernels and computes cache keys by these names."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.compiler.compiler import CompiledKernel

    source = inspect.getsource(CompiledKernel)
    for name in ("run", "function", "packed_metadata", "__getitem__"):
        assert name in source
    assert {"launch_enter_hook", "launch_exit_hook"} <= set(dir(triton.knobs.runtime))
    assert isinstance(triton.JITFunction.cache_key, property)
    assert "warmup" in dir(triton.JITFunction)


# tests


def test_what_the_tests_themselves_use():
    """tests/graphs.py and tests/distributed.py."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert list(inspect.signature(_recursive_post_grad_passes).parameters) == ["gm", "is_inference"]
    assert {"inner_compile", "config_patches"} <= set(inspect.signature(compile_fx).parameters)
    assert issubclass(FakeStore, dist.Store)


# Completeness


def _folder(name):
    root = Path(fusewire.__file__).parent
    return root if name == "fusewire" else Path(inspect.getfile(matcher)).parents[2] / name


def _private_names(tree):
    """Private names of torch that a module uses: dotted for those reached from torch, bare for other objects'
    attributes."""
    modules = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def dotted(node):
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return modules.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if name.startswith("torch."):
                yield name
            elif not own and not name and node.attr.startswith("_") and not node.attr.startswith("__"):
                yield node.attr


PUBLIC = {"_asdict", "_exit", "_replace"}  # of Python's named tuples and os


def _is_private(name):
    parts = name.split(".")
    if len(parts) > 1 and parts[0] != "torch":
        return False
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return (hidden or name.startswith("torch.fx.experimental")) and name not in PUBLIC


def _is_watched(name):
    """A canary names it, something that it is a part of, or something in the package that it is."""
    return any(
        name == watched
        or name.startswith(f"{watched}.")
        or watched.startswith(f"{name}.")
        or ("." not in watched and watched in name.split("."))
        for watched in WATCHED
    )


def _defined(tree):
    """The names that a module defines, for its own functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_every_private_name_has_a_canary():
    """Add a canary for a name that this lists, or do without the name."""
    files = [file for folder in FOLDERS for file in sorted(_folder(folder).rglob("*.py"))]
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = {name for tree in trees.values() for name in _defined(tree)}
    used = {name: file.name for file, tree in trees.items() for name in _private_names(tree)}
    private = {name: file for name, file in used.items() if _is_private(name) and name not in own}
    assert {name: file for name, file in private.items() if not _is_watched(name)} == {}
    assert {"torch._guards.TracingContext.try_get", "_erased", "_schema"} <= set(private)  # the scan does find them


# What is read of operators and nodes of graphs, in any file: no module can stand for these.
OF_GRAPHS = ("_erased", "_schema", "_to_copy", "_unsafe_view", "torch._ops", "torch.ops._c10d_functional")
FENCES = {"custom_ops": ("_torch_private.py",), "fusion_passes": ("compiler/",), "patterns": (), "fusewire": ()}


@pytest.mark.parametrize("name", FOLDERS)
def test_private_names_lie_behind_a_fence(name):
    folder = _folder(name)
    trees = {file.relative_to(folder).as_posix(): ast.parse(file.read_text()) for file in folder.rglob("*.py")}
    own = {defined for tree in trees.values() for defined in _defined(tree)}
    private = {
        (file, used)
        for file, tree in trees.items()
        for used in _private_names(tree)
        if _is_private(used) and used not in own and (name == "custom_ops" or not used.startswith(OF_GRAPHS))
    }
    assert {(file, used) for file, used in private if not file.startswith(FENCES[name])} == set()
    assert bool(private) == bool(FENCES[name])  # the scan does find them


def test_every_canary_watches_something_that_is_used():
    """Remove a canary's name when nothing uses it any more."""
    text = "\n".join(file.read_text() for folder in FOLDERS for file in _folder(folder).rglob("*.py"))
    assert {name for name in WATCHED if name.rsplit(".", 1)[-1] not in text} == set()
