"""All-reduce, residual add and RMSNorm in one Triton kernel over symmetric memory.

provider         what it can serve; SymmMemProvider
invariant        symm_mem_batch_invariant, the same with batch-invariant kernels
workspace        SymmMemWorkspace: the symmetric memory of one rank; layout: where in it what lies
launcher         the launches, from checked arguments; arguments: the checks
assemble         the kernels' arguments, in the order that all share
launch_config    grid, warps and tiles
prepared_launch  reuses the launch of a bound call
precompile       the kernels that a workspace can need
protocol         what ranks must have equal to share buffers
self_test        calls with known results
kernels          the Triton kernels, and why no rank overwrites what another still reads
"""
