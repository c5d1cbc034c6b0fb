"""Call functions on real tensors while a graph is traced or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

_T = TypeVar("_T")


def call_now(function: Callable[[], _T]) -> _T:
    """Return function(), run without gradients and outside modes such as that of fake tensors."""
    with _disable_current_modes(), torch.no_grad():
        return function()
