"""Sums of two all-reduces with scales, numbers, biases and residuals between become one all-reduce.

The tensors hold small whole numbers (tests/support/carried.py), so what was moved must give the
same bits.
"""

from __future__ import annotations

import pytest
import torch

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm
from fusewire.patterns.collectives import ALL_REDUCE

from support.blocks import reduce_functional
from support.carried import HIDDEN, PARTS, differing, inputs, norm
from support.distributed import shared_pool
from support.graphs import capture

FUSED_OP = all_reduce_rms_norm.torch_op
# `y` and `z` are the all-reduced values.
SUMS = {
    "quotients": lambda y, z, r, s, b, c: r + (y / c + z / 2),
    "a number beside": lambda y, z, r, s, b, c: r + ((y + z) - 1),
    "a number inside": lambda y, z, r, s, b, c: r + ((1 + y) + z),
    "a number, subtracted": lambda y, z, r, s, b, c: (y - 1) + z,
    "from a number": lambda y, z, r, s, b, c: (3 - y) + z,
    "an element inside": lambda y, z, r, s, b, c: r + (y + (z * 2 + c)),
    "two numbers": lambda y, z, r, s, b, c: ((y - 1) + 2) + z,
    "two numbers and a residual": lambda y, z, r, s, b, c: r + (((y - 1) + 2) + z),
    "a number each": lambda y, z, r, s, b, c: (y - 1) + (z + 2),
    "a bias each": lambda y, z, r, s, b, c: r + ((y + b) + (z + b)),
    "number after residual": lambda y, z, r, s, b, c: ((r + y) - 1) + z,
    "bias after residual": lambda y, z, r, s, b, c: ((r + y) + b) + z,
    "tensor and residual": lambda y, z, r, s, b, c: ((y + s) + r) + z,
    "scaled sums": lambda y, z, r, s, b, c: r + (((y + 1) * 2 - b) * c + (z - s) * 0.5),
    "a difference": lambda y, z, r, s, b, c: y - z,
    "a difference and a residual": lambda y, z, r, s, b, c: (r + y) - z,
    "a multiple subtracted": lambda y, z, r, s, b, c: r + (y - 2 * z),
    "alpha, subtracted": lambda y, z, r, s, b, c: r + torch.sub(y, z, alpha=2),
    "alpha, added": lambda y, z, r, s, b, c: r.add(torch.add(z, y, alpha=-1), alpha=0.5),
    "rsub": lambda y, z, r, s, b, c: r - torch.rsub(y + b, z),
    "numbers subtracted": lambda y, z, r, s, b, c: r + ((1 - y) - (z * 2 - 1) * c),
    "times -1": lambda y, z, r, s, b, c: y * -1 + z,
    "negated": lambda y, z, r, s, b, c: (r - y) + (b - z),
    "flat": lambda y, z, r, s, b, c: (
        r + (((y.reshape(-1, HIDDEN) - 1) * c + s.reshape(-1, HIDDEN)).reshape(r.shape) + (z + 1))
    ),
}


def sum_of(name):
    def block(x, r, w, s, b, c, *_):
        total = SUMS[name](reduce_functional(x), reduce_functional(s), r, s, b, c)
        return norm(total, w), total

    return block


def merges(captured):
    return [entry.fusion.startswith("merged") for entry in captured.report.entries]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_merged(fake_world, name, dynamic):
    given = inputs(shape=(2, 3))
    captured = capture(sum_of(name), *given, inline_native=False, dynamic=dynamic)
    assert captured.verdicts() == [("fused", "")] * 2, captured.reasons()
    assert sorted(merges(captured)) == [False, True]
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    assert all(torch.equal(got, want) for got, want in zip(captured.result, sum_of(name)(*given), strict=True))


def test_three_all_reduces_become_one(fake_world):
    def block(x, r, w, s, b, *_):
        total = r + (((reduce_functional(x) + 1) + reduce_functional(s)) + (reduce_functional(r) - b))
        return norm(total, w), total

    captured = capture(block, *inputs(), inline_native=False)
    assert merges(captured) == [False, True, True]
    assert (captured.count(FUSED_OP), captured.count(ALL_REDUCE)) == (1, 0)
    assert all(torch.equal(got, want) for got, want in zip(captured.result, block(*inputs()), strict=True))


def test_a_difference_in_fp32_is_merged(fake_world):
    def block(x, r, w, s, *_):
        total = r + (reduce_functional(x).float() - reduce_functional(s).float()).to(x.dtype)
        return norm(total, w), total

    given = inputs(torch.bfloat16)
    captured = capture(block, *given)
    assert merges(captured) == [False, True]
    assert all(torch.equal(got, want) for got, want in zip(captured.result, block(*given), strict=True))


def _read_between(x, r, w, s, *_):
    inner = reduce_functional(x) - 1
    return norm(r + ((inner + 2) + reduce_functional(s)), w), inner


def _added_before_a_matrix(x, r, w, s, b, c, base, down, up):
    return norm(r + (reduce_functional(x @ base) + (reduce_functional(x @ down) + 1) @ up), w)


def _added_before_an_addmm(x, r, w, s, b, c, base, down, up):
    return norm(r + ((reduce_functional(x @ down) + 1) @ up + reduce_functional(x @ base) * c), w)


def _of_each_other(x, r, w, s, *_):
    y = reduce_functional(x)
    return norm((y + 1) + reduce_functional(s + y), w)


def _added_is_of_the_other(x, r, w, s, *_):
    z = reduce_functional(s)
    return norm(((reduce_functional(x) - 1) + z.sin()) + z, w)


def _number_that_bf16_rounds(x, r, w, s, *_):
    return norm(r + ((reduce_functional(x) + 0.3) + reduce_functional(s)), w)


def _wide(x, r, w, s, *_):
    return norm((((reduce_functional(x) + 1).float() + 1) + reduce_functional(s).float()).to(x.dtype), w)


def _difference_in_fp32_is_read(x, r, w, s, *_):
    wide = reduce_functional(x).float() - reduce_functional(s).float()
    return norm(wide.to(x.dtype), w), wide


def _difference_of_maxima(x, r, w, s, *_):
    return norm(reduce_functional(x) - reduce_functional(s, "max"), w)


STAYS = (
    _difference_in_fp32_is_read,
    _difference_of_maxima,
    _read_between,
    _added_before_a_matrix,
    _added_before_an_addmm,
    _of_each_other,
    _added_is_of_the_other,
    _number_that_bf16_rounds,
    _wide,
)


@pytest.mark.parametrize("block", STAYS)
def test_sums_that_stay(fake_world, block):
    given = inputs(
        torch.bfloat16 if block in (_number_that_bf16_rounds, _wide, _difference_in_fp32_is_read) else torch.float32
    )
    captured = capture(block, *given, inline_native=False)
    assert merges(captured) == [False, False]
    assert captured.report.notes == ()


@pytest.mark.parametrize("part", PARTS)
def test_results_on_ranks(part):
    assert shared_pool(2).run(differing, sum_of, list(SUMS)[part], timeout_s=300) == [[], []]
