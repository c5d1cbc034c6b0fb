"""The Triton kernels, from single memory accesses (`memory`) to whole all-reduces."""
