"""Inputs for self-tests with known results."""

from __future__ import annotations

import torch
from torch import Tensor


def eighths(rows: int, hidden: int, seed: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return pseudo-random (rows, hidden) multiples of 1/8 whose sums are exact in every dtype."""
    index = torch.arange(rows * hidden, device=device).view(rows, hidden)
    return ((index * (2 * seed + 1) + seed) % 9 - 4).to(dtype) / 8
