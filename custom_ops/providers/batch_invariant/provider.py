"""Batch-invariant `all_reduce_rms_norm`: a sum in rank order, then a batch-invariant norm.

FlashInfer's kernels are not batch-invariant: their reduction depends on the number of tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusewire.custom_ops.ops.all_reduce_norm import all_reduce_rms_norm, can_gather, sum_in_rank_order
from fusewire.custom_ops.ops.norms import BATCH_INVARIANT_NORMS, fused_add_rms_norm, rms_norm

PROVIDER = "rank_ordered_batch_invariant"


@all_reduce_rms_norm.register_impl(PROVIDER, supports_args=can_gather, batch_invariant=True)
def _all_reduce_rms_norm(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *norm, group_name = rest
    summed = sum_in_rank_order(x, group_name)
    if residual is None:
        plain = (summed, *norm)
        return rms_norm.choose(*plain, policy=BATCH_INVARIANT_NORMS).provider.fn(*plain), summed
    added = (summed, residual, *norm)
    normed, residual_out = fused_add_rms_norm.choose(*added, policy=BATCH_INVARIANT_NORMS).provider.fn(*added)
    return normed, residual_out
