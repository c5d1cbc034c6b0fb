"""Programs with other operations between the all-reduce and the norm, for tests of what is carried.

The tensors hold small whole numbers, so that every sum is exact in any order: what was moved must
give the same bits.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from support.blocks import HIDDEN, NORMS, reduce_functional
from support.compiles import WITHOUT_CODE

# Of the programs, those that ranks compile: a part in each run of the tests, all every night.
PARTS = [slice(None, None, 4), pytest.param(slice(None), marks=pytest.mark.nightly)]


def norm(x, w):
    return NORMS["L"](x, w, 1e-5)


def whole(shape, most, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def inputs(dtype=torch.float32, shape=(6,)):
    """x, r, s: (*shape, HIDDEN); w, b: (HIDDEN,); c: one element; the matrices of a projection and
    of LoRA.
    """
    full = (*shape, HIDDEN)
    x, r, s = (whole(full, 4, dtype, seed) for seed in range(3))
    w, b = (whole((HIDDEN,), 4, dtype, seed) for seed in (3, 4))
    matrices = whole((HIDDEN, HIDDEN), 2, dtype, 5), whole((HIDDEN, 8), 2, dtype, 6), whole((8, HIDDEN), 2, dtype, 7)
    return x, r, w, s, b, torch.tensor(0.25, dtype=dtype), *matrices


def differing(make, names):
    """On a rank: the names whose program, compiled, has not eager's bits. All must fuse whole."""
    x, *rest = inputs()
    given, found = (x * (1 + dist.get_rank()), *rest), []
    for name in names:
        torch._dynamo.reset()
        block = make(name)
        with torch.no_grad():
            want = block(*given)
            options = {"expect_fused": "all", **WITHOUT_CODE}
            got = torch.compile(block, backend="fusewire", fullgraph=True, options=options)(*given)
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            found.append(name)
    return found


