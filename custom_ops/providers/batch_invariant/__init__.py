"""RMSNorm and sums whose result for a row does not depend on the other rows.

triton_norm  the norms as one Triton kernel
torch_norm   the norms in plain PyTorch, with the same bits
provider     all_reduce_rms_norm with a sum in rank order
"""
