"""Rows that are added up after an all-reduce, as the outputs of experts, move before it."""

from __future__ import annotations

import pytest
import torch

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.patterns.collectives import ALL_REDUCE

from support.blocks import HIDDEN, reduce_functional
from support.carried import PARTS, differing, inputs, norm
from support.distributed import shared_pool
from support.graphs import capture

FUSED_OP = all_reduce_rms_norm.torch_op
# `e` is what three experts make of six tokens, all-reduced; `z` another all-reduced value.
SUMS = {
    "sum": lambda e, z, r, s, b, c: r + e.view(3, -1, HIDDEN).sum(0),
    "negative dimension": lambda e, z, r, s, b, c: e.view(3, -1, HIDDEN).sum(-3) + r,
    "kept dimension": lambda e, z, r, s, b, c: r + e.view(3, -1, HIDDEN).sum(0, keepdim=True).squeeze(0),
    "two dimensions": lambda e, z, r, s, b, c: r + e.view(3, 1, -1, HIDDEN).sum((0, 1)),
    "without a residual": lambda e, z, r, s, b, c: e.view(3, -1, HIDDEN).sum(0),
    "scaled": lambda e, z, r, s, b, c: r + (e * 0.5).view(3, -1, HIDDEN).sum(0) * c,
    "a bias afterwards": lambda e, z, r, s, b, c: r + (e.view(3, -1, HIDDEN).sum(0) + b),
    "beside another": lambda e, z, r, s, b, c: r + (z + e.view(3, -1, HIDDEN).sum(0)),
    "Llama 4": lambda e, z, r, s, b, c: r + z.clone().add_(e.reshape(3, -1, e.shape[-1]).sum(dim=0)).view(r.shape),
}


def sum_of(name):
    def block(x, r, w, s, b, c, *_):
        other = reduce_functional(s) if name in ("beside another", "Llama 4") else None
        total = SUMS[name](reduce_functional(torch.cat([x, s, r])), other, r, s, b, c)
        return norm(total, w), total

    return block


@pytest.fixture(autouse=True)
def _world(fake_world):
    return fake_world


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_sums_move(name, dtype, dynamic):
    captured = capture(sum_of(name), *inputs(dtype), inline_native=False, dynamic=dynamic)
    assert set(captured.verdicts()) == {("fused", "")}, captured.reasons()
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    for got, want in zip(captured.result, sum_of(name)(*inputs(dtype)), strict=True):
        assert torch.equal(got, want)


def refused(block, *given, says, **options):
    captured = capture(block, *given, **options)
    assert captured.verdicts() == [("refused", "match")]
    assert says in captured.reasons()[0], captured.reasons()


def test_sums_that_stay():
    given = inputs()
    refused(sum_of("sum"), *given, says="a sum of rows stands", allow_reassociation=False)
    refused(sum_of("sum"), *inputs(torch.float16), says="rows are added up (sum_1) between the all-reduce and the norm")

    def after_a_bias(x, r, w, s, b, *_):
        return norm((reduce_functional(torch.cat([x, s])) + b).view(2, -1, HIDDEN).sum(0), w)

    def also_read(x, r, w, s, *_):
        parts = reduce_functional(torch.cat([x, s])).view(2, -1, HIDDEN)
        return norm(r + parts.sum(0), w), parts

    def over_hidden(x, r, w, s, *_):
        return norm(r + reduce_functional(x).sum(-1, keepdim=True), w)

    def wider(x, r, w, s, *_):
        return norm(r + reduce_functional(torch.cat([x, s])).view(2, -1, HIDDEN).sum(0, dtype=torch.float32), w)

    refused(after_a_bias, *given, says="something is added to each row before; add it afterwards")
    refused(also_read, *given, says="is also read elsewhere")
    refused(over_hidden, *given, says="aten::sum (sum_1) between the all-reduce and the norm cannot")
    refused(wider, *inputs(torch.bfloat16), says="aten::sum (sum_1) between the all-reduce and the norm cannot")


@pytest.mark.parametrize("part", PARTS)
def test_results_on_ranks(part):
    assert shared_pool(2).run(differing, sum_of, list(SUMS)[part], timeout_s=300) == [[], []]
