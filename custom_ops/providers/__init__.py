"""Implementations of the operators beside native: batch-invariant norms, FlashInfer, and our own over symmetric memory."""
