"""Tensors as kernels with 16-byte accesses need them."""

from __future__ import annotations

from torch import Tensor


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous and on a 16-byte boundary; a copy where it is not.

    Never a refusal: addresses differ from rank to rank, and all ranks must make the same call.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
