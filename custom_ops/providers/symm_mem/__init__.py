"""All-reduce, residual add and RMSNorm in one Triton kernel over symmetric memory."""
