"""Gates between an all-reduce and its norm: refused unless they may be taken to be the same on every rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm

from support.blocks import HIDDEN, NORMS, reduce_functional, tensors
from support.compiles import WITHOUT_CODE
from support.distributed import fake_group, shared_pool
from support.graphs import capture

OTHER = []
PROVES = "which the graph does not prove"


@pytest.fixture
def world():
    with fake_group(2) as group:
        OTHER[:] = [dist.new_group([0, 1])]
        yield group


def inputs(dtype=torch.bfloat16):
    x, residual, w = tensors(dtype, (6,))
    return x, residual, w, torch.randn(HIDDEN, 1, generator=torch.Generator().manual_seed(9)).to(dtype)


def shared_expert(x, residual, w, g):
    """Experts + gate * shared expert, the gate computed from the all-reduced and normalised hidden states."""
    total = residual + reduce_functional(x)
    hidden = NORMS["G"](total, w, 1e-6)
    shared = torch.sigmoid(hidden @ g) * reduce_functional(hidden.cos())
    total = total + (reduce_functional(hidden.sin()) + shared)
    return NORMS["G"](total, w, 1e-6), total


def one_gated(x, residual, w, g):
    hidden = NORMS["G"](residual + reduce_functional(x), w, 1e-6)
    total = residual + reduce_functional(hidden.sin()) * torch.sigmoid(hidden @ g)
    return NORMS["G"](total, w, 1e-6), total


def own_gate(x, residual, w, g):
    """The gate is computed from what it multiplies."""
    summed = reduce_functional(x)
    return NORMS["G"](residual + summed * torch.sigmoid(summed @ g), w, 1e-6)


def other_ones_result(x, residual, w, g):
    """The one all-reduce's gate is computed from the other."""
    first = reduce_functional(x)
    total = first + reduce_functional(residual) * torch.sigmoid(first @ g)
    return NORMS["G"](total, w, 1e-6)


def random_gate(x, residual, w, g):
    gate = torch.rand(x.shape[0], 1, dtype=x.dtype)
    return NORMS["G"](residual + reduce_functional(x) * gate, w, 1e-6)


def gate_of_own_rows(x, residual, w, g):
    """Each rank has other rows of a reduce-scatter."""
    rows = functional.reduce_scatter_tensor(torch.cat([residual, residual]), "sum", 0, dist.group.WORLD)
    return NORMS["G"](residual + reduce_functional(x) * torch.sigmoid(rows @ g), w, 1e-6)


def gate_of_another_group(x, residual, w, g):
    """The same on the ranks of another group only."""
    rows = functional.all_reduce(residual, "sum", OTHER[0])
    return NORMS["G"](residual + reduce_functional(x) * torch.sigmoid(rows @ g), w, 1e-6)


def wide_gate(x, residual, w, g):
    """One number for each hidden unit: no gate of a router's."""
    return NORMS["G"](residual + reduce_functional(x) * torch.sigmoid(residual), w, 1e-6)


def wider_dtype(x, residual, w, g):
    gate = torch.sigmoid(residual.float() @ g.float())
    return NORMS["G"]((residual + reduce_functional(x) * gate).to(x.dtype), w, 1e-6)


def fused(captured):
    return [entry.status for entry in captured.report.entries].count("fused")


@pytest.mark.parametrize(("block", "by_default", "assumed"), [(shared_expert, 2, 3), (one_gated, 1, 2)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gates_may_be_assumed_replicated(world, block, by_default, assumed, dynamic):
    plain = capture(block, *inputs(), dynamic=dynamic)
    assert fused(plain) == by_default
    assert any(PROVES in reason for reason in plain.reasons())
    taken = capture(block, *inputs(), dynamic=dynamic, assume_replicated_gates=True, inline_native=False)
    assert fused(taken) == assumed
    assert taken.count(all_reduce_rms_norm.torch_op) == 2


@pytest.mark.parametrize(
    "block", [own_gate, random_gate, gate_of_own_rows, gate_of_another_group, wide_gate, wider_dtype]
)
def test_what_is_no_such_gate_is_refused(world, block):
    captured = capture(block, *inputs(), assume_replicated_gates=True)
    assert fused(captured) == 0
    assert captured.before[0] == str(captured.graph)


def test_an_all_reduce_that_the_others_gate_needs_is_not_merged(world):
    captured = capture(other_ones_result, *inputs(), assume_replicated_gates=True, inline_native=False)
    assert not any(entry.fusion.startswith("merged") for entry in captured.report.entries)


def test_reassociation_has_its_own_say(world):
    captured = capture(one_gated, *inputs(), assume_replicated_gates=True, allow_reassociation=False)
    assert fused(captured) == 1


def test_a_scaled_sum_merges(world):
    """Granite's residual multiplier on both of two all-reduces side by side."""

    def block(x, residual, w, g):
        total = residual + (reduce_functional(x) * 0.5 + reduce_functional(residual) * 0.5)
        return NORMS["L"](total, w, 1e-6)

    captured = capture(block, *inputs(), inline_native=False)
    assert fused(captured) == 2
    assert captured.count(all_reduce_rms_norm.torch_op) == 1


def _far_from_eager(name):
    torch._dynamo.reset()
    x, residual, w, g = inputs(torch.float32)
    x = x * (1 + dist.get_rank())
    block = globals()[name]
    with torch.no_grad():
        wanted = block(x, residual, w, g)
        options = {"assume_replicated_gates": True, "expect_fused": "all", **WITHOUT_CODE}
        found = torch.compile(block, backend="fusewire", options=options)(x, residual, w, g)
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["shared_expert", "one_gated"])
def test_results(name):
    assert max(shared_pool(2).run(_far_from_eager, name)) < 1e-5
