"""All-reduces that are operators of their own: counted, explained, and no ground for
`expect_fused`."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.errors import ExpectationError
from fusewire.fusion_passes.compiler.dynamo import forget_graph_breaks
from fusewire.fusion_passes.pipeline import run_passes
from fusewire.fusion_passes.report.model import GraphReport, Unread
from fusewire.patterns.collectives import SPELLINGS, UNREAD, unread_all_reduces

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.graphs import capture

pytestmark = pytest.mark.usefixtures("fake_world")
NAME = "fusewire_test_engine"
_LIBRARY = torch.library.Library(NAME, "DEF")  # as an engine's extension
_LIBRARY.define("shm_allreduce(int handle, Tensor(a!) data) -> ()")
_LIBRARY.define("qr_all_reduce(Tensor x) -> Tensor")
_LIBRARY.define("fused_allreduce_rmsnorm(Tensor x) -> Tensor")
_LIBRARY.define("smallreduce(Tensor x) -> Tensor")
_LIBRARY.define("all_reduce_workspace_size(int ranks) -> int")
_LIBRARY.define("reduce_all(Tensor x) -> Tensor")
_LIBRARY.impl("shm_allreduce", lambda handle, data: None, "CompositeExplicitAutograd")
_LIBRARY.impl("qr_all_reduce", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAME}::shm_allreduce", lambda handle, data: None, lib=_LIBRARY)
torch.library.register_fake(f"{NAME}::qr_all_reduce", torch.empty_like, lib=_LIBRARY)
engine = getattr(torch.ops, NAME)
UNKNOWN = "an all-reduce by its name, of an extension that fusewire does not know"


def in_place(x, r, w):
    """As vLLM on CPUs: each call is in place, so Inductor sees it through auto_functionalized."""
    for _ in range(7):
        x = x.clone()
        engine.shm_allreduce(0, x)
        x = NORMS["L"](x + r, w, 1e-5)
    return x


def fuses(x, r, w):
    return NORMS["L"](reduce_functional(x) + r, w, 1e-5)


def both(x, r, w):
    return engine.qr_all_reduce(fuses(x, r, w))


def neither(x, r, w):
    return NORMS["L"](x + r, w, 1e-5)


def test_calls_within_auto_functionalized_are_counted():
    captured = capture(in_place, *tensors())
    assert "auto_functionalized" in captured.before[0]
    (found,) = captured.report.unread
    assert (found.op, found.calls) == (f"{NAME}.shm_allreduce", 7)
    assert found.reason.startswith(UNKNOWN)
    report = fusewire.report()
    assert (report.found, report.fused, report.unread) == (0, 0, 7)
    assert report.summary.startswith(
        "fusewire: found no all-reduce that it can read, but the graph calls "
        f"{NAME}.shm_allreduce 7 times; passes took "
    )
    assert f"  not read: 7 x {NAME}.shm_allreduce\n       an operator of its own that fusewire does not " in str(report)
    assert json.loads(report.to_json())["unread"] == 7


def test_calls_beside_all_reduces_that_are_read():
    capture(both, *tensors())
    capture(in_place, *tensors())
    report = fusewire.report()
    assert (report.found, report.fused, report.unread) == (1, 1, 8)
    assert report.summary.startswith(
        "fusewire: 1 of 1 all-reduces fused in 2 graphs; besides, there are calls that it cannot "
        f"read: {NAME}.qr_all_reduce 1 time, {NAME}.shm_allreduce 7 times; passes took "
    )


def calls(target, *args):
    graph = torch.fx.Graph()
    node = graph.call_function(target, args)
    return [name for name, _ in unread_all_reduces(node)]


def test_the_rule_for_unknown_operators():
    x = torch.fx.Graph().placeholder("x")
    assert calls(engine.qr_all_reduce.default, x) == [f"{NAME}::qr_all_reduce"]
    for name in ("smallreduce", "all_reduce_workspace_size", "reduce_all"):
        assert calls(getattr(engine, name).default, x) == []
    assert calls(torch.add, x) == calls(torch.ops.aten.add.Tensor, x, x) == calls(all_reduce_rms_norm.torch_op, x) == []
    ((_, why),) = unread_all_reduces(torch.fx.Graph().call_function(engine.fused_allreduce_rmsnorm.default, (x,)))
    assert why == "by its name an all-reduce that something else has fused with a norm already"


def test_what_is_read_is_not_listed():
    x = torch.fx.Graph().placeholder("x")
    read = [*(spelling.op for spelling in SPELLINGS), "_c10d_functional::all_reduce_coalesced"]
    read.remove("vllm::all_reduce")  # vLLM's, which is not here
    for op in read:
        namespace, _, name = op.partition("::")
        if hasattr(getattr(torch.ops, namespace), name):
            assert calls(getattr(getattr(torch.ops, namespace), name).default, x) == []


def test_known_operators_are_torchs_own():
    """Those of the table that this torch defines are found by it, with the reason there."""
    found = 0
    for op, why in UNREAD.items():
        namespace, _, name = op.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            node = torch.fx.Graph().call_function(packet.default, ())
            assert list(unread_all_reduces(node)) == [(op, why)]
            found += 1
    assert found >= 10
    assert not {spelling.op for spelling in SPELLINGS} & UNREAD.keys()


def test_symmetric_memory_in_a_graph():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, HIDDEN)
    call = graph.call_function(torch.ops.symm_mem.one_shot_all_reduce.default, (x, "sum", dist.group.WORLD.group_name))
    call.meta["val"] = x.meta["val"]
    graph.output(call)
    (found,) = run_passes(graph).unread
    assert (found.op, found.calls) == ("symm_mem.one_shot_all_reduce", 1)
    assert "symmetric memory that the program manages itself" in found.reason


# expect_fused


@pytest.mark.parametrize("block", [in_place, both])
@pytest.mark.parametrize("expected", ["all", 2])
def test_an_expectation_is_not_met_by_what_is_not_read(block, expected):
    with pytest.raises(Exception, match=rf"expect_fused={expected!r} is not met: .*{NAME}\..*all_?reduce [17] time"):
        capture(block, *tensors(), expect_fused=expected)


def test_a_number_counts_what_is_fused():
    capture(both, *tensors(), expect_fused=1)
    capture(in_place, *tensors(), expect_fused=0)


@pytest.fixture
def _no_breaks():
    forget_graph_breaks()


def by_backend(block, **options):
    torch._dynamo.reset()
    torch.compile(block, backend="fusewire", options={"inline_native": False, **options})(*tensors())


def by_enable(block, **options):
    torch._dynamo.reset()
    with fusewire.enable(inline_native=False, **options):
        torch.compile(block)(*tensors())


@pytest.mark.usefixtures("_no_breaks")
@pytest.mark.parametrize("way", [by_backend, by_enable])
@pytest.mark.parametrize("expected", ["all", 1])
def test_a_program_without_all_reduces_meets_no_expectation(way, expected):
    with torch.no_grad(), pytest.raises(Exception, match="no all-reduce of the program was fused") as error:
        way(neither, expect_fused=expected)
    assert isinstance(getattr(error.value, "inner_exception", error.value), ExpectationError)
    assert "0 of 0 all-reduces fused in 1 graph" in str(error.value)
    with torch.no_grad():
        way(neither, expect_fused=0)
        way(neither)


@pytest.mark.usefixtures("_no_breaks")
@pytest.mark.parametrize("way", [by_backend, by_enable])
def test_a_graph_without_all_reduces_passes_in_a_program_that_has_others(way):
    with torch.no_grad():
        way(fuses, expect_fused="all")
        way(neither, expect_fused="all")


@pytest.mark.usefixtures("_no_breaks")
@pytest.mark.parametrize("way", [by_backend, by_enable])
def test_a_graph_before_a_graph_break_passes(way):
    """The all-reduces come in a later graph: the first one is not the whole program."""

    def broken(x, r, w):
        x = neither(x, r, w)
        torch._dynamo.graph_break()
        return fuses(x, r, w)

    with torch.no_grad():
        way(broken, expect_fused="all")
    assert [len(graph.entries) for graph in fusewire.report().graphs] == [0, 1]


def test_an_error_within_the_block_is_not_replaced():
    with pytest.raises(ZeroDivisionError), fusewire.enable(expect_fused="all"):
        raise ZeroDivisionError


# enable without a compilation


def test_a_block_in_which_nothing_was_compiled_is_noted_once():
    for _ in range(2):
        with fusewire.enable():
            pass
    (note,) = fusewire.report().notes
    assert note.startswith("in a block of fusewire.enable() nothing was compiled with Inductor")
    assert str(fusewire.report()).endswith(f"\nnote: {note}")
    assert json.loads(fusewire.report().to_json())["notes"] == [note]
    fusewire.clear_report()
    assert fusewire.report().notes == ()
    with pytest.raises(ExpectationError, match="was fused; nothing was compiled"), fusewire.enable(expect_fused="all"):
        pass


def test_a_block_in_which_something_was_compiled_is_not_noted():
    with torch.no_grad():
        by_enable(neither)
    assert fusewire.report().notes == ()


def test_a_block_within_another_is_noted_by_itself():
    with torch.no_grad(), fusewire.enable():
        by_enable(neither)
        with fusewire.enable():
            pass
    assert len(fusewire.report().notes) == 1


# Text


def test_text_of_a_graph_that_places_of_the_model_share():
    graph = GraphReport(0, "inference", uses=28, unread=(Unread("_C.shm_allreduce", 2, "why"),))
    report = fusewire.Report((graph, dataclasses.replace(graph, number=1, uses=1)))
    assert str(report).splitlines() == [
        "fusewire: found no all-reduce that it can read, but the graphs call _C.shm_allreduce 58 "
        "times; passes took 0.00 s",
        "graph 0 (inference): 0 all-reduces, 0 fused, run in 28 places of the model",
        "  not read: 2 x _C.shm_allreduce",
        "       an operator of its own that fusewire does not rewrite: why",
        "graph 1 (inference): 0 all-reduces, 0 fused",
        "  not read: 2 x _C.shm_allreduce",
        "       an operator of its own that fusewire does not rewrite: why",
    ]
