"""Contiguous, 16-byte aligned tensors for kernels that load 16 bytes at once."""

from __future__ import annotations

from torch import Tensor


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it if it is not contiguous and 16-byte aligned.

    Copying keeps the ranks in step: addresses differ between ranks, so refusing would as well.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
