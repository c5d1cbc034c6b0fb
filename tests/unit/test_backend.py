"""The three ways in, with Inductor's real code generation: backend="fusewire", enable(), run_passes(); and
users' passes.

Generating and compiling C++ costs seconds, so most tests keep the fused operator as a call
(inline_native=False), for which Inductor generates Python alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from importlib.metadata import entry_points

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusewire
from fusewire import PassConfig
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.custom_ops.ops.registry import NATIVE
from fusewire.errors import ConfigError
from fusewire.fusion_passes import backend, registry
from fusewire.fusion_passes.config import DISABLE_VARIABLE

from support.blocks import NORMS, reduce_functional, tensors
from support.graphs import capture

pytestmark = pytest.mark.usefixtures("fake_world", "_fresh_state")
CALLS = {"inline_native": False}
HOOK = "post_grad_custom_post_pass"
_VERSIONS = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _own_cache():
    """A compile cache of this module's own: nothing comes from earlier runs, and C++ headers are compiled
    once."""
    with fresh_cache():
        yield


@pytest.fixture
def _fresh_state():
    torch._dynamo.reset()
    counters.clear()
    before = list(registry._PASSES)
    yield
    registry._PASSES[:] = before


@pytest.fixture
def native_calls(monkeypatch):
    """The calls of the fused operator's native provider; inlined arithmetic is none."""
    calls = []
    provider = all_reduce_rms_norm.providers[NATIVE]

    def counted(*args):
        calls.append(args)
        return provider.fn(*args)

    monkeypatch.setitem(all_reduce_rms_norm.providers, NATIVE, dataclasses.replace(provider, fn=counted))
    return calls


def block(x, r, w):
    total = r + reduce_functional(x)
    return NORMS["L"](total, w, 1e-5), total


def _new_source():
    """A pass with another source than any before: no graph comes from the compile cache, and the pass does
    run."""
    return f"version {next(_VERSIONS)}"


def compiled(fn, *inputs, **kwargs):
    kwargs.setdefault("fullgraph", True)
    with torch.no_grad():
        return torch.compile(fn, **kwargs)(*inputs)


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# backend="fusewire"


def test_backend_generates_code_that_computes_what_inductors_does():
    """bf16, native inlined into generated C++: the bits of plain Inductor with the same options, and eager's
    numbers."""
    inputs = tensors()
    options = {"emulate_precision_casts": True}
    got = compiled(block, *inputs, backend="fusewire", options={**options, "expect_fused": "all"})
    assert equal(got, compiled(block, *inputs, options=options))
    for value, wanted in zip(got, block(*inputs), strict=True):
        torch.testing.assert_close(value, wanted)
    assert fusewire.report().entries[0].provider == NATIVE
    assert fusewire.report().summary.startswith("fusewire: 1 of 1 all-reduces fused in 1 graph;")


def test_backend_keeps_the_call_where_asked(native_calls):
    inputs = tensors()
    assert equal(compiled(block, *inputs, backend="fusewire", options=CALLS), block(*inputs))
    assert len(native_calls) == 1


def test_backend_is_an_entry_point():
    assert "fusewire" in torch._dynamo.list_backends()
    (point,) = entry_points(group="torch_dynamo_backends", name="fusewire")
    assert point.load() is backend.fusewire_backend
    assert torch._dynamo.lookup_backend("fusewire") is backend.fusewire_backend


SEEN = []


def see_configuration(graph, config):
    SEEN.append(
        {
            "cudagraphs": inductor_config.triton.cudagraphs,
            "max_autotune": inductor_config.max_autotune,
            "no caches": torch.compiler.config.force_disable_caches,
            "config": config,
        }
    )


@pytest.fixture
def seen():
    """What a pass sees of the configuration while it runs."""
    SEEN.clear()
    registry.register_pass("see_configuration", see_configuration, source=_new_source())
    return SEEN


