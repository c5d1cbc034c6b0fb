"""Providers beside native: batch-invariant norms, FlashInfer, and Triton kernels (symm_mem)."""
