"""Inputs of self-tests: calls whose results are known."""

from __future__ import annotations

import torch
from torch import Tensor


def eighths(rows: int, hidden: int, seed: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return (rows, hidden) eighths of whole numbers from -4 to 4, whose sums are exact in any dtype.

    They look random, and differ between seeds.
    """
    index = torch.arange(rows * hidden, device=device).view(rows, hidden)
    return ((index * (2 * seed + 1) + seed) % 9 - 4).to(dtype) / 8