def test_options_of_fusewire_and_of_inductor(seen):
    """A field of ours, a nested option (CUDA graphs), a hyphen, and an alias of another module's option."""
    options = {
        **CALLS,
        "expect_fused": 1,
        "triton.cudagraphs": True,
        "max-autotune": True,
        "force_disable_caches": True,
    }
    inputs = tensors()
    assert equal(compiled(block, *inputs, backend="fusewire", options=options), block(*inputs))
    (saw,) = seen
    assert (saw["cudagraphs"], saw["max_autotune"], saw["no caches"]) == (True, True, True)
    assert saw["config"] == PassConfig(inline_native=False, expect_fused=1)
    assert counters["inductor"]["cudagraph_skips"] == 1  # asked for, and not to be had on a CPU
    assert (inductor_config.triton.cudagraphs, inductor_config.max_autotune) == (False, False)
    assert getattr(inductor_config, HOOK) is None


def test_names_that_inductor_has_too_are_ours():
    """`options` is one mapping for both. A name that joins this list takes an option of Inductor's from our
    users."""
    known = inductor_config.get_config_copy()
    both = {name for name in PassConfig.field_names() if name in known}
    assert both <= {"disabled_passes", "batch_invariant"}
    chosen, rest = backend.split_options({"batch_invariant": True, "disabled_passes": ["lower_ops"]})
    assert chosen == PassConfig(batch_invariant=True, disabled_passes=("lower_ops",))
    assert rest == {}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"expect_fuse": 1}, "unknown option 'expect_fuse'; did you mean 'expect_fused'?"),
        ({"triton.cudagraph": True}, "unknown option 'triton.cudagraph'; did you mean 'triton.cudagraphs'?"),
        ({"expect_fused": "most"}, "expect_fused is 'most'; it must be a count, 'all' or None"),
    ],
)
def test_bad_option(option, says):
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(block, *tensors(), backend="fusewire", options=option)
    assert isinstance(error.value.inner_exception, ConfigError)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("mode", "cudagraphs", "max_autotune"),
    [("default", False, False), ("reduce-overhead", True, False), ("max-autotune", True, True)],
)
def test_mode(seen, native_calls, mode, cudagraphs, max_autotune):
    inputs = tensors()
    with fusewire.ir_op_priority({"all_reduce_rms_norm": ["rank_ordered"]}):  # not inlined, as native would be
        got = compiled(block, *inputs, backend="fusewire", mode=mode)
    assert got[0].shape == inputs[0].shape
    (saw,) = seen
    assert (saw["cudagraphs"], saw["max_autotune"]) == (cudagraphs, max_autotune)
    assert fusewire.report().entries[0].provider == "rank_ordered"


def test_unknown_mode():
    with pytest.raises(BackendCompilerFailed, match="quick"):
        compiled(block, *tensors(), backend="fusewire", mode="quick")