# `y` is the all-reduced value.
SUBTRACTIONS = {
    "r - y": lambda y, r, s, b, c: r - y,
    "y - r": lambda y, r, s, b, c: y - r,
    "r - y * 0.5": lambda y, r, s, b, c: r - y * 0.5,
    "r - (y + b)": lambda y, r, s, b, c: r - (y + b),
    "r - (s - y)": lambda y, r, s, b, c: r - (s - y),
    "r + (y - b)": lambda y, r, s, b, c: r + (y - b),
    "(y - s) + r": lambda y, r, s, b, c: (y - s) + r,
    "b - y": lambda y, r, s, b, c: b - y,
    "rsub": lambda y, r, s, b, c: torch.rsub(y, r),
    "alpha -1": lambda y, r, s, b, c: torch.add(y, r, alpha=-1),
    "alpha -1, subtracted": lambda y, r, s, b, c: torch.sub(y, r, alpha=-1),
    "alpha": lambda y, r, s, b, c: torch.add(r, y, alpha=0.5),
    "alpha, subtracted": lambda y, r, s, b, c: torch.sub(r, y + b, alpha=2),
}
SCALES_AFTER_ADDENDS = {
    "r + (y + s) * 0.25": lambda y, r, s, b, c: r + (y + s) * 0.25,
    "(b + y) * 0.25 + r": lambda y, r, s, b, c: (b + y) * 0.25 + r,
    "r + (y * 0.5 + s) / 4": lambda y, r, s, b, c: r + (y * 0.5 + s) / 4.0,
    "r + ((y + s) + b) * c": lambda y, r, s, b, c: r + ((y + s) + b) * c,
    "r + ((y + s) * 0.5 + b) * c": lambda y, r, s, b, c: r + ((y + s) * 0.5 + b) * c,
    "r - -(y + s)": lambda y, r, s, b, c: r - -(y + s),
    "(y + b) * c": lambda y, r, s, b, c: (y + b) * c,
    "(r + y) * 0.25": lambda y, r, s, b, c: (r + y) * 0.25,
    "flat": lambda y, r, s, b, c: (
        r + (((y.reshape(-1, HIDDEN) + s.reshape(-1, HIDDEN)) + b) * c).reshape(r.shape) * 0.5
    ),
    "c in two dimensions": lambda y, r, s, b, c: r + (y.reshape(-1, HIDDEN) + b).mul(c.view(1, 1)).reshape(r.shape),
}
SCALES = {
    "torch.tensor": lambda y, r, s, b, c: r + y * torch.tensor(0.5, dtype=y.dtype),
    "torch.tensor in fp32": lambda y, r, s, b, c: r + y * torch.tensor(0.25),
    "over torch.tensor": lambda y, r, s, b, c: r + y / torch.tensor(4.0, dtype=y.dtype),
    "full": lambda y, r, s, b, c: r + torch.full((1,), 0.5, dtype=y.dtype) * y,
    "full_like": lambda y, r, s, b, c: r + y * torch.full_like(y, 0.5),
    "new_full": lambda y, r, s, b, c: r + y * y.new_full((), 0.5),
    "full, cast": lambda y, r, s, b, c: r + y * torch.full((), 0.5, dtype=torch.float64).to(y.dtype),
    "cast": lambda y, r, s, b, c: r + y * c.double().to(y.dtype),
    "viewed": lambda y, r, s, b, c: r + y * c.view(1, 1),
    "expanded": lambda y, r, s, b, c: r + y * c.view(1).expand(HIDDEN),
    "computed": lambda y, r, s, b, c: r + y * (torch.sqrt(c) * 2 + 1),
    "over c": lambda y, r, s, b, c: r + y / c,
    "over one element": lambda y, r, s, b, c: r + y.clone().div_(c.view(1)),
    "over c in two dimensions": lambda y, r, s, b, c: r + y.reshape(-1, HIDDEN).div(c.view(1, 1)).reshape(r.shape),
    "over a computed one": lambda y, r, s, b, c: r + y / (c * c + c.sqrt() - c * c),
    "over an int": lambda y, r, s, b, c: r + y / torch.tensor(-4),
    "times the reciprocal": lambda y, r, s, b, c: r + y * (1 / c) * c.reciprocal(),
    "over c, negated": lambda y, r, s, b, c: r - y / c,
    "after an addend": lambda y, r, s, b, c: r + ((y + b) / c + s) / 2,
}
# Multiplied by the reciprocal of 41 or 47, the numbers would not come out whole.
DIVISIONS = {
    "over 41": lambda y, r, s, b, c: r + (y * 41.0) / 41.0,
    "over a tensor of 47": lambda y, r, s, b, c: r + (y * 47.0 + b * 47.0) / (c * 188),
}
NUMBERS = {
    "y + 0.5": lambda y, r, s, b, c: y + 0.5,
    "y - 1": lambda y, r, s, b, c: y - 1,
    "1 - y": lambda y, r, s, b, c: 1 - y,
    "rsub of 1": lambda y, r, s, b, c: torch.rsub(y, 1),
    "add_": lambda y, r, s, b, c: y.clone().add_(2).sub_(0.5),
    "r + (y - 1)": lambda y, r, s, b, c: r + (y - 1),
    "r - (0.5 + y)": lambda y, r, s, b, c: r - (0.5 + y),
    "(r + y) + 1": lambda y, r, s, b, c: (r + y) + 1,
    "(y + 1) + b": lambda y, r, s, b, c: (y + 1) + b,
    "y + one row": lambda y, r, s, b, c: y.reshape(-1, HIDDEN) + b.view(1, -1),
    "a column, expanded": lambda y, r, s, b, c: r + (y + s[..., :1].expand_as(y)),
    "a constant": lambda y, r, s, b, c: r + (y + torch.tensor(0.5)),
    "y + c": lambda y, r, s, b, c: y + c,
    "r + (y - c)": lambda y, r, s, b, c: r + (y - c.view(1)),
    "y + c in two dimensions": lambda y, r, s, b, c: y + c.view(1, 1),
    "scaled": lambda y, r, s, b, c: r + (y + 2) * c,
    "nested": lambda y, r, s, b, c: r + (((y + 1) * 0.5 - 2) / c + c) * 0.5,
    "one row, flat": lambda y, r, s, b, c: r + (y.reshape(-1, HIDDEN) + b.view(1, -1)).reshape(r.shape),
    "one element, flat": lambda y, r, s, b, c: r + (y.reshape(-1, HIDDEN) + c).reshape(r.shape),
    "flat, of a number": lambda y, r, s, b, c: r + ((y.reshape(-1, HIDDEN) - 1) * c).reshape(r.shape),
}
KINDS = {**SUBTRACTIONS, **SCALES_AFTER_ADDENDS, **SCALES, **DIVISIONS, **NUMBERS}


def of_kind(name):
    def block(x, r, w, s, b, c, *_):
        total = KINDS[name](reduce_functional(x), r, s, b, c)
        return norm(total, w), total

    return block
