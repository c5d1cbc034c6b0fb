"""Our own kernels: all-reduce, residual add and RMSNorm in one, over symmetric memory."""
