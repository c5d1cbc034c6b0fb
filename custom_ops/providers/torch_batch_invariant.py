"""Batch-invariant norms in plain PyTorch, for any device, and the order of summation that all of them share.

A row's bits must not depend on the rows beside it. Libraries choose how to split a reduction by the shape of
the whole batch, so here the sum of squares is a fixed tree of elementwise additions, a function of the hidden
size alone. Every operation used is one that IEEE 754 requires to be correctly rounded (+, *, square root,
1/x, conversions), so its result for an element depends neither on vector width, thread or position nor on the
device: this provider and the Triton kernel, which follows the same tree, agree bit for bit (the sign and
payload of a NaN aside).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusewire.custom_ops.norms import ROUND_THEN_SCALE, add_residual, fused_add_rms_norm, rms_norm

PROVIDER = "torch_batch_invariant"
MAX_TILE = 16384
_LANES_PER_WARP = 256  # 32 threads, 8 values each: what one warp reads in one 16-byte access per thread


class ReductionTree(NamedTuple):
    """How a row's squares are summed. A row is cut into chunks of `tile`, the last filled up with zeros.

    Within a chunk, while it is wider than `lanes`, its upper half is added to its lower half; then neighbours
    are added, pair by pair, down to one number. Chunks are added from left to right. The shape suits a GPU:
    halves meet within one thread, the first neighbours too, then the lanes of a warp, and warps last.
    """

    tile: int
    lanes: int


def reduction_tree(hidden: int) -> ReductionTree:
    """The tree for rows of `hidden` values: of the hidden size alone, never of the number of rows."""
    tile = min(1 << max(hidden - 1, 0).bit_length(), MAX_TILE)
    warps = 8 if tile >= 8192 else 4
    return ReductionTree(tile, min(tile, warps * _LANES_PER_WARP))


def sum_of_squares(wide: Tensor) -> Tensor:
    """The sum of squares over the last dimension (kept, of size 1), by the fixed tree, in wide's dtype."""
    hidden = wide.shape[-1]
    tree = reduction_tree(hidden)
    total = wide.new_zeros((*wide.shape[:-1], 1))
    for start in range(0, hidden, tree.tile):
        chunk = wide[..., start : start + tree.tile]
        part = pad(chunk * chunk, (0, tree.tile - chunk.shape[-1]))
        while part.shape[-1] > tree.lanes:
            half = part.shape[-1] // 2
            part = part[..., :half] + part[..., half:]
        while part.shape[-1] > 1:
            part = part[..., 0::2] + part[..., 1::2]
        total = total + part
    return total


def normalize_batch_invariant(
    x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str
) -> Tensor:
    """RMSNorm of x (..., hidden) as `fusewire.custom_ops.norms.normalize`, by operations fixed row by row."""
    if x.numel() == 0:
        return torch.empty_like(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # CUDA divides by a number by multiplying with its inverse and the CPU does not: multiply on both.
    mean = sum_of_squares(wide) * (1.0 / x.shape[-1])
    # Not torch.rsqrt, which is an approximation on some devices.
    normed = wide * torch.reciprocal(torch.sqrt(mean + eps))
    if weight is None:
        return normed.to(x.dtype)
    if form == ROUND_THEN_SCALE:
        return (normed.to(x.dtype) * (weight + weight_bias if weight_bias else weight)).to(x.dtype)
    scale = weight.to(wide.dtype)
    return (normed * (scale + weight_bias if weight_bias else scale)).to(x.dtype)


@rms_norm.register_impl(PROVIDER, batch_invariant=True)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str) -> Tensor:
    return normalize_batch_invariant(x.contiguous(), weight, eps, weight_bias, form)


@fused_add_rms_norm.register_impl(PROVIDER, batch_invariant=True)
def _fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_bias: float, form: str
) -> tuple[Tensor, Tensor]:
    summed = add_residual(x.contiguous(), residual)
    return normalize_batch_invariant(summed, weight, eps, weight_bias, form), summed
