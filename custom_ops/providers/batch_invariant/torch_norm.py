"""Batch-invariant norms in plain PyTorch, for any device.

Libraries choose how to split a reduction by the shape of the whole batch. Here the sum of squares
is a fixed tree of elementwise additions that depends only on the hidden size
(`triton_norm.chunk_of`), so a row's result does not depend on the other rows. For bf16, fp16
and fp32 every operation is correctly rounded (+, *, 1/x, sqrt, conversions). So results are equal
on every device and to the Triton kernel's, bit for bit (except a NaN's sign and payload).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusewire.custom_ops.ops.norms import (
    TORCH_NORM,
    NormSpec,
    add_normalize,
    computed_in,
    fused_add_rms_norm,
    rms_norm,
    scale_and_round,
)
from fusewire.custom_ops.ops.registry import Support
from fusewire.custom_ops.providers.batch_invariant.triton_norm import chunk_of

PROVIDER = TORCH_NORM


def sum_of_squares(wide: Tensor) -> Tensor:
    """Return the sum of squares over the last dimension (kept, size 1) in wide's dtype."""
    hidden = wide.shape[-1]
    size = chunk_of(hidden)
    total = wide.new_zeros((*wide.shape[:-1], 1))
    for start in range(0, hidden, size):
        chunk = wide[..., start : start + size]
        part = pad(chunk * chunk, (0, size - chunk.shape[-1]))
        while part.shape[-1] > 1:
            part = part[..., 0::2] + part[..., 1::2]
        total = total + part
    return total


def inverse_square_root(v: Tensor) -> Tensor:
    """Return 1 / sqrt(v): in fp32 with both steps correctly rounded, in fp64 as torch.rsqrt."""
    if v.dtype == torch.float64:
        return torch.rsqrt(v)
    # torch.sqrt with MKL on a CPU is one bit off for a fifth of all fp32 numbers. In fp64 that does
    # not change the rounded fp32 root, which is at least 4 fp64 units away from every tie.
    return torch.reciprocal(torch.sqrt(v.double()).float())


def normalize_batch_invariant(x: Tensor, norm: NormSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Return the RMSNorm of x (..., hidden), as `norms.normalize` but batch-invariant."""
    dtype = dtype or x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    wide = x.to(computed_in(x.dtype))
    # Division by a number is a multiplication by its inverse on CUDA only: multiply on all devices.
    mean = sum_of_squares(wide) * (1.0 / x.shape[-1])
    return scale_and_round(wide * inverse_square_root(mean + norm.eps), norm, dtype)


def _supports(x: Tensor) -> Support:
    return Support.all_of((x.device.type != "mps", "Metal has no float64, which the exact square root needs"))


@rms_norm.register_impl(
    PROVIDER,
    supports_args=lambda x, *_: _supports(x),
    batch_invariant=True,
)
def _rms_norm(x: Tensor, *norm: Any) -> Tensor:
    return normalize_batch_invariant(x.contiguous(), NormSpec(*norm))


@fused_add_rms_norm.register_impl(
    PROVIDER,
    supports_args=lambda x, *_: _supports(x),
    batch_invariant=True,
)
def _fused_add_rms_norm(x: Tensor, residual: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    return add_normalize(x.contiguous(), residual, NormSpec(*norm), normalize_batch_invariant)
