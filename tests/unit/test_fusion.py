"""What must fuse: every spelling of the all-reduce and of the norm, and what stands between them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

import fusewire
from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.patterns.collectives import ALL_REDUCE

from support import vllm_norms
from support.blocks import HIDDEN, NORMS, pow_half, reduce_functional, reduce_in_place, tensors
from support.graphs import capture

FUSED_OP = all_reduce_rms_norm.torch_op
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("fake_world")


def fused_calls(captured):
    return [node for node in captured.graph.nodes if node.target is FUSED_OP]


def collectives(captured):
    """All-reduces left in the graph; Inductor turns some of them into their in-place form."""
    return captured.count(ALL_REDUCE) + captured.count(torch.ops._c10d_functional.all_reduce_.default)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(NORMS))
def test_every_norm_fuses_with_and_without_residual(kind, dtype):
    norm = NORMS[kind]

    def block(x, residual, w):
        first = reduce_functional(x)
        second = residual + reduce_functional(norm(first, w, 1e-5))
        third = reduce_functional(norm(second, w, 1e-6)) + second
        return norm(third, w, 0.125), third

    inputs = tensors(dtype)
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 3
    assert captured.count(ALL_REDUCE) == 0
    assert [round(node.args[3], 9) for node in fused_calls(captured)] == [1e-5, 1e-6, 0.125]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gemma_reaches_the_op_with_its_raw_weight(dtype):
    x, residual, w = tensors(dtype)
    captured = capture(
        lambda x, r, w: NORMS["G"](reduce_functional(x) + r, w, 1e-6), x, residual, w, inline_native=False
    )
    (call,) = fused_calls(captured)
    assert call.args[4] == 1.0
    assert call.args[2].op == "placeholder"
    assert call.args[5] == "scale_then_round"


def test_llama_keeps_its_rounding_order():
    captured = capture(lambda x, r, w: NORMS["L"](reduce_functional(x) + r, w, 1e-6), *tensors(), inline_native=False)
    assert fused_calls(captured)[0].args[5] == "round_then_scale"


def test_weightless_passes_none():
    captured = capture(
        lambda x, r, w: NORMS["weightless"](reduce_functional(x), w, 1e-6), *tensors(), inline_native=False
    )
    assert fused_calls(captured)[0].args[2] is None


def test_pow_half_and_square_by_multiplication():
    inputs = tensors()
    captured = capture(lambda x, r, w: pow_half(r + reduce_functional(x), w, 1e-6), *inputs)
    assert captured.verdicts() == [("fused", "")]


@pytest.mark.parametrize("order", ["residual first", "all-reduce first"])
def test_both_orders_of_the_residual_add(order):
    def block(x, residual, w):
        reduced = reduce_functional(x)
        total = residual + reduced if order == "residual first" else reduced + residual
        return NORMS["L"](total, w, 1e-5), total

    inputs = tensors()
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")]
    assert torch.equal(captured.result[1], block(*inputs)[1])


def test_in_place_all_reduce():
    captured = capture(lambda x, r, w: NORMS["L"](reduce_in_place(x) + r, w, 1e-5), *tensors())
    assert captured.verdicts() == [("fused", "")]


def test_dtensor_redistribute(fake_world):
    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def block(x, r, w):
        reduced = DTensor.from_local(x, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
        return NORMS["L"](r + reduced, w, 1e-5)

    captured = capture(block, *tensors())
    assert captured.verdicts() == [("fused", "")]


def test_parallelize_module(fake_world):
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)

        def forward(self, x, residual):
            return self.norm(residual + self.down(x))

    mesh = init_device_mesh("cpu", (2,))
    block = parallelize_module(Block(), mesh, {"down": RowwiseParallel()})
    captured = capture(block, torch.randn(4, HIDDEN // 2), torch.randn(4, HIDDEN))
    assert captured.verdicts() == [("fused", "")]
    assert captured.report.entries[0].module == "down"


def test_ir_operators_in_the_model():
    def block(x, residual, w):
        norm, total = fusewire.fused_add_rms_norm(reduce_functional(x), residual, w, 1e-5)
        return fusewire.rms_norm(reduce_functional(norm), w, 1e-6), total

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=["rank 2", "rank 3"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_ranks_and_dynamic_tokens(shape, dynamic):
    captured = capture(
        lambda x, r, w: NORMS["L"](r + reduce_functional(x), w, 1e-5), *tensors(shape=shape), dynamic=dynamic
    )
    assert captured.verdicts() == [("fused", "")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_reshape_between_all_reduce_and_add(dynamic):
    def block(x, residual, w):
        flat = reduce_functional(x.reshape(-1, HIDDEN))
        total = residual + flat.reshape(residual.shape)
        return NORMS["L"](total, w, 1e-5), total

    inputs = tensors(shape=(2, 3))
    captured = capture(block, *inputs, dynamic=dynamic, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    assert captured.count(ALL_REDUCE) == 0
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


def test_bias_and_scale_are_carried():
    bias = torch.randn(HIDDEN, dtype=torch.bfloat16)

    def block(x, residual, w):
        total = residual + (reduce_functional(x) * 0.25 + bias)
        return NORMS["L"](total, w, 1e-5), total

    inputs = tensors()
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=0.04, rtol=0.02)
    kept = capture(block, *inputs, allow_reassociation=False)
    assert kept.verdicts() == [("refused", "match")]
    assert "allow_reassociation" in kept.reasons()[0]


def test_embedding_scale_is_carried():
    """Gemma multiplies the vocabulary-parallel embedding by a 0-d buffer; norm and residual read the product."""

    def block(x, residual, w, scale):
        embedded = reduce_functional(x) * scale
        return NORMS["G"](embedded, w, 1e-5), embedded + residual

    inputs = [*tensors(), torch.tensor(8.0, dtype=torch.bfloat16)]
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)
    assert capture(block, *inputs, assume_replicated_scales=False).verdicts() == [("refused", "match")]


def test_all_reduce_read_by_norm_and_residual():
    """A vocabulary-parallel embedding: the fused op returns the sum, which the residual stream reads."""

    def block(x, residual, w):
        embedded = reduce_functional(x)
        return NORMS["L"](embedded, w, 1e-5), embedded + residual

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


def test_two_norms_of_one_sum():
    def block(x, residual, w):
        total = reduce_functional(x) + residual
        return NORMS["L"](total, w, 1e-5), NORMS["G"](total, w, 1e-5), total

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)


def test_epsilon_under_dynamic_is_specialised():
    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 3e-4

        def forward(self, x, r, w):
            return NORMS["L"](reduce_functional(x) + r, w, self.eps)

    captured = capture(Norm(), *tensors(), dynamic=True, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    assert fused_calls(captured)[0].args[3] == pytest.approx(3e-4)


def test_inlined_native_leaves_plain_operators():
    captured = capture(lambda x, r, w: NORMS["L"](reduce_functional(x) + r, w, 1e-5), *tensors())
    assert captured.count(FUSED_OP) == 0
    assert captured.count(ALL_REDUCE) == 1
    assert captured.report.entries[0].provider == "native"


def test_opaque_operators_of_other_engines():
    """Graphs as serving engines make them, matched by the operators' names."""
    libraries = vllm_norms.operators()
    group = dist.group.WORLD.group_name

    def block(x, r, w):
        norm, total = torch.ops.vllm_ir.fused_add_rms_norm(torch.ops.vllm.all_reduce(x, group), r, w, 1e-5)
        return torch.ops.vllm_ir.rms_norm(torch.ops.vllm.all_reduce(norm, group), w, 1e-6), total

    inputs = tensors()
    captured = capture(block, *inputs, inline_native=False)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    for got, want in zip(captured.result, block(*inputs), strict=True):
        assert torch.equal(got, want)
    del libraries