def test_two_configurations_in_one_process(native_calls):
    inputs = tensors()
    want = block(*inputs)
    with torch.no_grad():
        fusing = torch.compile(block, backend="fusewire", options={**CALLS, "expect_fused": "all"})
        leaving = torch.compile(block, backend="fusewire", options={"fuse_allreduce_rms": False})
        for _ in range(2):
            assert equal(fusing(*inputs), want)
            for got, wanted in zip(leaving(*inputs), want, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
    assert len(native_calls) == 2
    assert [entry.status for entry in fusewire.report().entries] == ["fused", "refused"]


def test_backend_used_for_two_functions(native_calls):
    def without_residual(x, r, w):
        return NORMS["G"](reduce_functional(x), w, 1e-6), r + 0

    inputs = tensors()
    for fn in (block, without_residual):
        assert equal(compiled(fn, *inputs, backend="fusewire", options=CALLS), fn(*inputs))
    assert len(native_calls) == 2
    assert [graph.number for graph in fusewire.report().graphs] == [0, 1]


@pytest.mark.parametrize("kind", ["pointwise", "a norm"])
def test_a_graph_without_all_reduces_is_left_alone(kind):
    def fn(x, r, w):
        return torch.relu(x) * r if kind == "pointwise" else NORMS["L"](x + r, w, 1e-5)

    captured = capture(fn, *tensors())
    assert str(captured.graph) == captured.before[0]
    assert captured.report.entries == ()
    assert captured.report.nodes_before == captured.report.nodes_after


def test_epsilon_of_a_module_under_dynamic(native_calls):
    """The backend makes Dynamo capture again: with the epsilon a number, not an input."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 3e-4

        def forward(self, x, r, w):
            return NORMS["L"](r + reduce_functional(x), w, self.eps), r

    inputs = tensors()
    got = compiled(Norm(), *inputs, backend="fusewire", options={**CALLS, "expect_fused": "all"}, dynamic=True)
    assert equal(got, Norm()(*inputs))
    assert native_calls[0][3] == pytest.approx(3e-4)


def test_graph_break_between_all_reduce_and_norm():
    def broken(x, r, w):
        reduced = reduce_functional(x)
        torch._dynamo.graph_break()
        return NORMS["L"](r + reduced, w, 1e-5)

    inputs = tensors(torch.float32)
    got = compiled(broken, *inputs, backend="fusewire", fullgraph=False)
    torch.testing.assert_close(got, broken(*inputs))
    (entry,) = fusewire.report().entries
    assert "graph break" in entry.reason
    assert [len(graph.entries) for graph in fusewire.report().graphs] == [1, 0]


class _Reduce(torch.autograd.Function):
    """An all-reduce whose backward passes the gradient on, as tensor-parallel layers have it."""

    @staticmethod
    def forward(ctx, x):
        return reduce_functional(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_training_gives_right_gradients():
    def trained(x, r, w):
        return NORMS["L"](r + _Reduce.apply(x @ x.t() @ x), w, 1e-5)

    def gradients(fn):
        inputs = [value.requires_grad_() for value in tensors(torch.float32)]
        fn(*inputs).square().sum().backward()
        return [value.grad for value in inputs]

    got = gradients(torch.compile(trained, backend="fusewire", fullgraph=True))
    for gradient, wanted in zip(got, gradients(trained), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    assert {graph.kind for graph in fusewire.report().graphs} == {"training"}
    (entry,) = fusewire.report().entries
    assert "torch.no_grad()" in entry.reason


@torch.compiler.nested_compile_region
def _region(x, r, w):
    return block(x, r, w)


def test_nested_compile_region(native_calls):
    """The region is one graph, compiled once and called twice."""

    def twice(x, r, w):
        norm, total = _region(x, r, w)
        return _region(norm, total, w)

    inputs = tensors()
    got = compiled(twice, *inputs, backend="fusewire", options=CALLS)
    assert equal(got, block(*block(*inputs), inputs[2]))
    assert len(native_calls) == 2
    assert [entry.status for entry in fusewire.report().entries] == ["fused"]


# enable()

ORDER = []


class _Theirs(CustomGraphPass):
    """A pass that the user has set already; says what it sees, so that the order shows."""

    def __call__(self, graph):
        ORDER.append(
            (
                "theirs",
                sum(str(node.target) == "fusewire.all_reduce_rms_norm.default" for node in graph.nodes),
            )
        )

    def uuid(self):
        return "theirs"


def _see_fused(graph, config):
    ORDER.append(("ours", sum(str(node.target) == "fusewire.all_reduce_rms_norm.default" for node in graph.nodes)))


@pytest.fixture
def order():
    """Which passes ran, and how many fused calls each saw."""
    ORDER.clear()
    registry.register_pass("see_fused", _see_fused, after="lower_ops", source=_new_source())
    return ORDER


def test_enable_around_plain_compile(native_calls, order):
    inputs = tensors()
    with fusewire.enable(PassConfig(inline_native=False)) as config:
        assert config == PassConfig(inline_native=False)
        assert equal(compiled(block, *inputs), block(*inputs))
    assert len(native_calls) == 1
    assert order == [("ours", 1)]
    assert getattr(inductor_config, HOOK) is None


def test_what_is_compiled_after_the_block_is_left_alone(order):
    function = torch.compile(block, fullgraph=True)
    with fusewire.enable(**CALLS):
        pass
    with torch.no_grad():
        function(*tensors(torch.float32))
    assert order == []
    assert fusewire.report().graphs == ()


def _existing(kind):
    theirs = _Theirs()
    if kind == "a pass":
        return theirs
    if kind == "a plain callable":
        return theirs.__call__
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("this torch takes one custom pass, and a list of them only from 2.13 on")
    if kind == "a list":
        return [theirs, theirs.__call__]

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            assert is_inference is True
            theirs(graph)

        def uuid(self):
            return "aware"

    return Aware()


@pytest.mark.parametrize("way", ["enable", "backend"])
@pytest.mark.parametrize("kind", ["a pass", "a plain callable", "a list", "an inference-aware pass"])
def test_a_custom_pass_that_is_set_already_runs_first(native_calls, order, kind, way):
    inputs = tensors()
    with inductor_config.patch({HOOK: _existing(kind)}):
        if way == "enable":
            with fusewire.enable(**CALLS):
                got = compiled(block, *inputs)
        else:
            got = compiled(block, *inputs, backend="fusewire", options=CALLS)
    assert equal(got, block(*inputs))
    assert order == [("theirs", 0)] * (2 if kind == "a list" else 1) + [("ours", 1)]
    assert len(native_calls) == 1


@pytest.mark.parametrize("way", ["enable", "standalone", "backend", "backend within enable"])
def test_a_custom_pass_in_the_options_runs_first(order, way):
    """Serving engines hand their pass to each compilation, as an option or as compile_fx's config_patches."""
    from torch._inductor import compile_fx as module

    own = module.compile_fx
    enabled = fusewire.enable(**CALLS) if "enable" in way or way == "standalone" else contextlib.nullcontext()
    with enabled:
        if way == "enable":
            compiled(block, *tensors(), options={HOOK: _Theirs()})
        elif way == "standalone":
            compiled(block, *tensors(), backend=_engine)
        else:
            compiled(block, *tensors(), backend="fusewire", options={**CALLS, HOOK: _Theirs()})
    assert order == [("theirs", 0), ("ours", 1)]
    assert module.compile_fx is own


def _engine(model, inputs):
    """A backend as engines write them, around torch's standalone_compile."""
    made = torch._inductor.standalone_compile(model, inputs, options={"config_patches": {HOOK: _Theirs()}})
    return lambda *args: made(*args)


def test_nested_blocks_leave_inductor_as_it_was():
    from torch._inductor import compile_fx as module

    own = module.compile_fx
    with fusewire.enable():
        wrapped = module.compile_fx
        assert wrapped is not own
        with fusewire.enable():
            assert module.compile_fx is wrapped
        assert module.compile_fx is wrapped
    assert module.compile_fx is own


def test_uuid_of_a_chain():
    ours = backend.FusewirePass(PassConfig())
    assert backend.ChainedPass([_Theirs(), ours]).uuid() == ("theirs", ours.uuid())
    assert backend.ChainedPass([_Theirs().__call__, ours]).uuid() is None


@pytest.mark.parametrize("theirs", [None, _Theirs()], ids=["alone", "with a user's"])
@pytest.mark.parametrize("way", ["enable", "backend"])
def test_inner_configuration_counts_and_passes_run_once(order, way, theirs):
    with inductor_config.patch({HOOK: theirs}), fusewire.enable(fuse_allreduce_rms=False):
        if way == "enable":
            with fusewire.enable(**CALLS):
                compiled(block, *tensors())
        else:
            compiled(block, *tensors(), backend="fusewire", options=CALLS)
    assert order == ([("theirs", 0)] if theirs else []) + [("ours", 1)]
    assert len(fusewire.report().graphs) == 1


def test_enable_keeps_epsilons_numbers_under_dynamic(native_calls):
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 3e-4

        def forward(self, x, r, w):
            return NORMS["L"](r + reduce_functional(x), w, self.eps)

    with fusewire.enable(expect_fused="all", **CALLS):
        compiled(Norm(), *tensors(), dynamic=True)
    assert native_calls[0][3] == pytest.approx(3e-4)
    assert torch._dynamo.config.specialize_float is False


def test_enable_with_bad_options():
    with pytest.raises(ConfigError, match="did you mean 'expect_fused'"), fusewire.enable(expected_fused=1):
        pass
    both = pytest.raises(ConfigError, match="give a PassConfig or single fields, not both")
    with both, fusewire.enable(PassConfig(), expect_fused=1):
        pass


# run_passes()


def traced(fn, *inputs):
    """A graph of ATen operators made without Dynamo or Inductor."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(value) for value in inputs]
        return make_fx(fn)(*fakes)


@pytest.mark.parametrize("way", [fusewire.run_passes, lambda graph, c: backend.FusewirePass(c)(graph)])
def test_passes_on_a_graph_by_hand(native_calls, way):
    inputs = tensors()
    module = traced(block, *inputs)
    way(module.graph, PassConfig(inline_native=False))
    module.recompile()
    assert equal(module(*inputs), block(*inputs))
    assert len(native_calls) == 1
    assert fusewire.report().fused == 1


def test_run_passes_returns_the_account_and_takes_defaults():
    module = traced(block, *tensors())
    report = fusewire.run_passes(module.graph)
    assert fusewire.report().graphs == (report,)
    assert report.entries[0].status == "fused"


# FUSEWIRE_DISABLE


def test_the_environment_switches_everything_off(monkeypatch, order):
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    monkeypatch.delattr(backend, "chained_hook")  # nothing is put into Inductor's configuration at all
    inputs = tensors(torch.float32)
    options = {**CALLS, "expect_fused": 7, "max_autotune": False}
    for got in compiled(block, *inputs, backend="fusewire", options=options), _enabled(block, *inputs):
        for value, wanted in zip(got, block(*inputs), strict=True):
            torch.testing.assert_close(value, wanted)
    module = traced(block, *inputs)
    before = str(module.graph)
    assert fusewire.run_passes(module.graph).kind == "disabled"
    assert str(module.graph) == before
    assert order == []
    assert fusewire.report().graphs == ()


def _enabled(fn, *inputs):
    with fusewire.enable(**CALLS):
        assert getattr(inductor_config, HOOK) is None
        return compiled(fn, *inputs)


def test_options_are_checked_even_when_switched_off(monkeypatch):
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    with pytest.raises(BackendCompilerFailed, match="did you mean 'expect_fused'"):
        compiled(block, *tensors(), backend="fusewire", options={"expect_fuse": 1})


# register_pass()


def _subtract(graph, config):
    """Turn the first add into a subtraction: wrong on purpose, so that it shows."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.add.Tensor:
            node.target = torch.ops.aten.sub.Tensor
            return True
    return False


def test_a_users_pass_is_in_the_compiled_graph():
    registry.register_pass("subtract", _subtract)
    x, r, w = tensors(torch.float32)
    got = compiled(lambda x, r, w: x + r, x, r, w, backend="fusewire")
    torch.testing.assert_close(got, x - r)
    torch._dynamo.reset()
    got = compiled(lambda x, r, w: x + r, x, r, w, backend="fusewire", options={"disabled_passes": ["subtract"]})
    torch.testing.assert_close(got, x + r)


VISITS = []


def _visit(graph, config):
    VISITS.append([str(node.target) for node in graph.nodes if node.op == "call_function"])


@pytest.mark.parametrize(
    ("place", "names", "sees"),
    [
        ({"before": "eliminate_noops"}, ("visit", "eliminate_noops"), "_c10d_functional.all_reduce.default"),
        ({"before": "fuse_all_reduce"}, ("visit", "fuse_all_reduce"), "fusewire.fused_add_rms_norm.default"),
        ({"after": "fuse_all_reduce"}, ("fuse_all_reduce", "visit"), "fusewire.all_reduce_rms_norm.default"),
        ({}, ("visit", "lower_ops"), "fusewire.all_reduce_rms_norm.default"),
        ({"after": "lower_ops"}, ("lower_ops", "visit"), "_c10d_functional.all_reduce.default"),
    ],
    ids=str,
)
def test_place_of_a_users_pass(place, names, sees):
    VISITS.clear()
    registry.register_pass("visit", _visit, **place)
    order = registry.pass_names()
    assert order.index(names[1]) == order.index(names[0]) + 1
    captured = capture(block, *tensors())
    (visited,) = VISITS  # once per graph: users' passes take no part in the trial runs on copies
    assert sees in visited
    assert captured.verdicts() == [("fused", "")]


def test_a_users_pass_gets_the_configuration(seen):
    capture(block, *tensors(), expect_fused=1)
    assert [saw["config"] for saw in seen] == [PassConfig(expect_fused=1)]


def _fails(graph, config):
    raise ZeroDivisionError("planted in a user's pass")


def test_a_failing_users_pass_fails_the_compilation_with_its_own_error():
    registry.register_pass("fails", _fails)
    with pytest.raises(BackendCompilerFailed, match="planted in a user's pass") as error:
        compiled(block, *tensors(), backend="fusewire")
    assert isinstance(error.value.inner_exception, ZeroDivisionError)
    registry.unregister_pass("fails")
    torch._dynamo.reset()
    assert equal(compiled(block, *tensors(), backend="fusewire", options=CALLS), block(*tensors()))


def test_names_and_places_that_cannot_be():
    registry.register_pass("visit", _visit)
    with pytest.raises(ConfigError, match="there is already a pass named 'visit'; the passes are: eliminate_noops"):
        registry.register_pass("visit", _visit)
    with pytest.raises(ConfigError, match="there is already a pass named 'lower_ops'"):
        registry.register_pass("lower_ops", _visit)
    with pytest.raises(ConfigError, match="there is no pass 'lower'; the passes are: "):
        registry.register_pass("other", _visit, before="lower")
    with pytest.raises(ConfigError, match="give `before` or `after`, not both"):
        registry.register_pass("other", _visit, before="lower_ops", after="raise_ops")
    assert "other" not in registry.pass_names()


def test_unregister():
    registry.register_pass("visit", _visit)
    registry.unregister_pass("visit")
    assert "visit" not in registry.pass_names()
    for name in ("visit", "lower_ops"):
        with pytest.raises(ConfigError, match=f"no registered pass of yours is named '{name}'"):
            registry.unregister_pass(name)
    assert "lower_ops" in registry.pass_names()


class _Method:
    def run(self, graph, config):
        return False


def test_a_pass_whose_source_says_not_all_needs_a_text():
    factor = len(registry.pass_names())

    def closure(graph, config):
        return factor < 0

    for unclear, says in (
        (closure, "depends on more than its source code"),
        (_Method().run, "depends on more than its source code"),
        (functools.partial(_visit), "cannot be found"),
    ):
        with pytest.raises(ConfigError, match=says) as error:
            registry.register_pass("other", unclear)
        assert "pass source=..., a text that changes whenever the pass does" in str(error.value)
        registry.register_pass("other", unclear, source="version 1")
        registry.unregister_pass("other")


def test_public_register_pass_is_this_one():
    assert fusewire.register_pass is registry.register_pass
