"""The sizes that FlashInfer's all-reduce kernels take, and the memory that they need."""

from __future__ import annotations

import torch
from torch import Tensor

from fusewire.custom_ops.dispatch.cost_tables import ONE_SHOT
from fusewire.custom_ops.ops.registry import Support

WORLD_SIZES = (2, 4, 8, 16)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The kernels compute the third Lamport buffer's offset in int32. At this size it overflows: a hang.
_COMM_BYTES_LIMIT = 1 << 30
# Kernels use up to 126 registers per thread, so larger blocks may fail to launch.
_MAX_BLOCK = 512


def limits(hidden: int, dtype: torch.dtype, world_size: int) -> Support:
    """Return whether the kernels support this hidden size, dtype and world size."""
    if dtype not in _DTYPES:
        return Support.no(f"x is {dtype_name(dtype)}; FlashInfer's kernels take bfloat16, float16 and float32")
    vector = 16 // dtype.itemsize
    return Support.all_of(
        (
            world_size in WORLD_SIZES,
            f"the group has {world_size} ranks; FlashInfer's kernels are built for 2, 4, 8 or 16",
        ),
        (
            hidden > 0 and hidden % vector == 0,
            f"hidden size {hidden} is not a multiple of {vector}, the {dtype_name(dtype)} elements of one 16-byte access",
        ),
        (
            block_threads(hidden, dtype) <= _MAX_BLOCK,
            f"hidden size {hidden} needs {block_threads(hidden, dtype)} threads in a block, "
            f"{_MAX_BLOCK} are safe; a hidden size that is a multiple of {8 * vector} is split "
            "over up to 8 blocks",
        ),
        (
            max_tokens(hidden, dtype, world_size) > 0,
            f"one token of hidden size {hidden} on {world_size} ranks passes the kernels' limit of 1 GiB",
        ),
    )


def block_threads(hidden: int, dtype: torch.dtype) -> int:
    """Return the threads per block: the kernels split a token over a cluster of up to 8 blocks."""
    per_token = max(1, hidden * dtype.itemsize // 16)
    cluster = 8
    while per_token % cluster and cluster > 1:
        cluster //= 2
    threads = per_token // cluster
    while threads < 128 and cluster >= 2:
        threads, cluster = threads * 2, cluster // 2
    return threads


def max_tokens(hidden: int, dtype: torch.dtype, world_size: int) -> int:
    """Return the largest workspace in tokens; world size * tokens * row bytes must be < 1 GiB."""
    return (_COMM_BYTES_LIMIT - 1) // (world_size * max(hidden, 1) * dtype.itemsize)


def workspace_bytes(hidden: int, dtype: torch.dtype, world_size: int, tokens: int) -> int:
    """Return a workspace's bytes per rank: Lamport and exchange buffers, flags, defaults."""
    elements = world_size * tokens * hidden
    # An upper bound before FlashInfer 0.7.2, whose exchange buffer always has 2-byte elements.
    exact = (3 * elements * dtype.itemsize, elements * dtype.itemsize, world_size * 1024)
    granularity = 2 << 20
    symmetric = sum(-(-(size + 2048) // granularity) * granularity for size in exact)
    return symmetric + (tokens + 1) * hidden * dtype.itemsize


def token_limit(variant: str, hidden: int, dtype: torch.dtype, world_size: int, tokens: int) -> range:
    """Return the token counts that a variant takes on a workspace for `tokens` tokens."""
    if variant == ONE_SHOT:
        return range(tokens + 1)
    if block_threads(hidden, dtype) < world_size:
        return range(0)
    # Two-shot needs more tokens than ranks; a buffer of 2-byte elements must hold input and sums.
    return range(world_size + 1, min(tokens, world_size * tokens // dtype.itemsize) + 1)


def dtype_name(value: Tensor | torch.dtype | None) -> str:
    """Return the name of a tensor's dtype, or of a dtype: "bfloat16"."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return str(dtype).removeprefix("torch.")
