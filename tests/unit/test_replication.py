"""What is the same on every rank, by the analysis of a graph."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import inductor_prims

from fusewire.custom_ops.ops.norms import fused_add_rms_norm, rms_norm
from fusewire.custom_ops.ops.sharded_norm import gather_rows, shard_rows
from fusewire.fusion_passes.analysis.replication import ASSUMED, PROVED, UNKNOWN, Replication
from fusewire.patterns.collectives import ALL_GATHER, COALESCED, REDUCE_SCATTER, WAIT

from support.written_graphs import GROUP, NORM, Build

aten = torch.ops.aten
GATHER, TAKE = gather_rows.torch_op, shard_rows.torch_op
OTHER = "others"
LIBRARY = torch.library.Library("fusewire_replication_test", "DEF")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.define("fill(Tensor source, Tensor(a!) target) -> ()")
LIBRARY.define("fill_and_pass(Tensor(b) source, Tensor(a!) target) -> Tensor(b)")
LIBRARY.define("fill_all(Tensor source, Tensor(a!)[] targets) -> ()")
MINE = torch.ops.fusewire_replication_test


def attribute(b):
    b.graph.owning_module = torch.nn.Module()
    b.graph.owning_module.register_buffer("table", torch.zeros(2))
    return b.graph.get_attr("table")


def coalesced(b):
    parts = b.call(COALESCED, [b.x, b.r], "sum", GROUP)
    return b.call(WAIT, b.item(parts, 1))


def copied_into_an_input(b):
    """As functionalisation writes a changed buffer, at the graph's end."""
    b.call(aten.copy_.default, b.r, b.call(aten.rand.default, [2]))
    return b.r


def norm_of_sum(b):
    return b.item(b.call(fused_add_rms_norm.torch_op, b.reduced(), b.gathered(), None, *NORM), 0)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda b: b.reduced(), PROVED),
        (lambda b: b.gathered(), PROVED),
        (coalesced, PROVED),
        (lambda b: b.reduced(b.call(aten.rand.default, [2])), PROVED),
        (lambda b: b.call(aten.full.default, [2], 1.0), PROVED),
        (lambda b: b.call(aten.add.Tensor, b.reduced(), b.call(aten.mul.Tensor, b.gathered(), 2.0)), PROVED),
        (lambda b: b.call(rms_norm.torch_op, b.reduced(), None, *NORM), PROVED),
        (norm_of_sum, PROVED),
        (lambda b: b.call(aten.expand_as.default, b.reduced(), b.x), PROVED),
        (lambda b: b.item(b.fused(), 0), PROVED),
        (lambda b: b.item(b.fused(b.reduced(), b.reduced()), 1), PROVED),
        (lambda b: b.item(b.sandwich(b.reduced()), 0), PROVED),
        (lambda b: b.item(b.sharded(b.r), 0), PROVED),
        (lambda b: b.call(GATHER, b.scattered(), b.x, GROUP), PROVED),
        (lambda b: b.x, ASSUMED),
        (attribute, ASSUMED),
        (copied_into_an_input, ASSUMED),
        (lambda b: b.call(aten.add.Tensor, b.reduced(), b.call(aten.sin.default, b.r)), ASSUMED),
        (lambda b: b.item(b.fused(b.r), 0), ASSUMED),
        (lambda b: b.item(b.fused(b.r), 1), ASSUMED),
        (lambda b: b.item(b.fused(b.reduced(), b.w), 0), ASSUMED),
        (lambda b: b.item(b.sandwich(b.r), 0), ASSUMED),
        (lambda b: b.item(b.sandwich(b.reduced(), None, b.w), 1), ASSUMED),
        (lambda b: b.item(b.sharded(None, b.w), 0), ASSUMED),
    ],
)
def test_proved_and_assumed(make, kind):
    build = Build()
    verdict = Replication().judge(make(build), GROUP)
    assert (verdict.kind, verdict.reason) == (
        kind,
        "" if kind == PROVED else "comes from inputs or parameters of the graph",
    )


def filled(b, through=lambda b, memory: memory, op=MINE.fill.default):
    """Memory that an operator of which nothing is known writes."""
    memory = b.call(aten.empty.memory_format, [2, 2])
    target = through(b, memory)
    b.call(op, b.x, [target] if op is MINE.fill_all.default else target)
    return memory


def triton_kernel(b):
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    memory = b.call(aten.empty.memory_format, [2, 2])
    b.call(triton_kernel_wrapper_mutation, kernel_idx=0, kwargs={"out": memory})
    return memory


