"""FlashInfer's fused all-reduce kernels as a provider."""
