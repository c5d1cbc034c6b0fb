"""Providers beside native: batch-invariant norms, FlashInfer, and Triton kernels (symm_mem).

batch_invariant  norms whose result for a row does not depend on the other rows
flashinfer       FlashInfer's fused kernels
symm_mem         fusewire's kernels over symmetric memory
fp8_rows         a kernel that quantises rows, after norms of kernels that do not
alignment        contiguous, aligned tensors

Importing a provider's module registers it; `custom_ops/api.py` imports all of them.
"""