def second_half(b, memory):
    return b.item(b.call(aten.split.Tensor, memory, 1), 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda b: b.call(aten.rand.default, [2]), "random numbers (rand_default)"),
        (lambda b: b.call(aten.bernoulli.default, b.reduced()), "random numbers (bernoulli_default)"),
        (
            lambda b: b.call(inductor_prims.random, [2], b.call(inductor_prims.seed, torch.device("cpu")), "rand"),
            "random numbers (inductor_seed",
        ),
        (lambda b: b.call(MINE.opaque.default, b.reduced()), "fusewire_replication_test::opaque (opaque"),
        (lambda b: b.call(torch.ops.higher_order.cond, b.reduced()), "of which nothing is known"),
        (lambda b: b.call(len, b.reduced()), "of which nothing is known"),
        (lambda b: b.fused(), "of which nothing is known"),
        (
            lambda b: b.call(WAIT, b.call(torch.ops._c10d_functional.broadcast.default, b.x, 0, GROUP)),
            "_c10d_functional::broadcast (wait_tensor",
        ),
        (lambda b: b.call(ALL_GATHER, b.x, 2, GROUP), "of which nothing is known"),
        (lambda b: b.reduced().args[0], "_c10d_functional::all_reduce (all_reduce"),
        (lambda b: b.scattered(), "rows that each rank has for itself (reduce_scatter_tensor"),
        (lambda b: b.call(REDUCE_SCATTER, b.x, "sum", 2, GROUP), "rows that each rank has for itself"),
        (lambda b: b.call(TAKE, b.reduced(), GROUP), "rows that each rank has for itself (shard_rows"),
        (lambda b: b.item(b.sharded(), 1), "rows that each rank has for itself"),
        (lambda b: b.reduced(group=OTHER), "a collective over another group (others)"),
        (lambda b: b.call(aten.add.Tensor, b.reduced(), b.gathered(group=OTHER)), "another group (others)"),
        (lambda b: b.item(b.fused(group=OTHER), 0), "another group (others)"),
        (lambda b: b.call(GATHER, b.scattered(), b.x, OTHER), "another group (others)"),
        (filled, "which fill_default writes in place"),
        (lambda b: filled(b, op=MINE.fill_all.default), "which fill_all_default writes in place"),
        (lambda b: filled(b, lambda b, m: b.call(aten.select.int, m, 0, 1)), "which fill_default writes in place"),
        (lambda b: filled(b, second_half), "which fill_default writes in place"),
        (triton_kernel, "writes in place"),
        (lambda b: b.call(aten.neg.default, filled(b)), "which fill_default writes in place"),
        (lambda b: b.call(aten.add.Tensor, b.r, b.call(aten.rand.default, [2])), "random numbers"),
        (lambda b: b.item(b.fused(b.call(aten.rand.default, [2])), 1), "random numbers"),
        (lambda b: b.item(b.fused(b.scattered()), 0), "rows that each rank has for itself"),
        (lambda b: b.item(b.sharded(None, b.scattered()), 0), "rows that each rank has for itself"),
    ],
)
def test_unknown(make, says):
    verdict = Replication().judge(make(Build()), GROUP)
    assert verdict.kind == UNKNOWN
    assert verdict.reason.startswith("comes from ")
    assert says in verdict.reason


@pytest.mark.parametrize("op", [MINE.fill.default, MINE.fill_and_pass.default])
def test_what_an_operator_only_reads_it_does_not_write(op):
    build = Build()
    source = build.reduced()
    build.call(op, source, build.call(aten.empty.memory_format, [2]))
    assert Replication().judge(source, GROUP).kind == PROVED


def test_another_group_is_no_matter_where_its_result_is_reduced_again():
    build = Build()
    assert Replication().judge(build.reduced(build.reduced(group=OTHER)), GROUP).kind == PROVED


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda b: b.fused(), PROVED, ""),
        (lambda b: b.fused(b.r), ASSUMED, "the residual comes from inputs or parameters"),
        (lambda b: b.fused(b.reduced(), b.w), ASSUMED, "the weight comes from inputs or parameters"),
        (lambda b: b.fused(b.r, b.scattered()), UNKNOWN, "the weight comes from rows that each rank has"),
        (lambda b: b.fused(b.scattered(), b.w), UNKNOWN, "the residual comes from rows that each rank has"),
        (lambda b: b.fused(b.reduced(group=OTHER)), UNKNOWN, "the residual comes from a collective over another group"),
        (lambda b: b.sandwich(b.reduced(), None, b.w), ASSUMED, "the inner weight comes from inputs or parameters"),
        (lambda b: b.sharded(b.scattered()), PROVED, ""),
        (lambda b: b.sharded(b.scattered(), b.w), ASSUMED, "the weight comes from inputs or parameters"),
    ],
)
def test_what_a_call_needs(make, kind, says):
    verdict = Replication().judge_call(make(Build()))
    assert verdict.kind == kind
    assert verdict.reason.startswith(says)
    assert bool(verdict.reason) == (kind != PROVED)


def test_each_node_is_looked_at_once(monkeypatch):
    """On a graph of 6,000 nodes in which the number of paths doubles with each layer."""
    build, looked = Build(), []
    value, values = build.reduced(), []
    for _ in range(3000):
        value = build.call(aten.add.Tensor, value, build.call(aten.neg.default, value))
        values.append(value)
    real = Replication._own_origin
    monkeypatch.setattr(Replication, "_own_origin", lambda self, node: looked.append(node) or real(self, node))
    replication = Replication()
    assert {replication.judge(value, GROUP).kind for value in values[::-1]} == {PROVED}
    assert len(looked) <= 2 * len(build.graph.nodes)