def test_functional_collective_spellings():
    mesh_free = dist.group.WORLD.group_name

    def block(x, r, w):
        return NORMS["L"](functional.all_reduce(x, "sum", mesh_free) + r, w, 1e-5)

    assert capture(block, *tensors()).verdicts() == [("fused", "")]


def test_sum_of_two_all_reduces_becomes_one():
    """Mixture of experts: routed experts (rank 2, reshaped) and the shared expert are reduced over the same group."""

    def block(x, residual, w):
        routed = reduce_functional(x.reshape(-1, HIDDEN)).reshape(residual.shape)
        shared = reduce_functional(x * 0.5)
        total = residual + (routed + shared)
        return NORMS["L"](total, w, 1e-5), total

    inputs = tensors(shape=(2, 3))
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")] * 2
    assert collectives(captured) == 1
    assert [entry.fusion for entry in captured.report.entries][1].startswith("merged into")
    for got, want in zip(captured.result, block(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=0.04, rtol=0.02)
    apart = capture(block, *inputs, merge_allreduces=False)
    assert collectives(apart) == 2
    assert sorted(apart.verdicts()) == [("fused", ""), ("refused", "match")]


def test_merged_all_reduces_that_cannot_fuse_stay_apart():
    def block(x, residual, w):
        total = residual + (reduce_functional(x) + reduce_functional(x * 0.5))
        return NORMS["F"](total, w, 1e-5)

    x, residual, w = tensors()
    captured = capture(block, x, residual, w.float())
    assert [status for status, _ in captured.verdicts()] == ["refused", "refused"]
    assert collectives(captured) == 2


def test_addend_before_the_residual():
    def block(x, residual, w):
        inner = (reduce_functional(x.reshape(-1, HIDDEN)) + residual.reshape(-1, HIDDEN) * 2).reshape(residual.shape)
        total = residual + inner
        return NORMS["L"](total, w, 1e-5), total

    inputs = tensors(shape=(2, 3))
    captured = capture(block, *inputs)
    assert captured.verdicts() == [("fused", "")]
    for got, want in zip(captured.result, block(*inputs), strict=True):
        torch.testing.assert_close(got, want, atol=0.04, rtol=0.02)


def test_batch_invariant_mode_says_why_faster_providers_are_left_out():
    def block(x, r, w):
        return NORMS["L"](reduce_functional(x) + r, w, 1e-5)

    inputs = tensors()
    captured = capture(block, *inputs, batch_invariant=True)
    assert captured.verdicts() == [("fused", "")]
    entry = captured.report.entries[0]
    assert entry.provider == "rank_ordered_batch_invariant"
    assert "flashinfer: not batch-invariant" in entry.reason


def test_batch_invariant_mode_takes_every_norm():
    def block(x, r, w):
        return NORMS["L"](x, w, 1e-5) + NORMS["G"](r, w, 1e-6)

    captured = capture(block, *tensors(), batch_invariant=True)
    assert captured.count(fusewire.rms_norm.torch_op) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_views_of_a_sum_read_the_fused_operators(dynamic):
    """A second view of the all-reduce, beside the one that is normalised."""

    def block(x, residual, w):
        total = reduce_functional(x)
        return NORMS["L"](total.view(-1, 2, HIDDEN), w, 1e-5), total.view(-1).sin(), total

    captured = capture(block, *tensors(shape=(6,)), dynamic=dynamic, inline_native=False)
    assert captured.verdicts() == [("fused", "")]
    assert captured.count(torch.ops._c10d_functional.all_reduce.default) == 0
    norm, flat, total = captured.result
    assert (tuple(norm.shape), tuple(flat.shape), tuple(total.shape)) == ((3, 2, HIDDEN), (6 * HIDDEN,), (6, HIDDEN))
    assert torch.equal(flat, total.view(-1).sin())
