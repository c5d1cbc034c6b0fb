"""Small tensor-parallel programs in every spelling, for tests of single graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor

HIDDEN = 64


def reduce_functional(x: Tensor, op: str = "sum") -> Tensor:
    return functional.all_reduce(x, op, dist.group.WORLD)


def reduce_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _normalized(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Callable[[Tensor, Any, float], Tensor]] = {
    "L": lambda x, w, eps: w * _normalized(x, eps).to(x.dtype),
    "L'": lambda x, w, eps: _normalized(x, eps).to(x.dtype) * w,
    "G": lambda x, w, eps: (_normalized(x, eps) * (1.0 + w.float())).type_as(x),
    "M": lambda x, w, eps: (w * _normalized(x, eps)).to(x.dtype),
    "M'": lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps),
    "F": lambda x, w, eps: (_normalized(x, eps) * w.float()).type_as(x),
    "weightless": lambda x, w, eps: _normalized(x, eps).to(x.dtype),
}


def pow_half(x: Tensor, w: Any, eps: float) -> Tensor:
    """The norm with pow(-0.5) and x * x, as newer Gemmas write it."""
    wide = x.float()
    return (wide * torch.pow((wide * wide).mean(-1, keepdim=True) + eps, -0.5) * w.float()).type_as(x)


def tensors(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (5,), seed: int = 0) -> list[Tensor]:
    """x and residual of shape (*shape, HIDDEN), and a weight."""
    generator = torch.Generator().manual_seed(seed)
    full = (*shape, HIDDEN)
    return [
        torch.randn(full, generator=generator).to(dtype),
        torch.randn(full, generator=generator).to(dtype),
        (torch.randn(HIDDEN, generator=generator) * 0.3 + 1).to(dtype),
    ]
